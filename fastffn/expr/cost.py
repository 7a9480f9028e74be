"""What a gene costs, from its widths alone: no weights, no model."""

from dataclasses import dataclass

from .genes import Gene, X


@dataclass(frozen=True)
class Cost:
    """Cost of feed-forward networks; costs add.

    Attributes:
        params: trainable numbers, with biases and the LayerNorm of each unit.
        macs: multiply-accumulates of the matrix products per token.
        values: activations read and written per token, with each segment one pass (times the size
            of the data type: bytes per token).
    """

    params: int = 0
    macs: int = 0
    values: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.params + other.params, self.macs + other.macs, self.values + other.values)


def gene_cost(gene: Gene, hidden_size: int) -> Cost:
    """Cost of the whole stack of `gene`; `Gene.width` says what is refused."""
    width, ups = gene.width(hidden_size), 1 + gene.gated
    segments = gene.segments
    params = ups * (hidden_size + 1) * width + (width + 1) * hidden_size + 2 * hidden_size
    macs = (ups + 1) * hidden_size * width
    values = hidden_size + ups * width  # the first product reads x and writes its result
    if not segments.prologue.is_leaf:
        values += 2 * hidden_size
    if not segments.middle.is_leaf:
        values += (ups + (X in segments.middle.inputs) + 1) * width
    values += width + hidden_size  # the second product
    values += 3 * hidden_size  # epilogue, residual and LayerNorm in one pass
    return Cost(gene.stack * params, gene.stack * macs, gene.stack * values)
