"""Candidates: one gene per layer, what they cost, and a fingerprint by which each counts once.

Two candidates whose genes compute the same functions at the same widths have the same fingerprint,
however they are spelled: it is taken from what the functions give on fixed samples.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..expr import Gene


@dataclass(frozen=True)
class Candidate:
    """A member of a space, with the cost of its feed-forward networks and the space's rest.

    Attributes:
        genes: in canonical spelling, first layer first.
        params, macs: trainable numbers, and multiply-accumulates per token.
        fingerprint: sixteen hexadecimal digits, equal for candidates that compute the same.
        latency: estimated microseconds per batch of the space's target; None without a table.
    """

    genes: tuple[Gene, ...]
    params: int
    macs: int
    fingerprint: str
    latency: int | None = None

    @property
    def texts(self) -> list[str]:
        return [str(gene) for gene in self.genes]

    def __str__(self) -> str:
        return ", ".join(self.texts)

    @staticmethod
    def of(genes: Sequence[Gene], cost: Mapping[str, int]) -> "Candidate":
        """The candidate with these genes, in canonical spelling and of one base.

        Args:
            cost: params, macs and, if it is known, latency.
        """
        parts = (f"{gene.stack}x{gene.ratio}-{_meaning(str(gene.expr))}" for gene in genes)
        text = f"{genes[0].base} {' '.join(parts)}"
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Candidate(tuple(genes), fingerprint=fingerprint, **cost)


@lru_cache(maxsize=20_000)
def _meaning(function: str) -> str:
    """Fingerprint of the function alone, at ratio 1: it is the same function at every width.

    Kept by the text: an expression takes a hundred times its memory.
    """
    return Gene.parse(f"1x1 {function}").fingerprint()
