"""What encoders are timed on: batches of fixed length, and real texts with their own lengths.

A workload is a list of batches, run one after the other. Fixed ones have one batch of random ids
without padding. Real ones have as many texts as they are given, drawn from the whole file in its
order and padded to the longest of their batch, which is what a server gets that does not sort what
comes in.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .subjects import Subject

_TEXTS = 64  # of a real workload, at least; a larger batch has four times itself
_LONGEST = 512  # tokens of a text, of models that have no limit
_OPENING = 1000  # ids before it are special tokens and single characters in most vocabularies


@dataclass(frozen=True)
class Workload:
    """Batches of one size.

    Attributes:
        name: as tables call it.
        batch_size: texts in a batch.
        length: tokens of each text; None for real texts.
        texts: real texts, in order; empty for random ids.
    """

    name: str
    batch_size: int
    length: int | None = None
    texts: tuple[str, ...] = ()

    def batches(self, subject: Subject, seed: int = 0) -> list[dict[str, Tensor]]:
        """input_ids and attention_mask, int64 [B, T] on the CPU.

        Raises:
            UserError: texts longer than the model's positions, or real ones without a tokenizer.
        """
        if self.texts:
            return self._real(subject)
        if subject.positions is not None and self.length > subject.positions:
            raise UserError(
                f"length {self.length}: {subject.name} has {subject.positions} positions; "
                "give shorter ones"
            )
        generator = torch.Generator().manual_seed(seed)
        low = min(_OPENING, subject.vocab_size // 2)
        shape = (self.batch_size, self.length)
        ids = torch.randint(low, subject.vocab_size, shape, generator=generator)
        # Some architectures count positions by what is not padding.
        ids[ids == subject.pad_id] = (subject.pad_id + 1) % subject.vocab_size
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]

    def _real(self, subject: Subject) -> list[dict[str, Tensor]]:
        if subject.tokenizer is None:
            raise UserError(f"{subject.name} has no tokenizer for texts: give --tokenizer")
        found = []
        for start in range(0, len(self.texts), self.batch_size):
            encoded = subject.tokenizer(
                list(self.texts[start : start + self.batch_size]),
                truncation=True,
                max_length=subject.positions or _LONGEST,
                padding="longest",
                return_tensors="pt",
            )
            ids = encoded["input_ids"]
            if int(ids.max()) >= subject.vocab_size:
                raise UserError(
                    f"the tokenizer has ids that {subject.name} does not: its vocabulary has "
                    f"{subject.vocab_size} entries"
                )
            found.append({"input_ids": ids, "attention_mask": encoded["attention_mask"]})
        return found


def fixed(batch_sizes: Sequence[int], lengths: Sequence[int]) -> list[Workload]:
    """Every batch size at every length."""
    return [Workload(f"{b} x {t}", b, t) for t in lengths for b in batch_sizes]


def real(name: str, texts: Sequence[str], batch_sizes: Sequence[int]) -> list[Workload]:
    """Texts of one file at every batch size, the same ones as far as the sizes allow.

    Raises:
        UserError: fewer texts than a batch.
    """
    if len(texts) < max(batch_sizes):
        raise UserError(
            f"{name}: {len(texts)} texts, a batch has {max(batch_sizes)}; give more text"
        )
    found = []
    for size in batch_sizes:
        wanted = min(len(texts) // size, max(4, -(-_TEXTS // size))) * size
        chosen = sorted(random.Random(0).sample(range(len(texts)), wanted))
        found.append(Workload(f"{size} x {name}", size, None, tuple(texts[k] for k in chosen)))
    return found


def read_texts(path: Path) -> list[str]:
    """The texts of a file: of a .tsv the first column, else sentences as `fastffn demo` finds them
    (plain, .gz or .xz).

    Raises:
        UserError: no such file, not UTF-8, or nothing in it.
    """
    from ..data.text import read_documents, read_utf8

    if path.suffix != ".tsv":
        return [s for document in read_documents([path], least=1) for s in document.sentences]
    _, *lines = read_utf8(path).splitlines() or [""]
    texts = [text for line in lines if (text := line.partition("\t")[0].strip())]
    if not texts:
        raise UserError(f"text file {path} has a header and no rows")
    return texts


def padding(batches: Sequence[dict[str, Tensor]]) -> float:
    """The part of all places in the batches that is padding."""
    places = sum(batch["attention_mask"].numel() for batch in batches)
    return 1 - sum(int(batch["attention_mask"].sum()) for batch in batches) / places
