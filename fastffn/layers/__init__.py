"""Modules to build encoders from: the searched FFN block and its elastic (supernet) form."""

from .elastic import ElasticFFN
from .ffn import FFN

__all__ = ["FFN", "ElasticFFN"]
