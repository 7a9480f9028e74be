"""The ops as functions: `fastffn.functional.elementwise(...)` and its neighbours."""

from .ops.elementwise import elementwise

__all__ = ["elementwise"]
