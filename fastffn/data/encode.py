"""Token ids of examples and of text: what training and evaluation read in batches.

    encoded = encode_task(tokenizer, data.splits["train"], data.task, 128, train=True)
    encoded.lengths                  # tokens of each row: sort batches by them
    encoded.batch([3, 17, 4])        # padded tensors

Rows lie one after another in flat arrays, without padding: 10 million tokens take 40 MB where lists
of Python integers take a gigabyte. Only `batch` pads, to the longest of its rows.

Why not tokenise in the collator: an epoch would do again what the one before did, and the lengths
that batches are sorted by must be known beforehand.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastffn.data.qa import QaExamples
from fastffn.data.rows import flat_rows, places
from fastffn.data.tasks import Examples, Task
from fastffn.data.text import Document
from fastffn.data.windows import Windows, qa_windows
from fastffn.errors import UserError

_CHUNK = 1000  # texts a call of the tokenizer, whose lists are large


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows.

    Attributes:
        kind: the task's kind, or "text".
        tokens: int32 [tokens], the rows one after another.
        offsets: int64 [rows + 1]: row i is tokens[offsets[i] : offsets[i + 1]].
        types: token types, int8 [tokens]; None where the tokenizer makes none.
        labels: int64 [rows] of classes, float32 [rows] of scores, int64 [rows, 2] of the first and
            last token of an answer (0, 0: none in this window); None of text.
        windows: of qa for evaluation: where each row's tokens lie in its context.
        pad: token id of padding.
        tokenizer: `tokenizer_digest` of what made the tokens.
    """

    kind: str
    tokens: np.ndarray
    offsets: np.ndarray
    types: np.ndarray | None
    labels: np.ndarray | None
    pad: int
    tokenizer: str
    windows: Windows | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that batches are made of, and of the tokenizer."""
        digest = hashlib.sha256(f"{self.kind} {self.pad} {self.tokenizer}".encode())
        for array in (self.tokens, self.offsets, self.types, self.labels):
            if array is None:
                digest.update(b"none")
            else:
                digest.update(f"{array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def take(self, numbers: Sequence[int]) -> "Encoded":
        """The rows of these numbers, in this order; not of windows for evaluation."""
        real, flat = places(self.offsets, np.asarray(numbers, np.int64))
        return dataclasses.replace(
            self,
            tokens=self.tokens[flat],
            offsets=np.concatenate([[0], np.cumsum(real.sum(1))]),
            types=None if self.types is None else self.types[flat],
            labels=None if self.labels is None else self.labels[numbers],
        )

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Rows as tensors, padded at their ends to the longest.

        Returns:
            input_ids, attention_mask, token_type_ids where there are such: int64 [rows, longest];
            labels: int64 or float32 [rows], of qa start_positions and end_positions: int64 [rows];
            index: the numbers, int64 [rows].
        """
        numbers = np.asarray(numbers, np.int64)
        real, flat = places(self.offsets, numbers)

        def padded(values: np.ndarray, padding: int) -> Tensor:
            rows = np.full(real.shape, padding, np.int64)
            rows[real] = values[flat]
            return torch.from_numpy(rows)

        batch = {
            "input_ids": padded(self.tokens, self.pad),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
        }
        if self.types is not None:
            batch["token_type_ids"] = padded(self.types, 0)
        if self.labels is not None:
            labels = torch.from_numpy(self.labels[numbers])
            if self.kind == "qa":
                batch["start_positions"], batch["end_positions"] = labels.unbind(dim=1)
            else:
                batch["labels"] = labels
        batch["index"] = torch.from_numpy(numbers)
        return batch


def tokenizer_digest(tokenizer) -> str:
    """sha256 of a tokenizer's vocabulary and special tokens.

    It is equal for tokenizers that give the same ids to the same tokens, whatever folder or class
    they come from.
    """
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{len(token)} {token} {number}\n".encode("utf-8", "surrogatepass"))
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        digest.update(f"{name} {getattr(tokenizer, f'{name}_token_id', None)}\n".encode())
    return digest.hexdigest()


