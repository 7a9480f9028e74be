"""What the gene of one layer may be: the part of a space that may differ from layer to layer."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from typing import Any

from ..distill.recipe_fields import RecipeError, choice
from ..expr import PRIMITIVES
from ..expr.tree import MAX_HEIGHT
from .grammar import LINEARS, Grammar

# EfficientBERT's; gelu_erf is in the table too but differs from gelu by less than a search can tell
DEFAULT_PRIMITIVES = (
    *("add", "mul", "max"),
    *("gelu", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "swish"),
)


@dataclass(frozen=True)
class Rules:
    """The rules of one layer; the attributes are those of `Space`, sorted and of the right types.

    `Rules.read` checks them. The defaults are EfficientBERT's (arXiv 2109.07222).
    """

    primitives: tuple[str, ...] = DEFAULT_PRIMITIVES
    heights: tuple[int, int] = (3, 7)
    max_nodes: int = 20
    stacks: tuple[int, ...] = (1, 2, 3, 4)
    ratios: tuple[Fraction, ...] = tuple(Fraction(1, n) for n in (1, 2, 3, 4))
    gated: bool = False

    @cached_property
    def grammar(self) -> Grammar:
        return Grammar(self.primitives, self.heights, self.max_nodes)

    @staticmethod
    def read(values: Mapping[str, Any], path: tuple, width: int) -> dict[str, Any]:
        """Checked values of some of the attributes.

        Args:
            values: attribute -> value; texts such as "1/2" for ratios, a lone value for a list.
            path: where they stand, for errors.
            width: the inner width of ratio 1.

        Raises:
            RecipeError: an unknown name, or a value that makes no sense.
        """
        if not isinstance(values, Mapping):
            raise RecipeError(path, f"is {values!r}: expected a mapping, keys with values")
        known = [field.name for field in fields(Rules)]
        for name in values:
            if name not in known:
                raise RecipeError((*path, name), f"is unknown: {choice(name, known)}")
        read = {name: _READ[name](value, (*path, name)) for name, value in values.items()}
        for ratio in read.get("ratios", ()):
            if int(ratio * width) < 1:
                said = f"must leave a width of at least 1 of {width}: {ratio} does not"
                raise RecipeError((*path, "ratios"), said)
        return read


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether it is an integer, no truth value, and not below `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _several(value: Any) -> tuple:
    return (value,) if isinstance(value, str) or not hasattr(value, "__iter__") else tuple(value)


def _primitives(value: Any, path: tuple) -> tuple[str, ...]:
    for index, name in enumerate(_several(value)):
        if name not in PRIMITIVES:
            said = f": unknown primitive {name!r}: {choice(name, PRIMITIVES)}"
            raise RecipeError((*path, index), said)
    return tuple(dict.fromkeys(_several(value)))


def _heights(value: Any, path: tuple) -> tuple[int, int]:
    heights = _several(value)
    if len(heights) != 2 or not all(is_whole(n, 0) for n in heights) or heights[0] > heights[1]:
        raise RecipeError(path, "must be two integers, least and greatest, such as [3, 7]")
    if not LINEARS < heights[1] <= MAX_HEIGHT:
        said = f"allow nothing: the greatest height must be {LINEARS + 1} to {MAX_HEIGHT}"
        raise RecipeError(path, said)
    return heights


def _positive(value: Any, path: tuple) -> int:
    if not is_whole(value):
        raise RecipeError(path, "must be a positive integer")
    return value


def _stacks(value: Any, path: tuple) -> tuple[int, ...]:
    if not _several(value) or not all(map(is_whole, _several(value))):
        raise RecipeError(path, "must be positive integers, such as [1, 2]")
    return tuple(sorted(set(_several(value))))


def _ratios(value: Any, path: tuple) -> tuple[Fraction, ...]:
    try:
        # a decimal as it is written: Fraction(0.1) has a denominator of sixteen digits
        ratios = sorted({Fraction(str(one)) for one in _several(value)})
    except (ValueError, ZeroDivisionError):
        ratios = []
    if not ratios:
        raise RecipeError(path, 'must be numbers such as "1/2"')
    return tuple(ratios)


def _flag(value: Any, path: tuple) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(path, "must be true or false")
    return value


_READ = {
    "primitives": _primitives,
    "heights": _heights,
    "max_nodes": _positive,
    "stacks": _stacks,
    "ratios": _ratios,
    "gated": _flag,
}
