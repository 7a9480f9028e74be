"""Overrides: `stages.gd.losses.hidden.weight=2` changes one value of a recipe before it is checked.

The value is YAML. Stages go by name and must be there; what else is not there is made, and if no
such key exists the check of the whole names the override.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastffn.distill.recipe_fields import choice, dotted
from fastffn.distill.recipe_parts import model_name
from fastffn.distill.recipe_yaml import Places, parse
from fastffn.errors import UserError

# One of two keys that say the same in different units: the override's replaces the file's.
_REPLACES = {"epochs": "steps", "warmup": "warmup_steps", "task": "text"}
_REPLACES |= {new: old for old, new in _REPLACES.items()}


def apply(
    values: dict[str, Any], places: Places, text: str, named: Sequence[str] = ("stages",)
) -> None:
    """Changes `values` and says in `places` where from; below the keys `named`, stages are a
    mapping by name.

    Raises:
        UserError: no `key=value`, no YAML, a stage that is not there, a key below a plain value.
    """
    key, equals, written = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise UserError(f"override {text!r} is none: give key.sub=value")
    top = path[0]
    if top in named and len(path) == 1:
        raise UserError(f"{text}: stages go by their names: give {top}.NAME.KEY=VALUE")
    value, _ = parse(written, text, with_lines=False)
    if top in named and path[1] not in values[top]:
        raise UserError(f"{text}: {top}.{path[1]} is unknown: {choice(path[1], values[top])}")
    node = values
    for index, name in enumerate(path[:-1]):
        here = path[: index + 1]
        if node.get(name) is None:
            node[name] = {}
            places.put(here, text)
        elif not isinstance(node[name], dict):
            node[name] = _opened(node[name], here, text)
        node = node[name]
    places.put(_set(node, path, value), text)
    other = _REPLACES.get(path[-1])
    if value is not None and other in node:
        del node[other]


def _set(node: dict[str, Any], path: tuple, value: Any) -> tuple:
    """Sets the last key, of what has a shorthand only what that is short for; returns its path."""
    old = node.get(path[-1])
    if isinstance(old, Mapping) and "load" in old and model_name(path) and isinstance(value, str):
        node[path[-1]] = {**old, "load": value}
        return (*path, "load")
    if isinstance(old, Mapping) and _is_loss(path) and isinstance(value, int | float):
        node[path[-1]] = {**old, "weight": value}
        return (*path, "weight")
    node[path[-1]] = value
    return path


def _opened(value: Any, path: tuple, text: str) -> dict[str, Any]:
    """The mapping that a plain value is short for."""
    if model_name(path) and isinstance(value, str):
        return {"load": value}
    if _is_loss(path) and isinstance(value, int | float):
        return {"weight": value}
    raise UserError(f"{text}: {dotted(path)} is {value!r} and has no keys")


def _is_loss(path: tuple) -> bool:
    return len(path) == 4 and path[0] == "stages" and path[2] == "losses"
