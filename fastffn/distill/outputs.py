"""A model's outputs over a fixed set of sequences, computed once and read back as batches.

    cache = OutputCache.open_or_compute(
        directory, fingerprint, lengths, {"hidden.3": (True, 384), "logits": (False, 2)}, forward
    )
    cache.batch([4, 0, 7])["hidden.3"]     # float32 [3, length, 384], zeros at padding

Several stages, students and epochs read the same outputs of the same teacher; its forward is most
of a step's time. So they are computed once and kept without padding as flat arrays on disk, in half
precision but where float32 is asked for, one file for each output; the operating system maps them
into memory as they are read. `output_files.py` says what lies there and how a killed run, a cut
file or another teacher is told from a whole cache. A killed run is continued; by the same batches
that gives the same bits.

Why not one array with all columns: a stage that reads one output would page in the rest. Why not
compressed files: a batch reads rows here and there, and half-precision activations hardly shrink.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastffn.distill.output_files import (
    OFFSETS,
    Output,
    OutputFiles,
    array_path,
    of_another_size,
    read_index,
)
from fastffn.errors import UserError

Forward = Callable[[np.ndarray], Mapping[str, Tensor]]
Progress = Callable[[int, int], None]


class OutputCache:
    """Reads a cache; `open_or_compute` makes it. It pickles by its directory.

    Attributes:
        directory: where it lies.
        fingerprint: of all that the outputs depend on, the lengths and their shapes too.
        outputs: name -> `Output`, what is stored.
        offsets: int64 [sequences + 1], `lengths`: int64 [sequences], in tokens.
        beside: name -> array, what was given to be kept beside the outputs; read-only.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        index = read_index(self.directory)
        if index is None or index["seals"] is None:
            raise UserError(f"{directory} holds no teacher outputs: compute them first")
        if odd := of_another_size(self.directory, index):
            raise UserError(f"{odd} was cut or altered: compute the teacher outputs again")
        self.fingerprint: str = index["fingerprint"]
        self.outputs = {name: Output(*output) for name, output in index["outputs"].items()}
        arrays = {  # as plain arrays: a slice of a memmap costs ten times that of an array
            name: np.asarray(np.load(array_path(self.directory, name), "r", allow_pickle=False))
            for name in index["sizes"]
        }
        self.offsets = np.array(arrays[OFFSETS])
        self.lengths = np.diff(self.offsets)
        self.beside = {name: arrays[name] for name in index["beside"]}
        self._arrays = {name: arrays[name] for name in self.outputs}

    @classmethod
    def open_or_compute(
        cls,
        directory: str | Path,
        fingerprint: str,
        lengths: np.ndarray,
        outputs: Mapping[str, Output | tuple],
        forward: Forward,
        *,
        beside: Mapping[str, np.ndarray] | None = None,
        tokens_per_batch: int = 4096,
        progress: Progress | None = None,
        save_seconds: float = 60,
    ) -> "OutputCache":
        """Opens the directory's cache if it was made of the same; computes or completes it if not.

        Several processes may call it for one directory: one computes, the others wait for it.

        Args:
            fingerprint: of what `forward` depends on: the model (`model_fingerprint`) and the
                sequences, but neither lengths nor outputs, which are added.
            lengths: tokens of each sequence, [sequences].
            outputs: name -> (by_token, width) or `Output`. Names are letters, digits and "._-".
            forward: numbers of some sequences, int64 [batch] -> for each output at least a tensor
                [batch, length, width], real tokens first, or [batch, width]. Longest ones come
                first: what does not fit in memory fails at once. Called in inference mode.
            beside: arrays to be kept with the outputs; they count for the fingerprint.
            tokens_per_batch: tokens, padding included, of one forward.
            progress: called with (tokens done, tokens in all) after each batch.
            save_seconds: how much work, about, a killed run may lose.

        Raises:
            UserError: no sequences, a value that is not finite or beyond half precision, a
                directory that cannot be written to, or too little space in it.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        if not len(lengths):
            raise UserError("no sequences to compute teacher outputs for: give text")
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        outputs = {name: Output(*output) for name, output in outputs.items()}
        given = {OFFSETS: offsets, **(beside or {})}
        files = OutputFiles(Path(directory), fingerprint, outputs, given)
        if not files.is_whole():
            with files.alone():
                if not files.is_whole():  # else another process has made it meanwhile
                    _compute(files, lengths, forward, tokens_per_batch, progress, save_seconds)
        return cls(directory)

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self):
        return OutputCache, (self.directory,)  # workers map the files themselves

    def batch(
        self, numbers: Sequence[int], outputs: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Reads some sequences, padded to the longest of them.

        Args:
            numbers: which, in the batch's order.
            outputs: which outputs; None: all that are stored.

        Returns:
            name -> float32 [batch, length, width] with zeros at padding, [batch, width] of an
            output by sequence.
        """
        outputs = tuple(self.outputs) if outputs is None else outputs
        if unknown := set(outputs) - set(self.outputs):
            raise UserError(
                f"the cache has no {sorted(unknown)}: it holds {', '.join(self.outputs)}"
            )
        numbers = np.asarray(numbers, dtype=np.int64)
        if numbers.min(initial=0) < 0:
            raise IndexError(f"sequence {numbers.min()} does not exist")
        batch = {}
        for name in outputs:
            array = self._arrays[name]
            by_token = self.outputs[name].by_token
            rows = padded(array, self.offsets, numbers) if by_token else array[numbers]
            batch[name] = torch.from_numpy(rows).float()
        return batch


