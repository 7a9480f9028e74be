"""A Hugging Face Trainer whose runs can be killed at any moment and end with the same bits.

The Trainer brings devices, several processes, mixed precision, accumulation, clipping, schedules
and checkpoints. Added here, for every training of fastffn:

- an order of the data that is a function of (seed, epoch) alone (`LengthSampler`);
- checkpoints by the clock instead of by steps, sealed with digests (`checkpoints.py`). Weights are
  safetensors, the optimiser's state is read with weights_only=True, and training_args.bin, which is
  a pickle, is not written at all;
- a curve of every part of the loss.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import Tensor, distributed
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fastffn.distill.batches import LengthSampler
from fastffn.distill.checkpoints import last_checkpoint, remove_checkpoints, seal
from fastffn.errors import UserError

_PART = "part/"  # before the name of a part in the Trainer's log
CURVE_POINTS = 100  # of one training run; each is a mean over the steps since the last


class ResumableTrainer(Trainer):
    """See above. A subclass computes the loss and hands its parts to `note`.

    Args:
        sampler: the order of the training examples.
        clock: asks for checkpoints.
        options: as `Trainer`; `args` with remove_unused_columns=False and save_strategy="no".
    """

    def __init__(self, *, sampler: LengthSampler, clock: "Clock", **options):
        super().__init__(callbacks=[clock, *options.pop("callbacks", ())], **options)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError(
                "sharded training (FSDP, DeepSpeed) is not supported: start with torchrun, which "
                "gives each device the whole model"
            )
        self.losses_are_means_of_pieces(True)
        self.sampler, self.clock = sampler, clock
        self._sums: dict[str, Tensor | float] = {}
        self._summed = 0

    def losses_are_means_of_pieces(self, means: bool) -> None:
        """Says to the Trainer whether it must divide a piece's loss by the number of pieces, in the
        two ways that versions of transformers ask."""
        self.loss_is_scaled_for_ga = not means
        self.model_accepts_loss_kwargs = not means

    def run(self, folder: str | Path | None = None, resume: bool = True) -> None:
        """Trains, from the newest whole checkpoint of `folder` if there is one and `resume`.

        Other checkpoints there are removed.
        """
        checkpoint = None
        if folder is not None:
            checkpoint = last_checkpoint(folder) if resume else None
            _everyone(self.args.world_size)  # nobody looks while the first process removes
            if self.is_world_process_zero():
                remove_checkpoints(folder, keep=checkpoint)
        with _libraries_kept():
            self.train(resume_from_checkpoint=checkpoint and str(checkpoint))

    def note(self, parts: dict[str, Tensor | float]) -> None:
        """Adds the parts of one step's loss to what the next point of the curve is the mean of."""
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._summed += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._summed:
            logs = {**logs, **self._means()}
        super().log(logs, start_time)

    def _means(self) -> dict[str, float]:
        """Of the parts since the last point of the curve, over all processes."""
        means = {name: value / self._summed for name, value in self._sums.items()}
        self._sums, self._summed = {}, 0
        if self.args.world_size > 1:
            values = [torch.as_tensor(x, dtype=torch.float64) for x in means.values()]
            summed = torch.stack([x.to(self.args.device) for x in values])
            distributed.all_reduce(summed)
            means = dict(zip(means, summed / self.args.world_size, strict=True))
        return {_PART + name: round(float(x), 6) for name, x in means.items() if name != "total"}

    def curve(self) -> list[list]:
        """[[step, loss, {part: value}], ...]."""
        return [
            [entry["step"], entry["loss"], _parts(entry)]
            for entry in self.state.log_history
            if "loss" in entry
        ]

    def _get_train_sampler(self, train_dataset=None) -> LengthSampler:
        return self.sampler

    def _run_epoch(self, *, epoch: int, **options):
        # Told here: through the wrappers of a resumed, distributed loader it would not arrive.
        self.sampler.set_epoch(epoch)
        return super()._run_epoch(epoch=epoch, **options)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        path = Path(output_dir or self.args.output_dir)
        path.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(path / "model.safetensors"), metadata={"format": "pt"})

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        _everyone(self.args.world_size)  # each process has written its share
        if self.args.should_save:
            seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")


class Clock(TrainerCallback):
    """Asks for checkpoints by the clock, reports progress, and adds up seconds over resumptions.

    Args:
        every: seconds between checkpoints; None: none.
        progress: called with (steps done, steps) after each step.
    """

    def __init__(self, every: float | None, progress: Callable[[int, int], None] | None):
        self.every, self.progress = every, progress
        self.before = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = next(
            (entry["clock"] for entry in reversed(state.log_history) if "clock" in entry), 0.0
        )
        self.start = self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.progress:
            self.progress(state.global_step, state.max_steps)
        if self.every is None or state.global_step >= state.max_steps:
            return
        due = time.monotonic() - self.saved >= self.every
        if args.world_size > 1:  # all save or none: the first process's clock decides
            said = torch.tensor(int(due), device=args.device)
            distributed.broadcast(said, 0)
            due = bool(said)
        if due:
            self.saved = time.monotonic()
            control.should_save = True
            state.log_history.append({"clock": self.seconds(), "step": state.global_step})

    def seconds(self) -> float:
        """Of the training until now, including those before an interruption."""
        return self.before + time.monotonic() - self.start


def one_device(args: TrainingArguments) -> TrainingArguments:
    """Makes the Trainer use one device in this process, and no DataParallel over all it sees.

    That would multiply the batch and run replicas, of which nothing can be captured; torchrun is
    the way to more devices.
    """
    args.device  # noqa: B018 - counts the devices when first asked for
    args._n_gpu = min(args._n_gpu, 1)
    return args


def _everyone(processes: int) -> None:
    if processes > 1:
        distributed.barrier()


def _parts(entry: dict[str, float]) -> dict[str, float]:
    """The parts of the loss in an entry of the Trainer's log."""
    return {name[len(_PART) :]: x for name, x in entry.items() if name.startswith(_PART)}


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
