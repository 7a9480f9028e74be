"""The model to export or to serve: from a folder, a hub name, or as it is given.

A folder says by its configuration which class it holds, head included. What sentence-transformers
keeps beside the weights says how sentence vectors are made of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..distill.teacher import LOADING_ERRORS, first_line, locate, quiet, read_pooling
from ..errors import UserError

_AUTOS = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModel",
)
MODULES = "modules.json"  # of sentence-transformers


@dataclass(frozen=True)
class Source:
    """A model and what came with it.

    Attributes:
        model: a model of transformers.
        tokenizer: None where there is none.
        name: for errors and reports.
        folder: where it was read; None of a model that was given.
        pooling, normalize: how sentence vectors are made, where its folder says so.
        max_length: tokens of a text, where sentence-transformers' files say so.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    folder: Path | None = None
    pooling: str | None = None
    normalize: bool = False
    max_length: int | None = None


def given(model: nn.Module, tokenizer: Any = None) -> Source:
    """A model as the source.

    Raises:
        UserError: it is no model of transformers, or one that was optimized.
    """
    from transformers import PreTrainedModel

    parts = model.modules() if isinstance(model, nn.Module) else ()
    optimized = any(type(part).__module__.startswith("fastffn.serve.") for part in parts)
    if optimized or not isinstance(model, PreTrainedModel):
        kind = f"an optimized {type(model).__name__}" if optimized else type(model).__name__
        raise UserError(
            f"{kind} cannot be exported: give the model of transformers that it was made of, or "
            "its folder"
        )
    return Source(model, tokenizer, type(model).__name__)


def read(name_or_dir: str | Path, what: str = "model") -> Source:
    """Loads a model, with the head that its configuration names, in the type of its file.

    Raises:
        UserError: no such folder or hub name, weights that are not safetensors or not whole, a
            class that is not known.
    """
    import transformers

    from .. import models  # noqa: F401  registers EfficientBERT with the Auto classes

    folder, _ = locate(name_or_dir, what)
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model, info = _auto(config).from_pretrained(
                folder,
                config=config,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except LOADING_ERRORS as error:
            raise UserError(
                f"{what} {name_or_dir} cannot be loaded: {first_line(error)}"
            ) from error
        missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
        if len(missing) < len(info["missing_keys"]):  # random, and no part of what was trained
            model.pooler = None
        if missing:
            raise UserError(
                f"{what} {name_or_dir} is not whole: {len(missing)} weights are missing from its "
                f"files, {missing[0]} first"
            )
        tokenizer = read_tokenizer(folder, f"{what} {name_or_dir}")
    pooling, normalize, length = _sentence_files(folder, str(name_or_dir))
    return Source(model.eval(), tokenizer, str(name_or_dir), folder, pooling, normalize, length)


def read_tokenizer(folder: Path, what: str) -> Any:
    """The tokenizer in a folder; None where there is none.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not any(folder.glob("*token*.json")) and not (folder / "vocab.txt").is_file():
        return None
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except LOADING_ERRORS as error:
            said = first_line(error)
            raise UserError(f"the tokenizer of {what} cannot be loaded: {said}") from error


def _auto(config: Any) -> Any:
    """The Auto class that makes the class which a configuration names; AutoModel where none is."""
    import transformers

    named = (getattr(config, "architectures", None) or [None])[0]
    for name in _AUTOS:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            known = auto._model_mapping[type(config)]
            if named in {c.__name__ for c in (known if isinstance(known, tuple) else (known,))}:
                return auto
    return transformers.AutoModel


def _sentence_files(folder: Path, name: str) -> tuple[str | None, bool, int | None]:
    """Pooling, whether vectors are normalised, and tokens of a text, of sentence-transformers."""
    pooling, normalize, length = None, False, None
    if (folder / "1_Pooling" / "config.json").is_file():
        pooling = read_pooling(folder, name)
    try:
        if (folder / MODULES).is_file():
            modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
            normalize = any(module["type"].endswith(".Normalize") for module in modules)
        if (path := folder / "sentence_bert_config.json").is_file():
            length = json.loads(path.read_text(encoding="utf-8")).get("max_seq_length")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{name}: the files of sentence-transformers are damaged: {error}"
        ) from None
    return pooling, normalize, length if isinstance(length, int) else None
