"""Which layers to compare: the choices that papers count from 1, as the indices code takes."""

from collections.abc import Sequence

from torch import nn

from fastffn.errors import UserError
from fastffn.models.architectures import Encoder

# MiniLMv2 (2012.15828): (model_type, layers) -> the teacher's layer, counted from 1.
_LARGE = {("bert", 24): 21, ("roberta", 24): 19, ("xlm-roberta", 24): 19}
_BASE = 12


def relation_layer(config_or_model: object) -> int:
    """The teacher's layer whose relations MiniLMv2 distils, as `fastffn.capture` counts: from 0.

    The paper (2012.15828) counts from 1: the last of base-size teachers, the 21st of the 24 of
    BERT-large, the 19th of RoBERTa-large's and XLM-R-large's. The student's is always its last.
    Teachers of 12 layers or fewer count as base size.

    Args:
        config_or_model: a teacher or its configuration.

    Returns:
        11 for base size, 20 for BERT-large, 18 for RoBERTa-large and XLM-R-large.

    Raises:
        UserError: a deeper teacher that the paper does not name, or no configuration.
    """
    config = config_or_model
    if isinstance(config_or_model, nn.Module):
        config = getattr(Encoder(config_or_model).base, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise UserError(
            f"{type(config_or_model).__name__} has no num_hidden_layers: give a model or its config"
        )
    kind = getattr(config, "model_type", None)
    if (kind, count) in _LARGE:
        return _LARGE[kind, count] - 1
    if count > _BASE:
        raise UserError(
            f"MiniLMv2 names no layer for {kind} with {count} layers: choose one; {count - 3} and "
            f"{count - 2} (from 0) are a start: Udagawa et al. (2310.08797) found the last but one "
            "and the last but two best"
        )
    return count - 1


def layer_map(
    student_layers: int, teacher_layers: int, how: str = "uniform"
) -> tuple[tuple[int, int], ...]:
    """Which teacher layer each student layer follows.

    Args:
        student_layers, teacher_layers: numbers of layers.
        how: "uniform"  every student layer ends where an equal run of the teacher's does: for 6
                        of 12 the layers 2, 4, ..., 12 counted from 1 (TinyBERT, 1909.10351; "skip"
                        in PKD, 1908.09355). Where the numbers do not divide, rounded down: for 4
                        of 6 the layers 1, 3, 4, 6. The last follows the last always.
             "last"     the teacher's last ones, in order ("last" in PKD)
             "first"    the teacher's first ones, in order

    Returns:
        Pairs (student layer, teacher layer), both from 0, as `fastffn.capture` takes them; add 1
        to both for indices into transformers' `hidden_states`, where 0 is the embeddings.

    Raises:
        UserError: fewer than one layer, a student deeper than its teacher, or an unknown `how`.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise UserError(
            f"{student_layers} student layers cannot follow {teacher_layers} teacher layers: give "
            "a student of at least one layer that is not deeper than its teacher"
        )
    if how == "uniform":
        ends = [(k + 1) * teacher_layers // student_layers - 1 for k in range(student_layers)]
    elif how == "last":
        ends = list(range(teacher_layers - student_layers, teacher_layers))
    elif how == "first":
        ends = list(range(student_layers))
    else:
        raise UserError(f"layer map {how!r} is unknown: choose uniform, last or first")
    return tuple(enumerate(ends))


def source_layers(
    layers: int | Sequence[int] | None, count: int, how: str | None = None
) -> list[int]:
    """Which layers of another model a student takes over.

    Args:
        layers: None (all), a number of layers, or indices from 0 (negative: from the last).
        count: layers of the other model.
        how: for a number, as in `layer_map`; None: "uniform".

    Raises:
        UserError: a layer that is not there, none at all, or more than there are.
    """
    if layers is None:
        return list(range(count))
    if isinstance(layers, int):
        return [index for _, index in layer_map(layers, count, how or "uniform")]
    from fastffn.models.initialise import layer_indices

    return layer_indices(layers, count)
