"""fastffn: small, fast BERT-like encoders. It needs torch alone, and loads it when first used.

Names below `_LAZY` are found when asked for: `fastffn --help` should not wait for torch.
"""

import importlib

from .errors import ExprError, UserError
from .expr import Expr, Gene

__version__ = "0.1.0"

# Names that need more than torch, or time to import: found in their module when first asked for.
_LAZY = {
    "FFN": "layers",
    "ElasticFFN": "layers",
    "EfficientBertConfig": "models",
    "EfficientBertModel": "models",
    "EfficientBertForMaskedLM": "models",
    "EfficientBertForQuestionAnswering": "models",
    "EfficientBertForSequenceClassification": "models",
    "EfficientBertForTokenClassification": "models",
    "capture": "distill.capture",
    "export": "serve.export",
    "optimize": "serve.optimize",
    "patch": "models.patch",
    "unpatch": "models.patch",
    "layer_map": "distill.layers",
    "relation_layer": "distill.layers",
}
_SUBPACKAGES = (
    "compress",
    "data",
    "distill",
    "evaluate",
    "expr",
    "functional",
    "kernels",
    "layers",
    "losses",
    "models",
    "runtimes",
    "search",
    "serve",
)

__all__ = ["Expr", "ExprError", "Gene", "UserError", "functional", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    elif name in _SUBPACKAGES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'fastffn' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_SUBPACKAGES})
