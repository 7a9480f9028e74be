"""A teacher's outputs, computed once over a corpus and read back as batches.

Distillation runs several phases and baselines over the same text; the teacher's forward is most of
a step's time and its outputs never change. So they are computed once, without padding, and kept as
flat half-precision arrays on disk, which the operating system maps into memory as they are read:

    tokens.npy        int32    [tokens]           input ids of all sentences, one after another
    offsets.npy       int64    [sentences + 1]    sentence i is tokens[offsets[i] : offsets[i + 1]]
    hidden_<k>.npy    float16  [tokens, width]    output of layer k; 0: of the embeddings
    q, k, v.npy       float16  [tokens, width]    projections of one layer, heads side by side
    vector.npy        float16  [sentences, width] unit sentence vectors
    index.json                                    shapes, and the fingerprint of what made them

The index is written last and removed first: whatever the moment a run is killed, a directory has
either a whole cache or none. The fingerprint covers weights, configuration, token ids (thereby
tokenizer, texts and length), layers and pooling.

Why not one array with all columns: a phase that reads hidden states alone would page in the rest.
Why not recompute: at 10,000 sentences and four epochs the forward alone is minutes on a laptop.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastffn.distill.architectures import Encoder
from fastffn.distill.capture import capture
from fastffn.distill.teacher import Teacher, sentence_vectors
from fastffn.errors import UserError
from fastffn.files import write_text_atomic

_FORMAT = 1
_RELATED = ("q", "k", "v")


class TeacherCache:
    """Reads a cache; `open_or_compute` makes it. Sentences are numbered as they were given.

    Attributes:
        lengths: tokens of each sentence, int64 [sentences].
        outputs: names of what is stored: "hidden_0", ..., "q", "k", "v", "vector".
        pad_token_id: what `batch` fills input ids with.
        fingerprint: of all that the outputs depend on, the teacher's weights and the text too.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        index = _read_index(self.directory)
        if index is None:
            raise UserError(f"{directory} holds no teacher outputs: compute them first")
        self.outputs: tuple[str, ...] = tuple(index["outputs"])
        self.pad_token_id: int = index["pad_token_id"]
        self.fingerprint: str = index["fingerprint"]
        names = ("tokens", "offsets", *self.outputs)
        self._arrays = {
            name: np.load(self.directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in names
        }
        self._offsets = np.array(self._arrays["offsets"])
        self.lengths = np.diff(self._offsets)

    @classmethod
    def open_or_compute(
        cls,
        directory: str | Path,
        teacher: Teacher,
        sentences: Sequence[str],
        *,
        hidden_layers: Iterable[int],
        relation_layer: int | None = -1,
        max_length: int = 128,
        tokens_per_batch: int = 4096,
        progress: Callable[[int, int], None] | None = None,
    ) -> "TeacherCache":
        """Opens the directory's cache if it was made of the same; computes it otherwise.

        Args:
            teacher: as `load_teacher` gives it; runs where its parameters are.
            sentences: the corpus; longer ones are cut to `max_length` tokens.
            hidden_layers: which hidden states to keep: 0 the embeddings' output, k that of layer
                k counted from 1, negative ones from the end.
            relation_layer: whose q, k, v to keep, counted from 0; None: none.
            tokens_per_batch: tokens, padding included, of one teacher forward.
            progress: called with (tokens done, tokens in all) after each batch.

        Raises:
            UserError: no sentences, a layer that is not there, outputs beyond half precision, or
                too little disk space.
        """
        if not sentences:
            raise UserError("no sentences to compute teacher outputs for: give text")
        count = len(Encoder(teacher.model).layers)
        work = _Work(
            teacher,
            *_tokenise(teacher.tokenizer, sentences, max_length),
            hidden_layers=sorted({_layer(k, count + 1) for k in hidden_layers}),
            relation_layer=None if relation_layer is None else _layer(relation_layer, count),
        )
        directory, fingerprint = Path(directory), work.fingerprint()
        index = _read_index(directory)
        if index is None or index["fingerprint"] != fingerprint:
            (directory / "index.json").unlink(missing_ok=True)
            work.compute(directory, tokens_per_batch, progress)
            index = {
                "format": _FORMAT,
                "fingerprint": fingerprint,
                "outputs": list(work.shapes()),
                "pad_token_id": teacher.tokenizer.pad_token_id,
            }
            write_text_atomic(directory / "index.json", json.dumps(index, indent=1) + "\n")
        return cls(directory)

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self):
        return TeacherCache, (self.directory,)  # workers map the files themselves

    def vectors(self, indices: Sequence[int]) -> Tensor:
        """The teacher's sentence vectors, float32 [sentences, width]."""
        rows = self._arrays["vector"][np.asarray(indices, dtype=np.int64)]
        return torch.from_numpy(rows).float()

    def batch(
        self, indices: Sequence[int], outputs: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Pads the sentences to the longest of them.

        Args:
            indices: which sentences, in the batch's order.
            outputs: which teacher outputs, None: all that are stored.

        Returns:
            input_ids, attention_mask (int64 [batch, length]) and, in float32, for each output
            teacher_<output>: [batch, length, width] with zeros at padding, [batch, width] for
            "vector".
        """
        outputs = self.outputs if outputs is None else outputs
        if unknown := set(outputs) - set(self.outputs):
            raise UserError(
                f"the cache has no {sorted(unknown)}: it holds {', '.join(self.outputs)}"
            )
        indices = np.asarray(indices, dtype=np.int64)
        rows, real = _padded_rows(self._offsets, indices)
        input_ids = _padded_ids(self._arrays["tokens"][rows], real, self.pad_token_id)
        batch = {"input_ids": input_ids, "attention_mask": real.long()}
        for name in outputs:
            if name == "vector":
                values = torch.from_numpy(self._arrays[name][indices]).float()
            else:
                flat = torch.from_numpy(self._arrays[name][rows])
                values = torch.zeros(*real.shape, flat.shape[-1])
                values[real] = flat.float()
            batch[f"teacher_{name}"] = values
        return batch


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is computed from what: everything that the fingerprint must cover."""

    teacher: Teacher
    tokens: np.ndarray
    offsets: np.ndarray
    hidden_layers: list[int]
    relation_layer: int | None

    def shapes(self) -> dict[str, tuple[int, int]]:
        width = self.teacher.model.config.hidden_size
        related = () if self.relation_layer is None else _RELATED
        names = [*(f"hidden_{k}" for k in self.hidden_layers), *related]
        by_token = dict.fromkeys(names, (len(self.tokens), width))
        return {**by_token, "vector": (len(self.offsets) - 1, width)}

    def fingerprint(self) -> str:
        model = self.teacher.model
        config = model.config.to_dict()
        for key in ("transformers_version", "_name_or_path"):  # where it lay is not what it is
            config.pop(key, None)
        chosen = [_FORMAT, config, self.hidden_layers, self.relation_layer, self.teacher.pooling]
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        digest.update(self.tokens)
        digest.update(self.offsets)
        return digest.hexdigest()

    def compute(
        self,
        directory: Path,
        tokens_per_batch: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Writes all arrays and sees them on the disk."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays = self._make_room(directory)
        np.save(directory / "tokens.npy", self.tokens)
        np.save(directory / "offsets.npy", self.offsets)
        pad = self.teacher.tokenizer.pad_token_id
        done = 0
        for batch in _length_batches(np.diff(self.offsets), tokens_per_batch):
            rows, real = _padded_rows(self.offsets, batch)
            outputs = self._forward(_padded_ids(self.tokens[rows], real, pad), real)
            for name, values in outputs.items():
                arrays[name][batch if name == "vector" else rows] = _half(values, name)
            done += len(rows)
            if progress:
                progress(done, len(self.tokens))
        for array in arrays.values():
            array.flush()
        for name in ("tokens", "offsets", *arrays):
            with (directory / f"{name}.npy").open("rb") as file:
                os.fsync(file.fileno())

    def _make_room(self, directory: Path) -> dict[str, np.ndarray]:
        paths = {name: directory / f"{name}.npy" for name in self.shapes()}
        for path in paths.values():
            path.unlink(missing_ok=True)  # an older cache's, perhaps mapped elsewhere
        needed = sum(2 * rows * columns for rows, columns in self.shapes().values())
        free = shutil.disk_usage(directory).free
        if free < 1.05 * needed:
            raise UserError(
                f"teacher outputs need {needed / 2**30:.1f} GiB in {directory}, "
                f"{free / 2**30:.1f} GiB are free: make room, or use less text or fewer layers"
            )
        return {
            name: np.lib.format.open_memmap(paths[name], "w+", np.float16, shape)
            for name, shape in self.shapes().items()
        }

    @torch.inference_mode()
    def _forward(self, input_ids: Tensor, real: Tensor) -> dict[str, Tensor]:
        """The outputs at real tokens: [real tokens, width]; "vector": [batch, width]."""
        model = self.teacher.model
        input_ids, real = input_ids.to(model.device), real.to(model.device)
        relations = contextlib.nullcontext({})
        if self.relation_layer is not None:
            relations = capture(model, self.relation_layer, _RELATED)
        with relations as states:
            hidden = model(
                input_ids=input_ids, attention_mask=real.long(), output_hidden_states=True
            ).hidden_states
        kept = {f"hidden_{k}": hidden[k] for k in self.hidden_layers} | states
        outputs = {name: values[real] for name, values in kept.items()}
        return {**outputs, "vector": sentence_vectors(hidden[-1], real, self.teacher.pooling)}


def _length_batches(lengths: np.ndarray, tokens_per_batch: int) -> Iterator[np.ndarray]:
    """Sentence numbers in batches of at most so many tokens with padding.

    Longest first: what does not fit in memory fails at once.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, tokens_per_batch // max(1, int(lengths[order[start]])))
        yield order[start : start + size]
        start += size


def _padded_rows(offsets: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Rows of the flat arrays [real tokens], and where they go: bool [batch, length]."""
    lengths = offsets[indices + 1] - offsets[indices]
    columns = np.arange(lengths.max(initial=0))
    real = columns < lengths[:, None]
    return (offsets[indices][:, None] + columns)[real], torch.from_numpy(real)


def _padded_ids(tokens: np.ndarray, real: Tensor, pad_token_id: int) -> Tensor:
    input_ids = torch.full(real.shape, pad_token_id)
    input_ids[real] = torch.from_numpy(tokens).long()
    return input_ids


def _layer(layer: int, count: int) -> int:
    if not -count <= layer < count:
        raise UserError(f"teacher layer {layer} does not exist: choose from 0 to {count - 1}")
    return layer % count


def _tokenise(tokenizer, sentences, max_length) -> tuple[np.ndarray, np.ndarray]:
    ids = tokenizer(
        list(sentences),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return np.concatenate([np.asarray(sentence, dtype=np.int32) for sentence in ids]), offsets


def _read_index(directory: Path) -> dict | None:
    try:
        index = json.loads((directory / "index.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return index if index.get("format") == _FORMAT else None


def _half(values: Tensor, name: str) -> np.ndarray:
    values = values.half()
    if not values.isfinite().all():
        raise UserError(
            f"the teacher's {name} does not fit half precision (above 65504, or not a number): "
            "leave this layer out or check its weights"
        )
    return values.cpu().numpy()
