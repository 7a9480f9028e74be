"""Latency of candidates from a table that is measured once on the target device.

    latency(genes) = rest + sum over layers of stack * unit

with `rest` what the model has besides its feed-forward networks, and for one unit of inner width I
at hidden width H

    unit = plain[I, gated] + prologue + sum over operations of cost[operation] * columns

where the operations are those that the function has more (or less) than the plain function of the
same kind, and columns are I between up and down, H before and after; `prologue` is the pass that
an operation before `up` needs at all. So functions that were never measured have an estimate, and
widths are those that the space allows: some tens of measurements for any number of candidates.

Why not a measurement per candidate: it takes a second where a proposal takes a millisecond. Why
not a formula of MACs: narrow products run far below the speed of wide ones, and by how much is the
device's own matter. `latency.measure` makes the tables.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..distill.recipe_fields import RecipeError, build
from ..errors import UserError
from ..expr import Expr, Gene
from ..files import write_text_atomic
from .grammar import plain
from .rules import is_whole

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Target:
    """Where and how the latency of a model counts.

    Attributes:
        device: as torch names it, such as "cpu" or "cuda".
        batch_size, length: texts of a batch, and tokens of each.
        threads: of the CPU; None: as many as torch takes by itself.
        dtype: of the weights: "float32", "bfloat16" or "float16".

    Raises:
        UserError: a value that makes no sense.
    """

    device: str = "cpu"
    batch_size: int = 1
    length: int = 128
    threads: int | None = None
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("batch_size", "length"):
            if not is_whole(getattr(self, name)):
                raise UserError(f"{name} must be a positive integer")
        if self.threads is not None and not is_whole(self.threads):
            raise UserError("threads must be a positive integer, or null for torch's own choice")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.threads else ""
        return f"{self.device}, {self.batch_size} x {self.length} tokens, {self.dtype}{threads}"


@dataclass(frozen=True)
class LatencyTable:
    """What was measured; all in microseconds per batch of the target.

    Attributes:
        target: where it was measured.
        rest: everything but the feed-forward networks; 0 where that is not known.
        units: "270" or "270 gated" (inner width, kind) -> one unit with the plain function.
        primitives: operation -> its time per column.
        prologue: the pass over a unit's input that an operation before `up` needs.

    Raises:
        UserError: a time below 0.
    """

    target: Target
    rest: float
    units: Mapping[str, float]
    primitives: Mapping[str, float]
    prologue: float = 0.0

    def __post_init__(self):
        for name in ("units", "primitives"):
            if any(time < 0 for time in getattr(self, name).values()):
                raise UserError(f"{name} has a time below 0")
        for name in ("rest", "prologue"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is below 0")

    def of(self, gene: Gene, hidden_size: int) -> int:
        """Microseconds of one layer's feed-forward network, at least 1.

        Raises:
            UserError: a width or an operation that was not measured.
        """
        return max(1, round(gene.stack * self._unit(gene, hidden_size)))

    def _unit(self, gene: Gene, hidden_size: int) -> float:
        width = gene.width(hidden_size)
        key = unit_key(width, gene.gated)
        if key not in self.units:
            known = ", ".join(self.units)
            raise UserError(
                f"latency: width {key} was not measured (known: {known}): measure again"
            )
        parts = gene.segments
        time = self.units[key]
        for part, columns in (
            (parts.prologue, hidden_size),
            (parts.middle, width),
            (parts.epilogue, hidden_size),
        ):
            time += columns * self._operations(part)
        time -= width * self._operations(plain(gene.gated).middle)
        return time + (0.0 if parts.prologue.is_leaf else self.prologue)

    def _operations(self, expr: Expr) -> float:
        """Time per column of an elementwise expression."""
        counts = Counter(node.op for node in expr.walk() if not node.is_leaf)
        missing = sorted(counts.keys() - self.primitives.keys())
        if missing:
            known = ", ".join(self.primitives)
            raise UserError(
                f"latency: {missing[0]} was not measured (known: {known}): measure again"
            )
        return sum(number * self.primitives[op] for op, number in counts.items())

    # -- texts

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes `to_dict` as JSON; `load` reads it, and a space's `table` may name the file."""
        write_text_atomic(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @staticmethod
    def from_dict(values: Mapping[str, Any], path: tuple = ("table",)) -> "LatencyTable":
        """The table that `to_dict` gave.

        Args:
            path: where the values stand, for errors.

        Raises:
            RecipeError: it is none; the key is said.
        """
        return build(LatencyTable, values, path)

    @staticmethod
    def load(path: str | Path) -> "LatencyTable":
        """The table that `save` wrote.

        Raises:
            UserError: the file cannot be read or holds no table.
        """
        try:
            return LatencyTable.from_dict(json.loads(Path(path).read_text(encoding="utf-8")), ())
        except OSError as error:
            raise UserError(f"latency table {path}: {error.strerror}") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"latency table {path} is no JSON: {error}") from None
        except RecipeError as error:
            raise UserError(f"latency table {path}: {error}") from None


def unit_key(width: int, gated: bool) -> str:
    """Key of `LatencyTable.units`."""
    return f"{width} gated" if gated else str(width)
