"""Candidates: one gene per layer, what they cost, and a fingerprint by which each counts once.

Two candidates whose genes compute the same functions at the same widths have the same fingerprint,
however they are spelled: it is taken from what the functions give on fixed samples.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..errors import ExprError, UserError
from ..expr import Expr, Gene


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
        parts = (f"{gene.stack}x{gene.ratio}-{_meaning(gene.expr)}" for gene in genes)
        text = f"{genes[0].base} {' '.join(parts)}"
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Candidate(tuple(genes), fingerprint=fingerprint, **cost)


def read_gene(layer: int, gene: Gene | str, base: int) -> Gene:
    """The gene, or the one that a text writes.

    Raises:
        UserError: it is none; one line that names the layer.
    """
    if isinstance(gene, Gene):
        return gene
    if not isinstance(gene, str):
        raise UserError(f"layer {layer}: a gene is a text, not {gene!r}")
    try:
        return Gene.parse(gene, base)
    except ExprError as error:
        place = f"at character {error.position + 1}"
        raise UserError(f"layer {layer}, gene {gene!r}: {error.message} ({place})") from None


def canonical(gene: Gene) -> Gene:
    """The gene in canonical spelling, itself where it has it: a new one costs as much as a walk."""
    expr = gene.expr.canonical()
    return gene if expr == gene.expr else gene.with_(expr=expr)


def _meaning(expr: Expr) -> str:
    """Fingerprint of the function alone, at ratio 1: it is the same function at every width."""
    text = str(expr)
    if text not in _MEANINGS:
        if len(_MEANINGS) >= _KEPT:
            _MEANINGS.clear()
        _MEANINGS[text] = Gene(1, Fraction(1), expr).fingerprint()
    return _MEANINGS[text]


# By text, and not an lru_cache of expressions: these take a hundred times the memory.
_KEPT = 20_000
_MEANINGS: dict[str, str] = {}
