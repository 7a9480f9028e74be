"""Runs a model once and reads by name what losses compare.

    "q.3", "k.3", "v.3"   projections of layer 3 (from 0), [batch, length, width]
    "hidden.3"            what layer 4 gets, [batch, length, width]
    "scores.3"            `capture.Scores` of layer 3
    "embeddings"          what layer 0 gets
    "logits"              of the head: [batch, labels]; [batch, length, 2], start and end, of a head
                          for questions

Where nothing but layers is read, those above the last one may be left out (`stop`).
"""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastffn.data.inputs import model_inputs
from fastffn.distill.capture import capture
from fastffn.errors import UserError
from fastffn.models.architectures import unwrapped

LOGITS = "logits"
_EMBEDDINGS = "embeddings"


def read(
    model: nn.Module, batch: dict[str, Tensor], names: Iterable[str], stop: bool = False
) -> dict[str, object]:
    """Runs the model on a batch.

    Args:
        model: one that `fastffn.capture` knows.
        batch: input_ids, attention_mask and, for models that have segments, token_type_ids.
        names: what to read.
        stop: run no layer that nothing above is read of. Meant for teachers.

    Returns:
        name -> tensor, part of the autograd graph where there is one.

    Raises:
        UserError: logits of a model without a head, and as `capture`.
    """
    names = list(dict.fromkeys(names))
    inputs = model_inputs(unwrapped(model), batch)
    by_layer: dict[int, list[str]] = {}
    for name in names:
        what, _, layer = name.partition(".")
        if layer:
            by_layer.setdefault(int(layer), []).append(what)
    # The last layer's block is the outermost: it is the one that may stop the model.
    order = sorted(by_layer, reverse=True)
    captured: dict[int, dict] = {}
    early = stop and LOGITS not in names
    with contextlib.ExitStack() as stack:
        for layer in order:
            last = early and layer == order[0]
            captured[layer] = stack.enter_context(capture(model, layer, by_layer[layer], stop=last))
        first = {}
        if _EMBEDDINGS in names:
            first = stack.enter_context(capture(model, (), _EMBEDDINGS, stop=early and not order))
        outputs = model(**inputs)
    read = {f"{what}.{k}": captured[k][what] for k in order for what in by_layer[k]}
    if _EMBEDDINGS in names:
        read[_EMBEDDINGS] = first[_EMBEDDINGS]
    if LOGITS in names:
        read[LOGITS] = _logits(model, outputs)
    return read


def _logits(model: nn.Module, outputs) -> Tensor:
    if getattr(outputs, "start_logits", None) is not None:
        return torch.stack((outputs.start_logits, outputs.end_logits), dim=-1)
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise UserError(
            f"{type(unwrapped(model)).__name__} has no head and so no logits: give a model that "
            "was fine-tuned on the task"
        )
    return logits
