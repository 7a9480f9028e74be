"""Models of a recipe: loaded with the head that a task needs, or built from another model.

    load           a directory or hub name; a head that its files lack is new
    layers_of      a plain, smaller model of the source's family: chosen layers, all else copied
    like           the source's family in another size, random weights
    efficientbert  searched FFNs: initialised from a source, or random
    supernet       the same with elastic FFNs

All are made by transformers' Auto classes from a configuration that `save_pretrained` writes, so
that a student needs no code of its own to be loaded. Why not cut the layers out of a copy of the
source: what is left would carry the source's configuration, and the parts that its class builds
for one layer only (ModernBERT's first layer has no norm) would stand in the wrong place.

Models are float32 unless another dtype is asked for, and in evaluation mode; whether parameters
get gradients is left to who trains.
"""

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastffn.distill.efficient_students import efficient_student
from fastffn.distill.heads import Head, as_dtype, copy_head, head_state
from fastffn.distill.layers import source_layers
from fastffn.distill.teacher import LOADING_ERRORS, first_line, load_tokenizer, locate, quiet
from fastffn.errors import UserError
from fastffn.models.architectures import Encoder, find

_PER_LAYER = ("layer_types", "genes")  # lists in configurations with one entry for each layer


@dataclass(frozen=True)
class Loaded:
    """A model from files.

    Attributes:
        model: with the head asked for, in evaluation mode.
        tokenizer: from the same folder.
        origin: for reports: what was loaded, and from where.
        fresh: names of the parameters that the files lack and that are random: a new head.
    """

    model: nn.Module
    tokenizer: object
    origin: str
    fresh: tuple[str, ...] = ()


def load_model(
    name_or_dir: str | Path | None,
    head: Head,
    dtype: str | torch.dtype | None = None,
    role: str = "teacher",
    seed: int = 0,
) -> Loaded:
    """Loads a model of `architectures.py` or of fastffn, by directory or hub name.

    Args:
        name_or_dir: searched for as `load_teacher` does.
        head: what is wanted on top; "none": the encoder alone, without a pooler that the files
            lack.
        dtype: of the weights; None: float32, whatever the files hold.
        role: what errors call it. A "teacher" whose head has other classes is refused; of any
            other role the head is then new, as one for another kind of task always is.
        seed: of the weights of a new head.

    Raises:
        UserError: what `load_teacher` raises, an encoder that is not known, weights of the encoder
            that are missing, or a teacher's head for other classes.
    """
    from transformers import AutoConfig

    import fastffn.models  # noqa: F401 - registers its models

    directory, origin = locate(name_or_dir, role)
    what = f"{role} {name_or_dir or origin}"
    with quiet(), _seeded(seed):
        try:
            stored = AutoConfig.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
            auto = head.auto_class(stored)
            model, info = auto.from_pretrained(
                directory,
                config=head.configured(stored),
                dtype=as_dtype(dtype),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except UserError:
            raise
        except LOADING_ERRORS as error:
            raise UserError(f"{what} cannot be loaded: {first_line(error)}") from error
        Encoder(model)
        fresh = _fresh(model, info, what)
        if head.is_of_another_task(stored):
            fresh = _renewed(model, head, fresh)
        elif role == "teacher":
            _check_classes(stored, info, head, what)
        tokenizer = load_tokenizer(directory, model, what)
    if head.kind == "none" and fresh:
        model.pooler, fresh = None, ()
    return Loaded(model.eval(), tokenizer, origin, fresh)


def build_student(
    spec: object, models: Mapping[str, nn.Module], head: Head, seed: int = 0
) -> nn.Module:
    """Builds the model that a recipe describes from those that are there already.

    Args:
        spec: a `recipe.ModelSpec` other than `load`.
        models: those that it names.
        head: what is wanted on top.
        seed: of all random weights; the global generator is left as it was.

    Returns:
        The model in evaluation mode, float32 unless `spec.dtype` says otherwise, on the device of
        the model that it is made from.

    Raises:
        UserError: an option that does not exist or does not fit, or a source that is not known.
    """
    with _seeded(seed), quiet():
        if spec.layers_of:
            model = _layers_of(models[spec.layers_of], spec, head)
        elif spec.like:
            model = _like(models[spec.like], spec, head)
        elif spec.efficientbert is not None:
            model = efficient_student(spec.efficientbert, models, head, spec.dtype)
        elif spec.supernet is not None:
            model = efficient_student(spec.supernet, models, head, spec.dtype, supernet=True)
        else:
            raise UserError("a student is built by layers_of, like, efficientbert or supernet")
    return model.eval()


def same_tokenizer(a: object, b: object) -> bool:
    """Whether two tokenizers have the same vocabulary and special tokens."""
    from fastffn.data.encode import tokenizer_digest

    return tokenizer_digest(a) == tokenizer_digest(b)


def check_vocabulary(model: nn.Module, tokenizer: object) -> None:
    """Raises a UserError if a tokenizer has more entries than a model has embeddings."""
    entries, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    if entries > rows:
        raise UserError(
            f"the tokenizer has {entries} entries, {type(model).__name__} has embeddings for "
            f"{rows}: set its vocab_size to {entries} or more"
        )


def check_positions(model: nn.Module, max_length: int) -> None:
    """Raises a UserError if texts of `max_length` tokens are longer than the model's positions."""
    base = Encoder(model).base
    number = positions(base)
    if number is not None and max_length > number:
        raise UserError(
            f"max_length {max_length} is longer than the {number} positions "
            f"of {type(base).__name__}: set it to {number} or less"
        )


def positions(encoder: nn.Module) -> int | None:
    """How many tokens of a text an encoder has positions for.

    RoBERTa and its kin number positions from the padding's index on and have as many fewer for
    tokens. Encoders without a table of positions (ModernBERT, most of DeBERTa) have no such limit.
    """
    table = find(encoder, "embeddings.position_embeddings")
    if not isinstance(table, nn.Embedding):
        return None
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def _layers_of(source: nn.Module, spec: object, head: Head) -> nn.Module:
    """The source with some of its layers and, if it is the same one, its head."""
    encoder = Encoder(source)
    config = encoder.base.config
    layers = source_layers(spec.layers, len(encoder.layers), spec.how)
    changes: dict[str, object] = {"num_hidden_layers": len(layers)}
    for name in _PER_LAYER:
        if entries := getattr(config, name, None):
            changes[name] = [entries[index] for index in layers]
    student = head.model(_changed(config, changes), spec.dtype, source)
    _copy_encoder(encoder, Encoder(student), layers)
    copy_head(source, student, head)
    if head.kind == "none" and getattr(encoder.base, "pooler", None) is None:
        student.pooler = None
    return student


def _like(source: nn.Module, spec: object, head: Head) -> nn.Module:
    """The source's family, random weights, some values of its configuration replaced."""
    config = Encoder(source).base.config
    changes = dict(spec.config or {})
    for name in changes:
        if not hasattr(config, name):
            known = sorted({*config.to_dict(), *config.attribute_map})
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise UserError(f"config: {config.model_type} has no {name}: {remedy}")
    if "num_hidden_layers" in changes and "layer_types" not in changes:
        if getattr(config, "layer_types", None):
            changes["layer_types"] = None  # by the family's own pattern
    if "hidden_size" in changes and hasattr(config, "pooler_hidden_size"):  # DeBERTa's
        changes.setdefault("pooler_hidden_size", changes["hidden_size"])
    return head.model(_changed(config, changes), spec.dtype, source)


def _changed(config, changes: Mapping[str, object]):
    """A configuration with some values replaced, checked as a new one is."""
    from huggingface_hub.errors import StrictDataclassError

    names = config.attribute_map
    values = config.to_dict() | {names.get(name, name): value for name, value in changes.items()}
    try:
        changed = type(config).from_dict(values)
    except UserError:
        raise
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"config: {' '.join(str(error).split())}") from error
    changed._attn_implementation = config._attn_implementation
    return changed


