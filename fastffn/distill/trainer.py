"""Trains a student against cached teacher outputs, on the Hugging Face Trainer.

    result = distil(student, cache, objective, steps=500)

The Trainer brings what one should not write again: devices, several processes, clipping, schedules
and checkpoints. Added here are the objective, batches of sentences of like length in an order that
a resumed run repeats, checkpoints by the clock instead of by steps, and a curve of every loss.

A checkpoint counts when its trainer_state.json, which is written last, can be read: whatever the
moment a run is killed, the newest whole one is used. Weights are safetensors, the optimiser's state
is read with weights_only=True, and training_args.bin, which is a pickle, is not written at all.
"""

import contextlib
import gc
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fastffn.distill.batches import CacheCollator, LengthSampler, SentenceNumbers
from fastffn.distill.cache import TeacherCache
from fastffn.distill.objective import Objective
from fastffn.errors import UserError
from fastffn.expr import Gene

logger = logging.getLogger(__name__)

_CURVE_POINTS = 100  # of one training run; each is a mean over the steps since the last
_STATE = "trainer_state.json"


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


class DistilTrainer(Trainer):
    """A Trainer whose loss is an `Objective` and whose data are a `TeacherCache`.

    Args:
        model: the student.
        args: with remove_unused_columns=False.
        cache: the teacher's outputs.
        objective: the losses.
        numbers: which sentences to train on.
        genes: for a supernet, what it runs at a step: called with the number of the step.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        cache: TeacherCache,
        objective: Objective,
        numbers: np.ndarray,
        genes: Callable[[int], Sequence[Gene | str]] | None = None,
        **options,
    ):
        super().__init__(
            model,
            args,
            data_collator=CacheCollator(cache, objective.outputs),
            train_dataset=Subset(SentenceNumbers(len(cache)), numbers),
            **options,
        )
        self.objective, self.genes = objective, genes
        self.loss_is_scaled_for_ga = False
        self._lengths = cache.lengths[numbers]
        self._sums: dict[str, Tensor] = {}
        self._summed = 0

    def _get_train_sampler(self, train_dataset=None) -> LengthSampler:
        return LengthSampler(self._lengths, self.args.train_batch_size, seed=self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.genes is not None:
            self.model.set_genes(self.genes(self.state.global_step))
        losses = self.objective.losses(model, inputs)
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._summed += 1
        return (losses["total"], losses) if return_outputs else losses["total"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._summed:  # means of the unweighted parts beside the Trainer's own figures
            parts = {name: float(value) / self._summed for name, value in self._sums.items()}
            logs = {**logs, "parts": parts}
            self._sums, self._summed = {}, 0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)


class _Clock(TrainerCallback):
    """Asks for checkpoints by the clock, reports progress, and adds up seconds over resumptions."""

    def __init__(self, every: float | None, progress: Callable[[int, int], None] | None):
        self.every, self.progress = every, progress
        self.before = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = next(
            (entry["clock"] for entry in reversed(state.log_history) if "clock" in entry), 0.0
        )
        self.start = self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        if self.progress:
            self.progress(state.global_step, state.max_steps)
        if self.every is not None and now - self.saved >= self.every:
            self.saved = now
            control.should_save = state.global_step < state.max_steps
            if control.should_save:
                state.log_history.append({"clock": self.seconds(), "step": state.global_step})

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start


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
    clock = _Clock(checkpoint_seconds if output_dir else None, progress)
    with contextlib.ExitStack() as stack:
        # What a supernet's losses reach changes with its genes: nothing is frozen for good.
        probe = None if genes else cache.batch(numbers[:3], objective.outputs)
        frozen = stack.enter_context(_frozen(student, objective, probe, freeze))
        folder = output_dir or stack.enter_context(TemporaryDirectory(prefix="fastffn-"))
        args = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=round(warmup * steps),
            weight_decay=weight_decay,
            optim="adamw_torch_fused",
            logging_strategy="steps",
            logging_steps=max(1, steps // _CURVE_POINTS),
            save_strategy="no",  # `_Clock` asks for checkpoints
            save_total_limit=2,
            seed=seed,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=next(student.parameters()).device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
        )
        trainer = DistilTrainer(student, args, cache, objective, numbers, genes, callbacks=[clock])
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        checkpoint = None
        if output_dir:
            checkpoint = last_checkpoint(output_dir) if resume else None
            remove_checkpoints(output_dir, keep=checkpoint)
        stack.enter_context(_libraries_kept())
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    student.eval()
    curve = [
        [entry["step"], entry["loss"], _rounded(entry.get("parts", {}))]
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return TrainResult(curve, clock.seconds(), frozen)


def last_checkpoint(directory: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    whole = [path for path in Path(directory).glob("checkpoint-*") if _is_whole(path)]
    return max(whole, key=_step, default=None)


def remove_checkpoints(directory: str | Path, keep: Path | None = None) -> None:
    """Removes all checkpoints but one, those of an interrupted save too."""
    for path in Path(directory).glob("checkpoint-*"):
        if path != keep:
            shutil.rmtree(path)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return state["global_step"] == _step(checkpoint)


def _rounded(parts: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in parts.items() if name != "total"}


@contextlib.contextmanager
def _libraries_kept() -> Iterator[None]:
    """Sets what exists aside from garbage collection for the block.

    The Trainer collects at its start: over everything that was ever imported this takes 0.4 s, for
    a candidate of the search as long as its training.
    """
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


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
