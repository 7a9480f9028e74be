"""Distillation: recipes and the engine that runs them; teachers, and what is read from them.

`fastffn.distill.run(recipe, out=..., overrides=[...])` runs a recipe; `read` reads and checks one.
"""

import importlib

_LAZY = {"run": "engine", "read": "recipe", "Recipe": "recipe"}  # they need more than torch

__all__ = [*_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'fastffn.distill' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
