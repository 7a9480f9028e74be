"""How good a candidate is, on training rows that nothing was trained on: more is better.

    score = Scorer.of(made, score, stage, taught)      what the recipe's `score` says
    score(module, model)                               one number

A metric of the task, or minus a distillation loss, which needs no labels (AutoDistil, arXiv
2201.12507, judges sub-networks so). The rows are the data's `hold_out`; a task's validation split
stays for the report.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastffn.distill.preparation import HELD_OUT, Data
from fastffn.distill.stage_module import StageModule
from fastffn.distill.teaching import Taught
from fastffn.distill.terms import counts
from fastffn.evaluate.tasks import NotFinite, evaluate

_BATCH = 64
Around = Callable[[int], AbstractContextManager]


def nothing(number: int) -> AbstractContextManager:
    return nullcontext()


class TaskScore:
    """A metric of the task on its held-out rows.

    Args:
        data: with held-out rows.
        metric: one of the task's.
    """

    def __init__(self, data: Data, metric: str):
        self.data, self.metric = data, metric

    def __call__(self, model: nn.Module, around: Around = nothing) -> float:
        """The metric of a model with the task's head; NaN where its outputs are not finite.

        Args:
            around: gives a context for the forward of the batch of a number; the same number is the
                same batch for every model.
        """
        numbered = _Numbered(model, around)
        try:
            found = evaluate(numbered, self.data.held_out, self.data.task, HELD_OUT, _BATCH)
        except NotFinite:
            return math.nan
        return found[self.metric]


@dataclass
class LossScore:
    """Minus the weighted losses of a distillation stage on held-out rows.

    Attributes:
        data: with held-out rows.
        taught: gives the teacher's outputs for them; None where no loss reads any.
        weights: of the losses.
    """

    data: Data
    taught: Taught | None
    weights: Mapping[str, float]

    def __post_init__(self):
        order = np.argsort(self.data.held_out.lengths, kind="stable")
        self._batches = [order[k : k + _BATCH] for k in range(0, len(order), _BATCH)]

    @torch.inference_mode()
    def __call__(self, module: StageModule, around: Around = nothing) -> float:
        """The negative loss of the one student in `module`."""
        (student,) = module.students.values()
        device = next(student.parameters()).device
        training = module.training
        module.eval()
        total, weight = dict.fromkeys(self.weights, 0.0), dict.fromkeys(self.weights, 0.0)
        try:
            for number, rows in enumerate(self._batches):
                batch = self.data.held_out.batch(rows)
                batch.pop("index")
                found = counts(batch)
                batch = {name: value.to(device) for name, value in batch.items()}
                theirs = self.taught(batch, rows) if self.taught else {}
                with around(number):
                    losses = module(batch, theirs, 0)
                for name, value in losses.items():
                    share = found[module.counted[name]]
                    total[name] += share * float(value)
                    weight[name] += share
        finally:
            module.train(training)
        return -sum(self.weights[name] * total[name] / weight[name] for name in total)


class _Numbered(nn.Module):
    """A model whose forwards are counted."""

    def __init__(self, model: nn.Module, around: Around):
        super().__init__()
        self.model, self.around = model, around
        self.config = model.config
        self.train(model.training)
        self.count = 0

    def forward(self, **inputs: Tensor):
        number, self.count = self.count, self.count + 1
        with self.around(number):
            return self.model(**inputs)
