"""A teacher's hidden states, relations and sentence vectors over a corpus, kept on disk.

Distillation runs several phases and baselines over the same text; the teacher's forward is most of
a step's time and its outputs never change. `outputs.py` keeps them; here is what they are:

    hidden_<k>    [tokens, width]     output of layer k; 0: of the embeddings
    q, k, v       [tokens, width]     projections of one layer, heads side by side
    vector        [sentences, width]  unit sentence vectors

and beside them the input ids of all sentences and the id of padding. The fingerprint covers
weights, configuration, token ids (thereby tokenizer, texts and length), layers and pooling.

Why not recompute: at 10,000 sentences and four epochs the forward alone is minutes on a laptop.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastffn.distill.capture import capture
from fastffn.distill.outputs import Output, OutputCache, model_fingerprint, padded, real_tokens
from fastffn.distill.teacher import Teacher, sentence_vectors
from fastffn.errors import UserError
from fastffn.models.architectures import Encoder

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
        self._cache = OutputCache(directory)
        self.lengths, self.fingerprint = self._cache.lengths, self._cache.fingerprint
        self.outputs: tuple[str, ...] = tuple(self._cache.outputs)
        self.pad_token_id = int(self._cache.beside["pad_token_id"])

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
        outputs = _TeacherOutputs(
            teacher,
            *_tokenise(teacher.tokenizer, sentences, max_length),
            hidden_layers=sorted({_layer(k, count + 1) for k in hidden_layers}),
            relation_layer=None if relation_layer is None else _layer(relation_layer, count),
        )
        OutputCache.open_or_compute(
            directory,
            outputs.fingerprint(),
            np.diff(outputs.offsets),
            outputs.shapes(),
            outputs.forward,
            beside={
                "tokens": outputs.tokens,
                "pad_token_id": np.array(teacher.tokenizer.pad_token_id),
            },
            tokens_per_batch=tokens_per_batch,
            progress=progress,
        )
        return cls(directory)

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self):
        return TeacherCache, (self.directory,)  # workers map the files themselves

    def vectors(self, indices: Sequence[int]) -> Tensor:
        """The teacher's sentence vectors, float32 [sentences, width]."""
        return self._cache.batch(indices, ("vector",))["vector"]

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
        values = self._cache.batch(indices, outputs)
        tokens, offsets = self._cache.beside["tokens"], self._cache.offsets
        input_ids, real = _inputs(tokens, offsets, indices, self.pad_token_id)
        return {
            "input_ids": input_ids,
            "attention_mask": real.long(),
            **{f"teacher_{name}": value for name, value in values.items()},
        }


@dataclass(frozen=True)
class _TeacherOutputs:
    """What is computed from what."""

    teacher: Teacher
    tokens: np.ndarray
    offsets: np.ndarray
    hidden_layers: list[int]
    relation_layer: int | None

    def shapes(self) -> dict[str, Output]:
        width = self.teacher.model.config.hidden_size
        related = () if self.relation_layer is None else _RELATED
        names = [*(f"hidden_{k}" for k in self.hidden_layers), *related]
        return {**dict.fromkeys(names, Output(True, width)), "vector": Output(False, width)}

    def fingerprint(self) -> str:
        chosen = [self.hidden_layers, self.relation_layer, self.teacher.pooling]
        return json.dumps([*chosen, model_fingerprint(self.teacher.model)])

    def forward(self, numbers: np.ndarray) -> dict[str, Tensor]:
        model, pad_token_id = self.teacher.model, self.teacher.tokenizer.pad_token_id
        input_ids, real = _inputs(self.tokens, self.offsets, numbers, pad_token_id)
        input_ids, real = input_ids.to(model.device), real.to(model.device)
        relations = contextlib.nullcontext({})
        if self.relation_layer is not None:
            relations = capture(model, self.relation_layer, _RELATED)
        with relations as states:
            hidden = model(
                input_ids=input_ids, attention_mask=real.long(), output_hidden_states=True
            ).hidden_states
        kept = {f"hidden_{k}": hidden[k] for k in self.hidden_layers}
        vectors = sentence_vectors(hidden[-1], real, self.teacher.pooling)
        return {**kept, **states, "vector": vectors}


def _inputs(
    tokens: np.ndarray, offsets: np.ndarray, numbers: Sequence[int], pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Input ids int64 [batch, length], and where tokens are, bool [batch, length]."""
    numbers = np.asarray(numbers, dtype=np.int64)
    input_ids = padded(tokens, offsets, numbers, pad_token_id)
    real = real_tokens(offsets[numbers + 1] - offsets[numbers])
    return torch.from_numpy(input_ids).long(), real


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
