"""The ops as functions: `fastffn.functional.elementwise(...)` and its neighbours."""

from .ops.attention import ragged_attention
from .ops.elementwise import elementwise
from .ops.ffn import ffn
from .ops.hidden_mse import hidden_mse
from .ops.logits import soft_cross_entropy
from .ops.named_relations import attention_relations
from .ops.relation_losses import relation_kl, relation_loss, score_mse, split_relation_heads
from .ops.residual_norm import residual_norm
from .ops.vector_cosine import vector_cosine

__all__ = [
    "attention_relations",
    "elementwise",
    "ffn",
    "hidden_mse",
    "ragged_attention",
    "relation_kl",
    "relation_loss",
    "residual_norm",
    "score_mse",
    "soft_cross_entropy",
    "split_relation_heads",
    "vector_cosine",
]
