"""A folder that `SentenceTransformer(folder)` opens: the model, its pooling, and perhaps a norm.

    modules.json                        what runs after what
    config.json, model.safetensors ...  the model and its tokenizer
    1_Pooling/config.json               mean over the tokens, or the first token
    2_Normalize/                        vectors of length 1
    sentence_bert_config.json           tokens of a text

The files are those that every version since 2.0 reads, and writing them needs no
sentence-transformers. It finds a model's class by transformers' Auto classes, which know
EfficientBERT after `import fastffn.models`. Why no module of our own in modules.json, which would
import it by itself: sentence-transformers 6 imports others' modules with trust_remote_code only.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError
from ..files import write_text_atomic
from .interface import SENTENCE, Interface
from .source import MODULES

_MODES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
_OTHER_MODES = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens")


def write(
    model: nn.Module, interface: Interface, folder: Path, tokenizer: Any, max_length: int | None
) -> dict[str, Any]:
    """Writes the folder.

    Args:
        max_length: tokens of a text; None: the tokenizer's or the model's limit.

    Returns:
        "max_length", and "needs": what must be imported before it is opened, None: nothing.

    Raises:
        UserError: no tokenizer, or a model that makes no sentence vectors.
    """
    if SENTENCE not in interface.outputs:
        raise UserError(
            f"{type(model).__name__} makes no sentence vectors: sentence-transformers takes "
            "encoders without a head"
        )
    if tokenizer is None:
        raise UserError("no tokenizer: sentence-transformers needs one; give tokenizer=")
    limits = (interface.positions, tokenizer.model_max_length)
    max_length = max_length or min((n for n in limits if n is not None), default=512)
    max_length = min(max_length, interface.longest)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if interface.normalize:
        modules.append(("2_Normalize", "Normalize"))
    _json(
        folder / MODULES,
        [
            {"idx": k, "name": str(k), "path": path, "type": f"sentence_transformers.models.{name}"}
            for k, (path, name) in enumerate(modules)
        ],
    )
    modes = {flag: mode == interface.pooling for mode, flag in _MODES.items()}
    pooling = {"word_embedding_dimension": model.config.hidden_size, **modes}
    _json(folder / "1_Pooling" / "config.json", pooling | dict.fromkeys(_OTHER_MODES, False))
    if interface.normalize:
        (folder / "2_Normalize").mkdir()
    settings = {"max_seq_length": max_length, "do_lower_case": False}
    _json(folder / "sentence_bert_config.json", settings)
    ours = type(model).__module__.startswith("fastffn.")
    return {"max_length": max_length, "needs": "import fastffn.models" if ours else None}


def _json(path: Path, value: Any) -> None:
    write_text_atomic(path, json.dumps(value, indent=2) + "\n")