@torch.no_grad()
def _copy_encoder(source: Encoder, target: Encoder, layers: list[int]) -> None:
    """Copies chosen layers and all that is not a layer; a pooler only where both have one."""
    place = source.architecture.layers + "."
    have = source.base.state_dict()
    for name, tensor in target.base.state_dict().items():
        of = name
        if name.startswith(place):
            number, _, rest = name[len(place) :].partition(".")
            of = f"{place}{layers[int(number)]}.{rest}"
        if of in have:
            tensor.copy_(have[of])
        elif not name.startswith("pooler."):
            raise UserError(
                f"{type(source.base).__name__} has no {of}: its layer cannot stand at that place; "
                "keep its first layer first"
            )


def _fresh(model: nn.Module, info: Mapping, what: str) -> tuple[str, ...]:
    """Names of the head's parameters that are not from the files."""
    absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    broken = sorted(
        name
        for name in absent
        if name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")
    )
    if broken:
        raise UserError(
            f"{what} is not whole: {len(broken)} weights are missing from its files, "
            f"{broken[0]} first"
        )
    return tuple(sorted(absent))


def _renewed(model: nn.Module, head: Head, fresh: tuple[str, ...]) -> tuple[str, ...]:
    """Random weights for the whole head; the names of all that is random then."""
    new = head_state(head.model(model.config, model.dtype, model))
    model.load_state_dict(new, strict=False)
    return tuple(sorted({*fresh, *new}))


def _check_classes(stored, info: Mapping, head: Head, what: str) -> None:
    """Refuses a teacher whose classes are not the task's."""
    for name, shape, _ in info["mismatched_keys"]:
        raise UserError(
            f"{what} has a head of {shape[0]} outputs ({name}), the task needs "
            f"{head.num_labels}: give a teacher that was fine-tuned on this task"
        )
    theirs = [str(name).lower() for name in (stored.id2label or {}).values()]
    ours = [name.lower() for name in head.labels]
    if theirs != ours and sorted(theirs) == sorted(ours):
        raise UserError(
            f"{what} has its classes in the order {', '.join(theirs)}, the task in the order "
            f"{', '.join(ours)}: give the task's labels in the teacher's order"
        )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The CPU's generator, which makes initial weights, at `seed`; as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
