"""From plain values to dataclasses: each field's type hint says what its key may hold.

One converter serves the recipe's own dataclasses and the options of losses, so a new field needs
its declaration and nothing else. What a type cannot say (ranges) is in `__post_init__`, which
raises a `UserError` that begins with the field's name.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from fastffn.errors import UserError

_NUMBERS = {int: "a whole number", float: "a number"}


class RecipeError(UserError):
    """What is wrong with the value at `path`; the message begins with the path."""

    def __init__(self, path: tuple, said: str):
        self.path = tuple(path)
        between = "" if said.startswith((":", ",")) or not path else " "
        super().__init__(f"{dotted(path)}{between}{said if path else said.lstrip(': ')}")


def dotted(path: Iterable) -> str:
    """stages.gd.losses"""
    return ".".join(map(str, path))


def choice(name: object, known: Iterable[str]) -> str:
    """`did you mean hidden? (known: ...)`: the end of a message about an unknown name."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, 1, 0.5)
    names = ", ".join(known) or "none"
    return f"did you mean {close[0]}? (known: {names})" if close else f"choose from {names}"


def build(cls: type, value: Any, path: tuple, *, also: Iterable[str] = (), **given: Any) -> Any:
    """The dataclass that a mapping describes.

    Args:
        cls: a dataclass.
        value: its fields' values by name.
        path: where the mapping stands, for errors.
        also: keys that the place takes besides, for what an error says is known.
        given: fields that are made already; `value` does not have them.

    Raises:
        RecipeError: an unknown or a missing key, a value of another type or out of range.
    """
    if not isinstance(value, Mapping):
        raise RecipeError(path, f"is {value!r}: expected a mapping, keys with values")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in fields:
            raise RecipeError((*path, key), f"is unknown: {choice(key, (*also, *fields))}")
    for name, field in fields.items():
        absent = field.default is field.default_factory is dataclasses.MISSING
        if absent and name not in value and name not in given:
            raise RecipeError((*path, name), "is missing: give it a value")
    made = {key: convert(hints[key], item, (*path, key)) for key, item in value.items()}
    try:
        return cls(**made, **given)
    except RecipeError:
        raise
    except UserError as error:
        name = str(error).partition(" ")[0].rstrip(":")
        if name in fields:
            raise RecipeError((*path, name), str(error)[len(name) :].lstrip(" ")) from None
        raise RecipeError(path, f": {error}") from None


def convert(hint: Any, value: Any, path: tuple) -> Any:
    """`value` as `hint` asks for it; a lone value serves as a tuple of one.

    Raises:
        RecipeError: it is none, and what was expected.
    """
    try:
        return _convert(hint, value, path)
    except _Mismatch:
        raise RecipeError(path, f"is {_shown(value)}: expected {_expected(hint)}") from None


class _Mismatch(Exception):
    """The value is of another type than the hint."""


def _convert(hint: Any, value: Any, path: tuple) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, object):
        return value
    if origin in (typing.Union, types.UnionType):
        # A tuple takes a lone value too: whatever takes it as it is comes first.
        for option in sorted(arguments, key=lambda option: typing.get_origin(option) is tuple):
            try:
                return _convert(option, value, path)
            except _Mismatch:
                continue
        raise _Mismatch
    if origin is typing.Literal:
        if value in arguments and type(value) in map(type, arguments):
            return value
        raise _Mismatch
    if origin is tuple:
        return _tuple(arguments, value, path)
    if isinstance(origin or hint, type) and issubclass(origin or hint, Mapping):
        if not isinstance(value, Mapping):
            raise _Mismatch
        item = arguments[1] if arguments else Any
        return {key: _convert(item, one, (*path, key)) for key, one in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    return _plain(hint, value)


def _tuple(arguments: tuple, value: Any, path: tuple) -> tuple:
    if value is None or isinstance(value, Mapping):
        raise _Mismatch
    items = list(value) if isinstance(value, list | tuple) else [value]
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(items)
    if len(arguments) != len(items):
        raise _Mismatch
    return tuple(_convert(hint, one, path) for hint, one in zip(arguments, items, strict=True))


def _plain(hint: Any, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    number = number and math.isfinite(value)
    if hint is float and number:
        return float(value)
    if hint is int and number and value == round(value):  # 1e5 steps are a float to YAML
        return int(value)
    if hint in (None, type(None)) and value is None:
        return None
    if hint in (bool, str) and type(value) is hint:
        return value
    raise _Mismatch


def _expected(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(option) for option in arguments)
    if origin is typing.Literal:
        return ", ".join(map(str, arguments[:-1])) + f" or {arguments[-1]}"
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a list, each {_expected(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_expected(arguments[0])}"
    if hint in _NUMBERS:
        return _NUMBERS[hint]
    if hint in (None, type(None)):
        return "null"
    return {bool: "true or false", str: "text (in quotes, if need be)"}.get(hint, "a mapping")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
