"""The ops as functions: `fastffn.functional.elementwise(...)` and its neighbours."""

from .ops.elementwise import elementwise
from .ops.ffn import ffn
from .ops.relation import relation_kl, relation_loss, split_relation_heads
from .ops.residual_norm import residual_norm

__all__ = [
    "elementwise",
    "ffn",
    "relation_kl",
    "relation_loss",
    "residual_norm",
    "split_relation_heads",
]
