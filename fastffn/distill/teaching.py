"""What a teacher says to a batch: by running it where it is, or from a cache on disk.

    taught = runner(teacher, reads)                       runs the teacher in inference mode
    taught = cached(teacher, reads, data, directory)      the same; each row is computed once
    theirs = taught(batch, numbers)                       {"hidden.3": [B, T, H], "scores.5": ...}

`reads` are names for `reading.read`; `numbers` says which rows of the data a batch has.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastffn.data.encode import Encoded
from fastffn.distill.capture import Scores
from fastffn.distill.outputs import Output, OutputCache, model_fingerprint
from fastffn.distill.reading import LOGITS, read

Taught = Callable[[dict[str, Tensor], Sequence[int]], dict[str, object]]


def runner(model: nn.Module, reads: Sequence[str]) -> Taught:
    """Runs the teacher on every batch, where its parameters are."""

    @torch.inference_mode()
    def run(batch: dict[str, Tensor], numbers: Sequence[int]) -> dict[str, object]:
        return read(model, batch, reads, stop=True)

    return run


def cached(
    model: nn.Module,
    reads: Sequence[str],
    data: Encoded,
    directory: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Taught:
    """Reads the outputs from a cache, which is made first where there is none.

    Several processes may ask for the same directory: one computes, the others wait for its lock (a
    barrier would run out of time).

    Args:
        model: the teacher, on the device that batches come from.
        data: all rows that batches are made of.
        progress: called with (rows done, rows in all) while the teacher runs.

    Raises:
        UserError: an output that cannot be read, or no room on the disk.
    """
    heads = model.config.num_attention_heads
    stored = [part for name in reads for part in _stored(name)]
    device = next(model.parameters()).device

    @torch.inference_mode()
    def forward(numbers: Sequence[int], names: Sequence[str] = stored) -> dict[str, Tensor]:
        batch = {name: value.to(device) for name, value in data.batch(numbers).items()}
        return read(model, batch, names, stop=True)

    fingerprint = f"{model_fingerprint(model)} {data.fingerprint}"
    forward([0], reads)  # refuses what cannot be read, such as scores that are not q k^T
    outputs = {
        name: Output(by_token=x.dim() == 3, width=x.shape[-1], dtype=_precision(name))
        for name, x in forward([0]).items()
    }
    cache = OutputCache.open_or_compute(
        directory, fingerprint, data.lengths, outputs, forward, progress=progress
    )

    def run(batch: dict[str, Tensor], numbers: Sequence[int]) -> dict[str, object]:
        found = {k: v.to(device) for k, v in cache.batch(numbers, stored).items()}
        for name in reads:
            if name.startswith("scores."):
                layer = name.partition(".")[2]
                found[name] = Scores(found[f"q.{layer}"], found[f"k.{layer}"], heads)
        return found

    return run


def _stored(name: str) -> tuple[str, ...]:
    """What the cache holds for something that is read."""
    what, _, layer = name.partition(".")
    return (f"q.{layer}", f"k.{layer}") if what == "scores" else (name,)


def _precision(name: str) -> str:
    return "float32" if name == LOGITS else "float16"
