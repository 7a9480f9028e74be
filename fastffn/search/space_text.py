"""Spaces as text: what a person writes is checked and made a `Space`, and written back.

The path of a value in an error begins with "space", whether it stands in a file of its own, under
that key of a search recipe, or is an argument.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distill import recipe_yaml
from ..distill.recipe_fields import RecipeError, build, choice
from ..errors import UserError
from .budget import Window, shown
from .latency_table import LatencyTable, Target
from .rules import Rules, is_whole

if TYPE_CHECKING:
    from .space import Space

_TOP = ("space",)
_RULES = tuple(field.name for field in fields(Rules))


def checked(space: "Space") -> dict[str, Any]:
    """The attributes of a space under construction, checked and of the right types.

    Raises:
        UserError: a value that makes no sense; most are `RecipeError`s, with the value's path.
    """
    for name, least in (
        *(("hidden_size", 1), ("num_layers", 1), ("base", 1)),
        *(("rest_params", 0), ("rest_macs", 0)),
    ):
        if not is_whole(getattr(space, name), least):
            kind = "a positive integer" if least else "an integer, 0 or more"
            raise RecipeError((*_TOP, name), f"must be {kind}")
    width = space.base * space.hidden_size
    values = Rules.read({name: getattr(space, name) for name in _RULES}, _TOP, width)
    values["layers"] = _layers(space.layers, space.num_layers, width)
    for name in ("params", "macs"):
        values[name] = Window.read(getattr(space, name), (*_TOP, name))
    values["latency"] = Window.read(space.latency, (*_TOP, "latency"), whole=False)
    target = space.target
    if not isinstance(target, Target):
        target = build(Target, {} if target is None else target, (*_TOP, "target"))
    values["target"] = target
    values["table"] = _table(space.table, target)
    for name in ("functions", "shapes"):
        entries = getattr(space, name)
        if entries is not None:
            if isinstance(entries, str) or len(entries) != space.num_layers:
                said = f"must have one entry per layer, {space.num_layers}"
                raise RecipeError((*_TOP, name), said)
            values[name] = tuple(map(str, entries))
    return values


def _layers(value: Any, number: int, width: int) -> dict[int, dict[str, Any]]:
    path = (*_TOP, "layers")
    if not isinstance(value, Mapping):
        raise RecipeError(path, "must be a mapping, layers with what is other there")
    found = {}
    for key, rules in value.items():
        if not str(key).isdecimal() or int(key) >= number:
            raise RecipeError((*path, key), f"is no layer: they are 0 to {number - 1}")
        if int(key) in found:
            raise RecipeError((*path, key), f"is layer {int(key)}, which is there already")
        found[int(key)] = Rules.read(rules, (*path, key), width)
    return dict(sorted(found.items()))


def _table(value: Any, target: Target) -> LatencyTable | None:
    path = (*_TOP, "table")
    if isinstance(value, str | Path):
        try:
            value = LatencyTable.load(value)
        except UserError as error:
            raise RecipeError(path, f": {error}") from None
    elif isinstance(value, Mapping):
        value = LatencyTable.from_dict(value, path)
    if value is not None and not isinstance(value, LatencyTable):
        raise RecipeError(path, "must be a mapping or the path of a file that `save` wrote")
    if value is not None and value.target != target:
        said = f"was measured on another target ({value.target}) than the space's ({target})"
        raise RecipeError(path, f"{said}: measure again, or change target")
    return value


def from_dict(values: Mapping[str, Any]) -> "Space":
    from .space import Space

    if not isinstance(values, Mapping):
        raise RecipeError(_TOP, "must be a mapping, keys with values")
    known = [field.name for field in fields(Space)]
    for key in values:
        if key not in known:
            raise RecipeError((*_TOP, key), f"is unknown: {choice(key, known)}")
    for key in ("hidden_size", "num_layers"):
        if key not in values:
            raise RecipeError((*_TOP, key), "is missing: give it a value")
    return Space(**values)


def read(path: Path) -> "Space":
    try:
        values, places = recipe_yaml.parse_file(path)
    except OSError as error:
        raise UserError(f"space {path} cannot be read: {error.strerror}") from None
    try:
        return from_dict({} if values is None else values)
    except RecipeError as error:
        raise UserError(f"{places.of(error.path[len(_TOP) :])}: {error}") from None


def to_dict(space: "Space") -> dict[str, Any]:
    values = {field.name: getattr(space, field.name) for field in fields(space)}
    values["layers"] = {str(layer): _plain(rules) for layer, rules in space.layers.items()}
    values["target"] = asdict(space.target)
    values["table"] = None if space.table is None else space.table.to_dict()
    return _plain(values)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return values | ({"ratios": list(map(str, values["ratios"]))} if "ratios" in values else {})


def describe(space: "Space") -> str:
    budget = " and ".join(window.text(name) for name, window in space.budgets)
    within = f" with {budget}" if budget else ""
    lines = [
        f"{space.num_layers} layers of width {space.hidden_size}: {space.count:,} combinations of "
        f"stacks and widths{within}"
    ]
    kinds: dict[str, list[int]] = {}
    for layer, rules in enumerate(space.rules):
        kinds.setdefault(_rules_text(space, rules), []).append(layer)
    for text, layers in kinds.items():
        which = "every layer" if len(kinds) == 1 else f"layer {', '.join(map(str, layers))}"
        lines.append(f"{which}: {text}")
    for what, candidate in (("smallest", space.smallest()), ("largest", space.largest())):
        found = {name: getattr(candidate, name) for name in ("params", "macs", "latency")}
        costs = (f"{name} {shown(name, value)}" for name, value in found.items() if value)
        lines.append(f"{what}: {', '.join(costs)}")
    return "\n".join(lines)


def _rules_text(space: "Space", rules: Rules) -> str:
    stacks, ratios = (", ".join(map(str, values)) for values in (rules.stacks, rules.ratios))
    shapes = f"stacks {stacks}, ratios {ratios}" if space.shapes is None else "fixed shapes"
    low, high = rules.heights
    functions = (
        f"functions of height {low} to {high}, at most {rules.max_nodes} nodes, over "
        f"{', '.join(rules.primitives)}{', gated or not' if rules.gated else ''}"
    )
    return f"{shapes}; {'fixed functions' if space.functions is not None else functions}"
