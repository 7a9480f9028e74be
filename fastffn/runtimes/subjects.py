"""The models of a comparison: from a folder, a hub name or a preset to a bare encoder on disk.

What is compared is the encoder, tokens to last hidden states: heads and poolers cost next to
nothing and differ between the runtimes. Each model becomes a folder in safetensors that every
contender starts from, so that all of them have the same weights.

A preset is a published architecture with random weights: what an encoder costs does not depend on
what its weights say.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError

_BERT = {
    "bert-large": (24, 1024, 16),
    "bert-base": (12, 768, 12),
    "bert-medium": (8, 512, 8),
    "bert-small": (4, 512, 8),
    "bert-mini": (4, 256, 4),
    "bert-tiny": (2, 128, 2),
    "minilm-l12": (12, 384, 12),
    "minilm-l6": (6, 384, 12),
}
_EFFICIENT = {"efficientbert": "base", "efficientbert-tiny": "tiny", "efficientbert++": "++"}
PRESETS = (*_EFFICIENT, *_BERT)


@dataclass(frozen=True)
class Subject:
    """A model to compare.

    Attributes:
        name: as tables call it.
        origin: where its weights came from.
        folder: its encoder, saved by transformers.
        vocab_size, pad_id: what input ids may be, and which is padding.
        positions: how many of them a text may have; None: any number.
        params, params_without_word_embeddings: of the encoder.
        tokenizer: of transformers; None where the model came without one.
    """

    name: str
    origin: str
    folder: Path
    vocab_size: int
    positions: int | None
    pad_id: int
    params: int
    params_without_word_embeddings: int
    tokenizer: Any = None

    def facts(self) -> dict[str, Any]:
        """What a report says about it."""
        names = ("name", "origin", "positions", "params", "params_without_word_embeddings")
        return {name: getattr(self, name) for name in names}


def prepare(given: str, folder: Path) -> Subject:
    """Loads a model, takes its encoder and saves that.

    Args:
        given: a folder, a hub name or one of `PRESETS`; NAME=MODEL to call it NAME in tables
            (otherwise the preset's name, or the last part of the folder's or hub's).
        folder: where the encoder is saved.

    Raises:
        UserError: there is no such model, it cannot be loaded, or it is no encoder of tokens.
    """
    from ..distill.students import positions
    from ..distill.teacher import quiet

    name, model = named(given)
    if model in PRESETS and not Path(model).is_dir():
        encoder, tokenizer, origin = _preset(model), None, "random weights"
    else:
        encoder, tokenizer, origin = _loaded(model)
    with quiet():
        encoder.float().save_pretrained(folder)
    words = encoder.get_input_embeddings().weight
    params = sum(parameter.numel() for parameter in encoder.parameters())
    pad = encoder.config.pad_token_id
    return Subject(
        name=name,
        origin=origin,
        folder=folder,
        vocab_size=encoder.config.vocab_size,
        positions=positions(encoder),
        pad_id=0 if pad is None else pad,
        params=params,
        params_without_word_embeddings=params - words.numel(),
        tokenizer=tokenizer,
    )


def named(given: str) -> tuple[str, str]:
    """Name and model of `NAME=MODEL`, `MODEL` or a folder."""
    path = Path(given).expanduser()
    name, equals, model = given.partition("=")
    if equals and name and model and not path.exists():
        return name, model
    return (path.resolve().name if path.is_dir() else given.rstrip("/").rpartition("/")[2]), given


def load_encoder(folder: Path) -> nn.Module:
    """The encoder that `prepare` saved, in float32 and evaluation mode, without gradients."""
    from transformers import AutoModel

    from .. import models  # noqa: F401  registers EfficientBERT with the Auto classes
    from ..distill.teacher import quiet

    with quiet():
        encoder = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return bare(encoder.float()).eval().requires_grad_(False)


def bare(model: nn.Module) -> nn.Module:
    """The encoder inside a model with a head; its pooler is taken away.

    Raises:
        UserError: it takes no input ids.
    """
    encoder = getattr(model, "base_model", model)
    config = getattr(encoder, "config", None)
    words = encoder.get_input_embeddings() if hasattr(encoder, "get_input_embeddings") else None
    if getattr(config, "vocab_size", None) is None or not isinstance(words, nn.Embedding):
        raise UserError(
            f"{type(model).__name__} is no encoder of tokens: runtimes are compared on models "
            "from input_ids to last hidden states, such as BERT or EfficientBERT"
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        raise UserError(f"{type(model).__name__} decodes: runtimes are compared on encoders")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    if getattr(config, "sentence_pooling", None) is not None:
        config.sentence_pooling = None
    return encoder


def read_tokenizer(place: str) -> Any:
    """A tokenizer by folder or hub name; a folder may have nothing but WordPiece's vocab.txt.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer, BertTokenizer

    from ..distill.teacher import LOADING_ERRORS, first_line, locate, quiet

    path = Path(place).expanduser()
    vocabulary = path / "vocab.txt"
    alone = vocabulary.is_file() and not any(path.glob("*token*.json"))
    with quiet():
        try:
            if alone:
                return BertTokenizer(str(vocabulary))
            folder, _ = locate(place, "tokenizer")
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except LOADING_ERRORS as error:
            raise UserError(f"tokenizer {place} cannot be loaded: {first_line(error)}") from error


def _preset(name: str) -> nn.Module:
    import torch
    from transformers import BertConfig, BertModel

    from ..models import EfficientBertConfig, EfficientBertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in _EFFICIENT:
            return EfficientBertModel(EfficientBertConfig.preset(_EFFICIENT[name]))
        layers, width, heads = _BERT[name]
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
        config = BertConfig(**sizes, intermediate_size=4 * width)
        return BertModel(config, add_pooling_layer=False)


def _loaded(name: str | Path) -> tuple[nn.Module, Any, str]:
    """Encoder, tokenizer (None without one) and origin of a folder's or the hub's model."""
    from transformers import AutoModel, AutoTokenizer

    from .. import models  # noqa: F401  registers EfficientBERT with the Auto classes
    from ..distill.teacher import LOADING_ERRORS, first_line, locate, quiet

    try:
        directory, origin = locate(str(name), "model")
    except UserError as error:
        raise UserError(f"{error}; presets are {', '.join(PRESETS)}") from None
    with quiet():
        try:
            model = AutoModel.from_pretrained(
                directory, use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
        except LOADING_ERRORS as error:
            raise UserError(f"model {name} cannot be loaded: {first_line(error)}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
        except LOADING_ERRORS:
            tokenizer = None
    if tokenizer is not None and len(tokenizer) <= len(tokenizer.all_special_tokens):
        tokenizer = None  # without any file transformers makes one up
    return bare(model), tokenizer, origin
