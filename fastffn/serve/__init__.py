"""Models on their way to production: in other formats, loaded again, and in other runtimes.

`fastffn.export(model, folder, format)` writes, `fastffn.serve.load(folder)` reads what it wrote.
"""

import importlib

_LAZY = {"Served": "served", "load": "loading"}  # they need more than torch

__all__ = [*_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'fastffn.serve' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