def encode_task(
    tokenizer, examples: Examples | QaExamples, task: Task, max_length: int, *, train: bool
) -> Encoded:
    """Tokenises a task's examples, one row each; of qa as many windows as a context needs.

    Of a pair too long the longer text is cut; of a single text its end.

    Args:
        max_length: tokens of a row at most, special ones included.
        train: of qa, leave out what only the metric needs.

    Raises:
        UserError: a max_length without room for text, a tokenizer without padding, or a slow one
            for qa.
    """
    _check(tokenizer, max_length, pair=task.kind == "qa" or len(task.texts) == 2)
    if task.kind == "qa":
        rows, labels, windows = qa_windows(tokenizer, examples, max_length)
        return _encoded("qa", tokenizer, rows, labels, None if train else windows)

    def chunks() -> Iterator[dict[str, list[list[int]]]]:
        for start in range(0, len(examples), _CHUNK):
            part = slice(start, start + _CHUNK)
            texts = [examples.first[part]]
            if examples.second is not None:
                texts.append(examples.second[part])
            yield tokenizer(
                *texts,
                truncation="longest_first",
                max_length=max_length,
                return_attention_mask=False,
            )

    labels = np.asarray(examples.labels, np.int64 if task.kind == "classification" else np.float32)
    return _encoded(task.kind, tokenizer, flat_rows(chunks()), labels)


def encode_text(
    tokenizer,
    documents: Sequence[Document],
    max_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> Encoded:
    """Packs consecutive sentences of a document into rows of at most `max_length` tokens.

    A row never spans two documents; a sentence with more tokens than a row is cut at its end.

    Args:
        progress: called with (sentences done, sentences in all).

    Raises:
        UserError: a max_length without room for text, a tokenizer without padding, or no text.
    """
    _check(tokenizer, max_length, pair=False)
    before, after = _special(tokenizer)
    room = max_length - len(before) - len(after)
    joint = _joint(tokenizer)
    sentences = [
        (number, (joint if k else "") + sentence)
        for number, document in enumerate(documents)
        for k, sentence in enumerate(document.sentences)
    ]
    pieces: list[np.ndarray] = []  # of tokens, the special ones too
    ends: list[int] = []  # of rows, in tokens
    total = used = 0  # tokens in all, and in the open row
    current = None  # its document

    def close() -> None:
        nonlocal total, used
        if used:
            pieces.append(after)
            total += len(after)
            ends.append(total)
            used = 0

    for start in range(0, len(sentences), _CHUNK):
        part = sentences[start : start + _CHUNK]
        ids = tokenizer(
            [text for _, text in part],
            add_special_tokens=False,
            truncation=True,
            max_length=room,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        for (document, _), tokens in zip(part, ids, strict=True):
            if not tokens:
                continue
            if document != current or used + len(tokens) > room:
                close()
                current = document
                pieces.append(before)
                total += len(before)
            pieces.append(np.asarray(tokens, np.int32))
            total, used = total + len(tokens), used + len(tokens)
        if progress is not None:
            progress(min(start + _CHUNK, len(sentences)), len(sentences))
    close()
    if not ends:
        raise UserError("there is no text to encode: give files with text")
    tokens = np.concatenate(pieces)
    types = np.zeros(len(tokens), np.int8) if _has_types(tokenizer) else None
    return _encoded("text", tokenizer, (tokens, np.array([0, *ends], np.int64), types), None)


# -- tokenizers --------------------------------------------------------------------------------


def _check(tokenizer, max_length: int, pair: bool) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length < special + (2 if pair else 1):
        raise UserError(
            f"max_length {max_length} has no room for text beside {special} special tokens: "
            "give a larger one"
        )
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token: choose a model that has one")


def _has_types(tokenizer) -> bool:
    return "token_type_ids" in tokenizer.model_input_names


def _special(tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The special tokens before and after a text, as the tokenizer itself puts them."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            sides = whole[:start], whole[start + len(bare) :]
            return tuple(np.asarray(side, np.int32) for side in sides)
    raise UserError("the tokenizer puts special tokens inside of a text: choose another model")


def _joint(tokenizer) -> str:
    """What stands before a sentence that follows another: byte-level tokens hold their space."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return " " if ids("a a") == ids("a") + ids(" a") != ids("a") + ids("a") else ""


def _encoded(kind: str, tokenizer, rows: tuple, labels, windows=None) -> Encoded:
    tokens, offsets, types = rows
    digest = tokenizer_digest(tokenizer)
    return Encoded(kind, tokens, offsets, types, labels, tokenizer.pad_token_id, digest, windows)
