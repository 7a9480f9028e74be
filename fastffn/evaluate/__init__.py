"""Judges a student beside its teacher: retention, latency, size."""
