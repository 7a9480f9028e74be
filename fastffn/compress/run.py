"""What the phases of one run share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastffn.compress import schedule
from fastffn.compress.corpus import Corpus
from fastffn.compress.options import Options
from fastffn.compress.student import Shape
from fastffn.distill.cache import TeacherCache
from fastffn.distill.objective import Objective
from fastffn.distill.teacher import Teacher
from fastffn.rundir import RunDirectory

Progress = Callable[[str, float, float, str], None]

_BATCH = 64  # sentences of a step
_LEAST_BATCHES = 4  # in an epoch: a small text gets smaller batches
_SAMPLES = 32  # sentences on which the teacher's FFN units are compared


@dataclass
class Run:
    """One run: its choices, its directory, its teacher and what was decided so far."""

    options: Options
    directory: RunDirectory
    progress: Progress
    teacher: Teacher
    corpus: Corpus
    cache: TeacherCache
    shape: Shape
    objective: Objective

    @property
    def work(self) -> Path:
        return self.directory.work

    @property
    def student_path(self) -> Path:
        return self.directory.path / "student"

    @property
    def plan(self) -> dict[str, int]:
        return self.directory.plan

    @property
    def device(self) -> torch.device:
        return self.teacher.model.device

    @cached_property
    def samples(self) -> dict[str, Tensor]:
        """A batch for the teacher: tells which of its FFN units are strong."""
        numbers = self.numbers("train")
        chosen = numbers[np.linspace(0, len(numbers) - 1, min(_SAMPLES, len(numbers))).astype(int)]
        return {name: x.to(self.device) for name, x in self.cache.batch(chosen, ()).items()}

    @cached_property
    def batch_size(self) -> int:
        return max(2, min(_BATCH, len(self.corpus.train) // _LEAST_BATCHES))

    def numbers(self, part: str) -> np.ndarray:
        return self.corpus.numbers(part)

    def decide(self, **numbers: int) -> None:
        self.directory.decide(**numbers)

    def seconds_left(self) -> float:
        """Of the time for everything, without what the measurement still needs; never below 0."""
        seconds = self.directory.seconds()
        reserve = 0 if "measure" in seconds else schedule.MEASURE
        return max(0.0, (1 - reserve) * 60 * self.options.minutes - sum(seconds.values()))

    def seconds_per_step(self, student: nn.Module, **options: Any) -> float:
        """Of training this student; `options` as in `distil`."""
        train = self.numbers("train")
        return schedule.seconds_per_step(
            student, self.cache, self.objective, train, self.batch_size, **options
        )

    def steps(self, phase: str, before: int = 0, total: int | None = None, text: str = ""):
        """Progress of a training within a phase, as `distil` reports it."""

        def tell(done: int, steps: int) -> None:
            self.progress(phase, before + done, total or steps, text or f"step {done} of {steps}")

        return tell
