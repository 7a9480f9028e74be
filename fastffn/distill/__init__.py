"""Distillation: teachers, what is read from them, and training of students."""
