"""The ops as functions: `fastffn.functional.elementwise(...)` and its neighbours."""

from .ops.elementwise import elementwise
from .ops.ffn import ffn
from .ops.relation import relation_kl, relation_loss, split_relation_heads

__all__ = ["elementwise", "ffn", "relation_kl", "relation_loss", "split_relation_heads"]
