"""What a stage trains, as one module: students, and the projections of their losses.

    values = module(batch, theirs, step)      {"hidden": scalar, ...}, unweighted means

One module, so that processes that train together wrap it whole, and one checkpoint holds all of it.
The teacher is not part of it: it is not trained, and one pass of it, `theirs`, serves every student
and every sub-network of a supernet.
"""

import contextlib
from collections.abc import Mapping

from torch import Tensor, nn

from fastffn.distill.reading import LOGITS, read
from fastffn.distill.replacing import Replacing
from fastffn.distill.sharing import read_each
from fastffn.distill.stopwatch import Stopwatch
from fastffn.distill.subnetworks import Sandwich
from fastffn.distill.terms import Sizes, Term
from fastffn.errors import UserError
from fastffn.models.architectures import Encoder


def sizes(model: nn.Module) -> Sizes:
    """Of an encoder with or without a head."""
    encoder = Encoder(model)
    config = encoder.base.config
    return Sizes(len(encoder.layers), config.hidden_size, config.num_attention_heads, config)


class StageModule(nn.Module):
    """Students and their terms.

    Args:
        students: by name.
        terms: for each student its losses, by name.
        replacing: mixes the one student's layers with its teacher's.
        sandwich: the sub-networks of the one student, a supernet.

    Attributes:
        counted: name of a value -> what it is a mean over.
        teacher_reads: what the losses read of the teacher.

    Raises:
        UserError: replacing with a loss on layers, which may not have run.
    """

    def __init__(
        self,
        students: Mapping[str, nn.Module],
        terms: Mapping[str, Mapping[str, Term]],
        replacing: Replacing | None = None,
        sandwich: Sandwich | None = None,
    ):
        super().__init__()
        taken = nn.ModuleDict()
        for name in {*students, *(loss for own in terms.values() for loss in own)}:
            if hasattr(taken, name):
                raise UserError(f"a model or loss cannot be called {name}: torch's modules use it")
        self.students = nn.ModuleDict(students)
        self.terms = nn.ModuleDict({name: nn.ModuleDict(own) for name, own in terms.items()})
        self.replacing, self.sandwich = replacing, sandwich
        self.watch = Stopwatch()
        every = [(s, name, term) for s, own in self.terms.items() for name, term in own.items()]
        self.counted = {self._name(s, name): term.counted for s, name, term in every}
        read_of_teacher = (read for _, _, term in every for read in term.teacher_reads)
        self.teacher_reads = tuple(dict.fromkeys(read_of_teacher))
        for _, name, term in every if replacing else ():
            if set(term.student_reads) != {LOGITS}:
                raise UserError(
                    f"losses.{name} compares layers, which replacing may leave out: use "
                    "hard_labels or soft_labels"
                )

    def _name(self, student: str, loss: str) -> str:
        return loss if len(self.students) == 1 else f"{student}/{loss}"

    def forward(
        self, batch: dict[str, Tensor], theirs: dict[str, object], step: int
    ) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, student in self.students.items():
            every = self._read(name, student, batch, step)
            for ours in every:
                for loss, value in self._losses(name, ours, theirs, batch).items():
                    values[loss] = values.get(loss, 0) + value / len(every)
        if self.replacing is not None:
            first = next(iter(values))
            values[first] = values[first] + self.replacing.nothing(step)
        return values

    def _read(self, name, student, batch, step) -> list[dict[str, object]]:
        """What the losses read of the student, or of each sub-network."""
        names = [read for term in self.terms[name].values() for read in term.student_reads]
        mixed = contextlib.nullcontext()
        if self.replacing is not None:
            mixed = self.replacing.mixed(step)
        with self.watch("student"), mixed:
            if self.sandwich is not None:
                return read_each(student, self.sandwich.at(step), batch, names)
            return [read(student, batch, names)]

    def _losses(self, name, ours, theirs, batch) -> dict[str, Tensor]:
        """Of one network; those on layers that a sub-network leaves out are left out."""
        with self.watch("loss"):
            return {
                self._name(name, loss): term(ours, theirs, batch)
                for loss, term in self.terms[name].items()
                if any(read in ours for read in term.student_reads)
            }
