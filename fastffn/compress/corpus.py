"""The text of a run: which sentences train, which judge candidates, which are held out.

    train        what students are trained on
    validation   judges the candidates of the search
    held_out     judges results; neither training nor the search has seen it

All three are separated by document. Why a validation part of its own: whoever picks the best of
many candidates on the text that he then reports on reports his luck too.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from fastffn.compress.options import Options
from fastffn.data.text import Document, hold_out, read_documents, stdlib_documents
from fastffn.errors import UserError

_VALIDATION = 400  # sentences; each candidate is judged on all of them
_HELD_OUT = 2000
_LEAST = 5  # sentences to judge by


@dataclass(frozen=True)
class Corpus:
    """Sentences of the three parts, in this order in the teacher's cache."""

    train: list[str]
    validation: list[str]
    held_out: list[str]

    @property
    def sentences(self) -> list[str]:
        return [*self.train, *self.validation, *self.held_out]

    def numbers(self, part: str) -> np.ndarray:
        """Where the sentences of a part stand in `sentences`."""
        counts = [len(self.train), len(self.validation), len(self.held_out)]
        index = ("train", "validation", "held_out").index(part)
        return np.arange(counts[index]) + sum(counts[:index])

    def digest(self) -> str:
        text = "\x1e".join("\x1f".join(part) for part in (self.train, self.validation))
        return hashlib.sha256("\x1e".join((text, *self.held_out)).encode()).hexdigest()[:16]

    def limited(self, count: int, seed: int) -> "Corpus":
        """At most `count` of the training sentences, chosen by chance."""
        return Corpus(_some(self.train, count, seed), self.validation, self.held_out)


def read(options: Options) -> Corpus:
    """The sentences of the user's files, or of the standard library.

    Raises:
        UserError: missing, unreadable or too little text, or so few documents that a judging part
            has too little.
    """
    documents = stdlib_documents() if options.text is None else read_documents(options.text)
    train, held_out = hold_out(documents, 0.1, options.seed)
    train, validation = hold_out(train, 0.05, options.seed + 1)
    corpus = Corpus(
        _sentences(train),
        _some(_sentences(validation), _VALIDATION, options.seed),
        _some(_sentences(held_out), _HELD_OUT, options.seed),
    )
    least = min(len(corpus.validation), len(corpus.held_out))
    if least < _LEAST:
        raise UserError(
            f"sentences left to judge by: {least}, at least {_LEAST} are needed: "
            "give more text, or text in more files"
        )
    return corpus


def _sentences(documents: list[Document]) -> list[str]:
    return [sentence for document in documents for sentence in document.sentences]


def _some(sentences: list[str], count: int, seed: int) -> list[str]:
    if len(sentences) <= count:
        return sentences
    chosen = np.random.default_rng(seed).choice(len(sentences), count, replace=False)
    return [sentences[number] for number in sorted(chosen)]