def padded(flat: np.ndarray, offsets: np.ndarray, numbers: np.ndarray, fill=0) -> np.ndarray:
    """Some sequences of a flat array [tokens, ...] as [batch, length, ...]; `fill` at padding."""
    starts, ends = offsets[numbers], offsets[numbers + 1]
    length = (ends - starts).max(initial=0)
    rows = np.full((len(numbers), length, *flat.shape[1:]), fill, flat.dtype)
    for row, start, end in zip(rows, starts, ends, strict=True):
        row[: end - start] = flat[start:end]
    return rows


def real_tokens(lengths: np.ndarray) -> Tensor:
    """Where `padded` puts tokens: bool [batch, length]."""
    return torch.from_numpy(np.arange(lengths.max(initial=0)) < lengths[:, None])


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a Hugging Face model's configuration and weights, saved and loaded or not."""
    config = model.config.to_dict()
    for key in ("transformers_version", "_name_or_path", "architectures", "dtype"):
        config.pop(key, None)  # where it lay and who wrote it; types are the weights'
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _compute(
    files: OutputFiles,
    lengths: np.ndarray,
    forward: Forward,
    tokens_per_batch: int,
    progress: Progress | None,
    save_seconds: float,
) -> None:
    """Computes what is not there yet; all of it is on the disk when it returns."""
    done = files.done()
    if done is None:
        files.start()
        done = 0
    arrays = files.arrays()
    order = np.argsort(-lengths, kind="stable")
    tokens, total = int(lengths[order[:done]].sum()), int(lengths.sum())
    saved = time.monotonic()
    while done < len(order):
        size = max(1, tokens_per_batch // max(1, int(lengths[order[done]])))
        numbers = order[done : done + size]
        with torch.inference_mode():
            results = forward(numbers)
            for name, array in arrays.items():
                rows = _rows(results[name], name, files.outputs[name], lengths[numbers])
                if files.outputs[name].by_token:
                    _put(array, files.given[OFFSETS], numbers, rows)
                else:
                    array[numbers] = rows
        done += len(numbers)
        tokens += int(lengths[numbers].sum())
        if progress:
            progress(tokens, total)
        if time.monotonic() - saved >= save_seconds:
            files.save(done, arrays)
            saved = time.monotonic()
    files.save(done, arrays, seal=True)


def _rows(values: Tensor, name: str, output: Output, lengths: np.ndarray) -> np.ndarray:
    """What is kept of a result: [real tokens, width] or [batch, width]."""
    real = real_tokens(lengths)
    shape = (*real.shape, output.width) if output.by_token else (len(lengths), output.width)
    if output.by_token and values.dim() == 3:
        values = values[:, : real.shape[1]]  # may be padded further
    if values.shape != shape:
        raise ValueError(f"forward gave {name} as {tuple(values.shape)}, expected {shape}")
    if output.by_token:
        values = values[real.to(values.device)]
    values = values.to(getattr(torch, output.dtype))
    if not values.isfinite().all():
        what = "is not finite: check its weights"
        if output.dtype == "float16":
            what = (
                "does not fit half precision (above 65504, or not a number): "
                "leave this layer out or check its weights"
            )
        raise UserError(f"the teacher's {name} {what}")
    return values.cpu().numpy()


def _put(array: np.ndarray, offsets: np.ndarray, numbers: np.ndarray, rows: np.ndarray) -> None:
    """The inverse of `padded`, from rows [real tokens, width]."""
    done = 0
    for start, end in zip(offsets[numbers], offsets[numbers + 1], strict=True):
        array[start:end] = rows[done : done + end - start]
        done += end - start
