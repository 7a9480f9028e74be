"""Reads queries, keys, values and hidden states out of an encoder by forward hooks.

    with capture(model, layer=-1) as states:
        model(**batch)
    states["q"]                        # [batch, length, width], still part of the autograd graph

Hooks sit on the projections themselves, so any attention implementation works (SDPA and fused ones
never show their maps) and a student trains through what was captured. Why not
`output_attentions`: it forces the eager implementation, gives maps rather than the vectors that
relations need, and does so for every layer.

Known structures, told by attributes rather than by class:
    layer.attention.self.{query,key,value}     BERT, RoBERTa, ELECTRA and their like
    layer.attention.{query,key,value}          fastffn's models
"""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from fastffn.errors import UserError

_PROJECTIONS = {"q": "query", "k": "key", "v": "value"}


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The transformer layers of a BERT-like encoder, with or without a head on top.

    Raises:
        UserError: there is no `encoder.layer`.
    """
    base = getattr(model, "base_model", model)
    layers = getattr(getattr(base, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UserError(
            f"{type(base).__name__} is no BERT-like encoder: it has no layers at encoder.layer"
        )
    return layers


def projections(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules that produce "q", "k" and "v" in one layer.

    Raises:
        UserError: the attention has another structure.
    """
    attention = getattr(layer, "attention", None)
    attention = getattr(attention, "self", attention)
    found = {key: getattr(attention, name, None) for key, name in _PROJECTIONS.items()}
    if not all(isinstance(module, nn.Module) for module in found.values()):
        raise UserError(
            f"{type(layer).__name__} has no query, key and value at attention or attention.self: "
            "only BERT-like encoders can be read"
        )
    return found


@contextlib.contextmanager
def capture(
    model: nn.Module, layer: int = -1, what: Sequence[str] = ("q", "k", "v", "hidden")
) -> Iterator[dict[str, Tensor]]:
    """Collects a layer's tensors during the forwards inside the block; the last forward counts.

    Args:
        model: a BERT-like Hugging Face model or one of fastffn's.
        layer: index of the layer; negative ones count from the end.
        what: "q", "k", "v" (before the split into heads) and "hidden" (the layer's output).

    Yields:
        A dict that each forward fills: name -> [batch, length, width], not detached.

    Raises:
        UserError: an unknown structure, layer or name. At the end of the block: nothing was
            captured, because no forward passed through that layer.
    """
    layers = encoder_layers(model)
    if not -len(layers) <= layer < len(layers):
        raise UserError(f"layer {layer} does not exist: the encoder has {len(layers)} layers")
    sources = {**projections(layers[layer]), "hidden": layers[layer]}
    if unknown := set(what) - set(sources):
        raise UserError(f"cannot capture {sorted(unknown)}: choose among {list(sources)}")
    states: dict[str, Tensor] = {}

    def store(name):
        def hook(module, args, output):
            states[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [sources[name].register_forward_hook(store(name)) for name in what]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
    if missing := set(what) - set(states):
        raise UserError(f"no {sorted(missing)} passed layer {layer}: run the model in the block")
