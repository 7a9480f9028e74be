"""Trains the students of one stage of a recipe: one teacher pass, all losses.

    trainer = StageTrainer(module, args, teacher=..., data=..., weights={"hidden": 1.0}, ...)
    trainer.run(folder)

On `ResumableTrainer`. Added here:

- **The teacher** runs once per batch, in inference mode and in its own dtype, without the layers
  that no loss reads; or its outputs come from a cache.
- **Exact means.** A step's loss is that of its whole batch however it is cut in pieces, by
  accumulation or over processes: each loss is a mean over examples, tokens or the like
  (`terms.Term.counted`), and pieces weigh as much as they count.
- **Finite losses.** What is not finite stops the run before a checkpoint could hold it.
- **Time by part**: data, teacher, student, loss, backward, optimiser.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, distributed
from transformers import TrainerCallback, TrainingArguments

from fastffn.distill.batches import LengthSampler, SentenceNumbers
from fastffn.distill.checkpoints import last_checkpoint, writing
from fastffn.distill.resumable import Clock, ResumableTrainer
from fastffn.distill.stage_module import StageModule
from fastffn.distill.terms import counts
from fastffn.errors import UserError

_CHECK_EVERY = 10  # steps between looks at the losses on a GPU, each of which waits for it
_SECONDS = "seconds_by_part"  # in the Trainer's log, of a checkpoint
_SHOWN = 8  # examples of a bad batch that a message names


class NotFinite(UserError):
    """A loss or gradient is NaN or infinite."""


class StageTrainer(ResumableTrainer):
    """See above.

    Args:
        module: students and terms.
        args: of the Trainer; `per_device_train_batch_size` is one piece of a batch.
        clock: asks for checkpoints.
        teacher: called with a batch on the device and the numbers of its examples, gives what
            `module.teacher_reads` names; None: no loss needs one.
        data: an `Encoded`: `lengths` and `batch(numbers)`.
        weights: of the losses, by the module's names.
        stage: its name, for messages.
    """

    def __init__(
        self,
        module: StageModule,
        args: TrainingArguments,
        clock: Clock,
        *,
        teacher: Callable[[dict[str, Tensor], list[int]], dict[str, object]] | None,
        data,
        weights: Mapping[str, float],
        stage: str,
    ):
        pieces = args.world_size * args.gradient_accumulation_steps
        seconds: dict[str, float] = {}
        super().__init__(
            model=module,
            args=args,
            clock=clock,
            sampler=LengthSampler(
                data.lengths, args.train_batch_size * pieces, seed=args.seed, whole=True
            ),
            data_collator=_Collator(data),
            train_dataset=SentenceNumbers(len(data)),
            callbacks=[_Parts(module, seconds)],
        )
        self.losses_are_means_of_pieces(False)  # but their shares of the whole batch
        self.module, self.teacher, self.stage = module, teacher, stage
        self.weights = dict(weights)
        self.watch = module.watch
        self.watch.device = args.device.type
        self._unchecked: list[tuple[int, list[int], list[str], Tensor]] = []
        self._norms: list[tuple[int, Tensor]] = []
        self.seconds = seconds

    # -- a step --------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Reads the pieces of a batch and counts what they hold, over all processes."""
        with self.watch("data"):
            pieces = list(itertools.islice(epoch_iterator, num_batches))
        if not pieces:
            return pieces, {}
        names = list(pieces[0]["counts"])
        rows = [[piece["counts"][name] for name in names] for piece in pieces]
        summed = torch.tensor(rows, dtype=torch.float64).sum(0)
        longest = torch.tensor(max(piece["attention_mask"].shape[1] for piece in pieces))
        if self.args.world_size > 1:
            summed, longest = summed.to(device), longest.to(device)
            distributed.all_reduce(summed)
            distributed.all_reduce(longest, op=distributed.ReduceOp.MAX)
            totals = dict(zip(names, summed.float(), strict=True))  # no wait for a GPU
        else:
            totals, longest = dict(zip(names, summed.tolist(), strict=True)), int(longest)
        totals["squares"] = totals["examples"] * longest**2  # as if it were padded whole
        return pieces, totals

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        here = inputs.pop("counts")
        numbers = inputs.pop("numbers")
        step = self.state.global_step
        theirs: dict[str, object] = {}
        if self.teacher is not None:
            with self.watch("teacher"):
                theirs = self.teacher(inputs, numbers)
        values = model(inputs, theirs, step)
        processes = self.args.world_size  # over which gradients are averaged
        total = 0.0
        noted = {}
        for name, value in values.items():
            counted = self.module.counted[name]
            share = here[counted] / num_items_in_batch[counted]
            noted[name] = value.detach() * share * processes
            total = total + self.weights[name] * value * (share * processes)
        self.note_piece(noted)
        self._check(step, numbers, values)
        self._backward = self.watch.mark()
        return (total, values) if return_outputs else total

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.since("backward", self._backward)
        return loss

    def note_piece(self, parts: dict[str, Tensor]) -> None:
        """Adds a piece's share to the curve; the step counts once, with its last piece."""
        last = self.accelerator.gradient_state.sync_gradients
        summed = self._summed
        self.note(parts)
        self._summed = summed + int(last)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._check_all()
        self._take_seconds()
        super().log(logs, start_time)

    # -- finite --------------------------------------------------------------------------------

    def _check(self, step: int, numbers: list[int], values: dict[str, Tensor]) -> None:
        found = torch.stack([value.detach().float() for value in values.values()])
        self._unchecked.append((step, numbers, list(values), found))
        if found.device.type == "cpu" or len(self._unchecked) >= _CHECK_EVERY:
            self._check_all()

    def _check_all(self) -> None:
        unchecked, self._unchecked = self._unchecked, []
        norms, self._norms = self._norms, []
        # One transfer for all of a kind: each would wait for the device.
        rows = torch.stack([found for *_, found in unchecked]).tolist() if unchecked else []
        for (step, numbers, names, _), row in zip(unchecked, rows, strict=True):
            for name, value in zip(names, row, strict=True):
                if not abs(value) < float("inf"):
                    shown = ", ".join(map(str, numbers[:_SHOWN]))
                    more = ", ..." if len(numbers) > _SHOWN else ""
                    raise self._not_finite(
                        step, f"loss {name} is {value} on the batch of examples {shown}{more}"
                    )
        found = torch.stack([norm for _, norm in norms]).tolist() if norms else []
        for (step, _), norm in zip(norms, found, strict=True):
            if not abs(norm) < float("inf"):
                raise self._not_finite(step, f"the gradient's norm is {norm}")

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        # Of float16 a gradient overflows now and then; the scaler skips that step.
        if norm is not None and not self.args.fp16:
            self._norms.append((self.state.global_step, norm))
            if norm.device.type == "cpu":
                self._check_all()
        return norm

    def _not_finite(self, step: int, what: str) -> NotFinite:
        kept = last_checkpoint(self.args.output_dir)
        good = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        return NotFinite(
            f"stage {self.stage}, step {step}: {what}; {good}: lower learning_rate or look at "
            "these examples"
        )

    def _save_checkpoint(self, model, trial) -> None:
        self._check_all()
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise self._not_finite(self.state.global_step, f"{name} is not finite")
        self._take_seconds()
        entry = {_SECONDS: dict(self.seconds), "step": self.state.global_step}
        self.state.log_history.append(entry)
        with writing(self.args.output_dir):
            super()._save_checkpoint(model, trial)

    # -- time ----------------------------------------------------------------------------------

    def _take_seconds(self) -> None:
        for part, seconds in self.watch.seconds().items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds


class _Parts(TrainerCallback):
    """The optimiser's time, that of parts before an interruption, and a last point of the curve."""

    def __init__(self, module: StageModule, seconds: dict[str, float]):
        self.module, self.seconds = module, seconds

    def on_train_begin(self, args, state, control, **kwargs):
        before = [entry[_SECONDS] for entry in state.log_history if _SECONDS in entry]
        self.seconds.update(before[-1] if before else {})

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.start = self.module.watch.mark()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.module.watch.since("optimiser", self.start)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step == state.max_steps


class _Collator:
    """Numbers of examples -> a batch, with what it counts: all on the CPU still."""

    def __init__(self, data):
        self.data = data

    def __call__(self, numbers: Sequence[int]) -> dict[str, object]:
        batch = self.data.batch(numbers)
        batch.pop("index", None)
        return {**batch, "numbers": list(numbers), "counts": counts(batch)}
