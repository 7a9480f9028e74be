"""Trains a student against cached teacher outputs, on the Hugging Face Trainer.

    result = distil(student, cache, objective, steps=500)

Resuming and the curve are `ResumableTrainer`'s; added here is the objective.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import TrainingArguments

from fastffn.distill.batches import CacheCollator, LengthSampler, SentenceNumbers
from fastffn.distill.cache import TeacherCache
from fastffn.distill.objective import Objective
from fastffn.distill.resumable import CURVE_POINTS, Clock, ResumableTrainer, one_device
from fastffn.errors import UserError
from fastffn.expr import Gene

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training run leaves beside the student's weights.

    Attributes:
        curve: [[step, loss, {part: value}], ...], each the mean since the entry before.
        seconds: of the clock, including those before an interruption.
        frozen: names of parameters that the losses do not reach and that stayed as they were; not
            determined for a supernet, where this changes with the genes.
    """

    curve: list
    seconds: float
    frozen: list[str]


class DistilTrainer(ResumableTrainer):
    """Its loss is an `Objective` and its data are a `TeacherCache`.

    Args:
        model: the student.
        args: see `ResumableTrainer`.
        clock: the same.
        cache: the teacher's outputs.
        objective: the losses.
        numbers: which sentences to train on.
        genes: for a supernet, what it runs at a step: called with the number of the step.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        clock: Clock,
        cache: TeacherCache,
        objective: Objective,
        numbers: np.ndarray,
        genes: Callable[[int], Sequence[Gene | str]] | None = None,
    ):
        super().__init__(
            model=model,
            args=args,
            clock=clock,
            sampler=LengthSampler(cache.lengths[numbers], args.train_batch_size, seed=args.seed),
            data_collator=CacheCollator(cache, objective.outputs),
            train_dataset=Subset(SentenceNumbers(len(cache)), numbers),
        )
        self.objective, self.genes = objective, genes

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.genes is not None:
            self.model.set_genes(self.genes(self.state.global_step))
        losses = self.objective.losses(model, inputs)
        self.note({name: value.detach() for name, value in losses.items()})
        return (losses["total"], losses) if return_outputs else losses["total"]


def distil(
    student: nn.Module,
    cache: TeacherCache,
    objective: Objective,
    steps: int,
    *,
    numbers: np.ndarray | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    warmup: float = 0.1,
    schedule: str = "linear",
    weight_decay: float = 0.0,
    freeze: Sequence[str] = (),
    genes: Callable[[int], Sequence[Gene | str]] | None = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
    resume: bool = True,
    checkpoint_seconds: float = 30.0,
    progress: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Trains a student in place, where it is, and leaves it in evaluation mode.

    Args:
        student: an encoder of the teacher's hidden size, perhaps a supernet.
        cache: the teacher's outputs; holds what the objective needs.
        objective: the losses.
        steps: optimiser steps; the data are repeated as often as these need.
        numbers: the sentences to train on, None: all of the cache.
        batch_size: sentences in a step.
        learning_rate: its peak; AdamW, gradients clipped to length 1.
        warmup: part of the steps during which the rate rises from 0.
        schedule: how it falls afterwards, a name that transformers knows ("linear", "cosine").
        freeze: prefixes of parameters' names that are not trained.
        genes: for a supernet, what it runs at each step, as a function of the step's number.
        seed: of the order of the data (and dropout).
        output_dir: for checkpoints; None: none are written.
        resume: continue from the newest whole checkpoint of `output_dir`; else those are removed.
        checkpoint_seconds: time between checkpoints.
        progress: called with (steps done, steps) after each step.

    Returns:
        Curve and time. A run that was killed and resumed has the weights of one that was not.

    Raises:
        UserError: no steps, no sentences, or a cache that lacks what the objective needs.
    """
    numbers = np.arange(len(cache)) if numbers is None else np.asarray(numbers)
    if steps < 1 or not len(numbers):
        raise UserError("distillation needs at least one step and one sentence")
    if missing := set(objective.outputs) - set(cache.outputs):
        raise UserError(f"the teacher's outputs lack {sorted(missing)}: compute them again")
    clock = Clock(checkpoint_seconds if output_dir else None, progress)
    with contextlib.ExitStack() as stack:
        # What a supernet's losses reach changes with its genes: nothing is frozen for good.
        probe = None if genes else cache.batch(numbers[:3], objective.outputs)
        frozen = stack.enter_context(_frozen(student, objective, probe, freeze))
        folder = output_dir or stack.enter_context(TemporaryDirectory(prefix="fastffn-"))
        args = one_device(
            TrainingArguments(
                output_dir=str(folder),
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type=schedule,
                warmup_steps=round(warmup * steps),
                weight_decay=weight_decay,
                optim="adamw_torch_fused",
                logging_strategy="steps",
                logging_steps=max(1, steps // CURVE_POINTS),
                save_strategy="no",  # `Clock` asks for checkpoints
                save_total_limit=2,
                seed=seed,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                use_cpu=next(student.parameters()).device.type == "cpu",
                disable_tqdm=True,
                report_to="none",
            )
        )
        trainer = DistilTrainer(student, args, clock, cache, objective, numbers, genes)
        trainer.run(output_dir, resume)
    student.eval()
    return TrainResult(trainer.curve(), clock.seconds(), frozen)


@contextlib.contextmanager
def _frozen(
    student: nn.Module,
    objective: Objective,
    probe: dict[str, Tensor] | None,
    prefixes: Sequence[str],
) -> Iterator[list[str]]:
    """Freezes what was asked for and what no loss reaches; yields the names of the latter.

    Processes that train together would wait for gradients that never come. What is reached depends
    on objective and genes, so autograd is asked, on the batch `probe` (None: not asked).
    """
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    chosen = {name for name in parameters if name.startswith(tuple(prefixes))}
    unreached: list[str] = []
    try:
        for name in chosen:
            parameters[name].requires_grad_(False)
        if probe is not None:
            unreached = _unreached(student, objective, probe)
            for name in unreached:
                parameters[name].requires_grad_(False)
        if unreached:
            logger.info("not reached by the losses, frozen: %s", ", ".join(unreached))
        yield unreached
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def _unreached(student: nn.Module, objective: Objective, batch: dict[str, Tensor]) -> list[str]:
    """Names of the trainable parameters that get no gradient on this batch."""
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    device = next(student.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    total = objective.losses(student, batch)["total"]
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return [name for name, grad in zip(trained, gradients, strict=True) if grad is None]
