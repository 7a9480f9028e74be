"""What a person may choose of a compression run, checked before any work."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastffn.errors import UserError

# How a run is carried out, not what it computes: these may differ when it is resumed.
_ELSEWHERE = ("out", "fresh", "keep_cache")


@dataclass(frozen=True)
class Options:
    """Choices of a run; the defaults are the demonstration's.

    Attributes:
        teacher: directory or hub name of the encoder to compress; None: all-MiniLM-L6-v2.
        text: UTF-8 text files to distil on; None: the standard library's English.
        budget_params: most parameters of the student, word embeddings not counted; None: the
            teacher's divided by 3.5.
        layers: teacher layers that the student takes over, from 0; None: every second one, the
            last among them.
        embedding_size: rank of a factorised word embedding; None: the teacher's own, unfactorised.
        minutes: how long the run may take. Numbers of steps follow from it and from the machine's
            speed, are written to the run directory as the `plan` and then stay.
        plan: numbers that replace those found from `minutes`, see `schedule.NAMES`: with the same
            plan a run computes the same elsewhere.
        out: the run directory.
        seed: of everything that is drawn by chance.
        ablate: train the baselines as long as the student instead of for a short time. Takes about
            four times as long.
        fresh: start anew where the run directory holds another or a finished run.
        keep_cache: keep the teacher's outputs after the run.
        device: "cpu", "cuda" or the like; None: a GPU where torch sees one.

    Raises:
        UserError: a value that makes no sense.
    """

    teacher: str | None = None
    text: Sequence[Path] | None = None
    budget_params: int | None = None
    layers: tuple[int, ...] | None = None
    embedding_size: int | None = None
    minutes: float = 9.0
    plan: Mapping[str, int] | None = None
    out: Path = Path("runs/demo")
    seed: int = 0
    ablate: bool = False
    fresh: bool = False
    keep_cache: bool = False
    device: str | None = None

    def __post_init__(self):
        def store(name, value):
            object.__setattr__(self, name, value)

        store("out", Path(self.out))
        store("text", None if self.text is None else tuple(Path(path) for path in self.text))
        store("layers", None if self.layers is None else tuple(self.layers))
        if self.text is not None and not self.text:
            raise UserError("no text files given: name at least one, or leave the choice out")
        if not (math.isfinite(self.minutes) and self.minutes > 0):
            raise UserError(f"minutes {self.minutes} is not a positive number")
        for name in ("budget_params", "embedding_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value} is not positive")
        if self.layers is not None and (
            not self.layers or sorted(set(self.layers)) != list(self.layers) or self.layers[0] < 0
        ):
            raise UserError(
                f"layers {list(self.layers)}: give different teacher layers in rising order, from 0"
            )

    def identity(self) -> dict[str, Any]:
        """The choices that decide what is computed, as JSON values."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _ELSEWHERE:
                continue
            if field.name == "text" and value is not None:
                value = [str(path) for path in value]
            elif isinstance(value, Mapping):
                value = dict(value)
            elif isinstance(value, tuple):
                value = list(value)
            values[field.name] = value
        return values
