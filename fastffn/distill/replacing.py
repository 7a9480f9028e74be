"""BERT-of-Theseus (arXiv 2002.02925): a student's layers stand in for groups of the teacher's.

    y_{i+1} = scc_i(y_i) with probability p, else prd_i(y_i)        one draw per layer and batch

scc_i is layer i of the student, prd_i the run of teacher layers that ends where `layer_map`'s
uniform map says. The embeddings and the head that run are the student's, copies of the teacher's
that stay frozen, as the teacher's layers do. The task's loss is the only one.

The student is the plain, smaller model all along: in a training step its encoder walks a mixture of
its own and the teacher's layers, which are never registered in it. So checkpoints and the exported
model hold the student alone, and evaluation runs it as it is.

The draw is a function of (seed, step): every process of a distributed run, every piece of an
accumulated batch and every resumed run draws the same, without a word between them.

A layer that was not drawn gets zero gradients rather than none: processes that train together wait
for the gradients of all parameters, and the optimiser's averages go on as in the authors' code.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fastffn.distill.layers import layer_map
from fastffn.errors import UserError
from fastffn.models.architectures import Encoder


@dataclass(frozen=True)
class Schedule:
    """The probability that a layer is the student's, at each step.

    Attributes:
        schedule: "linear": from `base` at step 0 to 1 at `steps` (a curriculum; the paper's k is
            (1 - base) / steps); "constant": `rate` until `steps`, then 1.
        steps: when the probability becomes 1; 0: with the stage's last step.
    """

    schedule: str = "linear"
    base: float = 0.3
    rate: float = 0.5
    steps: int = 0

    def __post_init__(self):
        if self.schedule not in ("linear", "constant"):
            raise UserError(f"schedule {self.schedule!r} is unknown: choose linear or constant")
        for name in ("base", "rate"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(f"{name} {value!r} is no probability: give one from 0 to 1")
        if not isinstance(self.steps, int) or self.steps < 0:
            raise UserError(f"steps {self.steps!r} is no number of steps: give 0 or more")

    def probability(self, step: int, last: int) -> float:
        """At a step, counted from 0, of a stage of `last` steps."""
        steps = self.steps or last
        if step >= steps:
            return 1.0
        if self.schedule == "constant":
            return self.rate
        return self.base + (1 - self.base) * step / steps


class Replacing:
    """Mixes a student's layers with its teacher's.

    Args:
        student: the smaller model, trained.
        teacher: of the same structure and hidden size, frozen.
        schedule: of the probability.
        steps: of the stage.
        seed: of the draws.

    Raises:
        UserError: models whose layers cannot stand in for each other.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, schedule: Schedule, steps: int, seed: int
    ):
        ours, theirs = Encoder(student), Encoder(teacher)
        if ours.architecture != theirs.architecture:
            raise UserError(
                f"layers of {type(ours.base).__name__} cannot replace those of "
                f"{type(theirs.base).__name__}: take the student's from the teacher (layers_of)"
            )
        widths = [encoder.base.config.hidden_size for encoder in (ours, theirs)]
        types = [next(encoder.base.parameters()).dtype for encoder in (ours, theirs)]
        if widths[0] != widths[1] or types[0] != types[1]:
            raise UserError(
                f"the student is {widths[0]} wide in {types[0]} and the teacher {widths[1]} in "
                f"{types[1]}: layers replace layers of the same width and type"
            )
        ends = [end + 1 for _, end in layer_map(len(ours.layers), len(theirs.layers))]
        starts = [0, *ends[:-1]]
        # In a tuple, so that torch does not see them: they are not the student's.
        self.groups = tuple(
            tuple(theirs.layers[first:end]) for first, end in zip(starts, ends, strict=True)
        )
        self.student, self.encoder = student, ours
        self.schedule, self.steps, self.seed = schedule, steps, seed

    def drawn(self, step: int) -> list[bool]:
        """For each layer whether it is the student's at this step."""
        probability = self.schedule.probability(step, self.steps)
        draws = np.random.default_rng((self.seed, step)).random(len(self.groups))
        return (draws < probability).tolist()

    @contextlib.contextmanager
    def mixed(self, step: int) -> Iterator[None]:
        """Within the block the student runs the mixture of this step."""
        walked: list[nn.Module] = []
        choices = zip(self.drawn(step), self.encoder.layers, self.groups, strict=True)
        for ours, layer, group in choices:
            walked += [layer] if ours else group
        replaced = [layer for group in self.groups for layer in group]
        for layer in replaced:
            layer.train(self.student.training)  # dropout in all layers or in none
        try:
            with self.encoder.walking(walked):
                yield
        finally:
            for layer in replaced:
                layer.eval()

    def nothing(self, step: int) -> Tensor | float:
        """0, with a gradient of 0 for each trained parameter of the layers that were not drawn."""
        total: Tensor | float = 0.0
        for ours, layer in zip(self.drawn(step), self.encoder.layers, strict=True):
            for parameter in () if ours else layer.parameters():
                if parameter.requires_grad:
                    total = total + parameter.flatten()[0] * 0
        return total
