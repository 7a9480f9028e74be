"""`patch`: fastffn's ops inside a Hugging Face encoder, whose modules and weights stay as they are.

What is computed otherwise, by the row of the architecture (`architectures`, `pieces`):

    post-norm    LayerNorm(x + dropout(down(f(up(x)))))          the op `ffn`, one for the whole
                 LayerNorm(x + dropout(output(attention)))       `residual_norm` behind the product
    pre-norm     f(up(x)), or f(up(x)) * gate(x)                 the op `elementwise`

A module whose forward changes gets another class, a subclass of its own with one more base that
holds the new forward (`seams`). Nothing else about it changes: parameters, names, `state_dict`,
hooks, `isinstance`, the name of its class. Why not a function set as the instance's `forward`:
transformers' gradient checkpointing, which sits in the forward of the class, would be lost, and
copies would be bound to the module that they were copied from.

The op stands for the modules as long as calling them would do nothing else. With hooks, adapters
(LoRA), quantised replacements or parametrisations on them they are called one by one, as before.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ..errors import UserError
from ..layers.ffn import RECOMPUTE
from . import seams
from .architectures import Encoder, encoders
from .pieces import Pieces, find


def patch(model: nn.Module, recompute: str = "none") -> nn.Module:
    """Makes the encoders in a model compute by fastffn's ops, in inference and in training.

    BERT, RoBERTa, XLM-R, DistilBERT, ELECTRA, MPNet, ModernBERT, DeBERTa-v2, ALBERT, ViT and their
    like, with any head and inside of whatever holds them (sentence-transformers, PEFT, DDP).
    Weights, names and files are the same, outputs too but for rounding; in training with dropout
    the masks are others. Encoders of fastffn have its ops already and stay as they are.

    Args:
        model: changed in place. Patching it again changes `recompute` alone.
        recompute: of post-norm feed-forward parts, what the backward computes again instead of
            keeping: "none"; "activation", the elementwise part; "all", the products too.

    Returns:
        The model.

    Raises:
        UserError: no encoder in it is known, or it is not built as its architecture says; or an
            unknown `recompute`. Then nothing is changed.
    """
    if recompute not in RECOMPUTE:
        raise UserError(f"recompute: expected one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    changes = [
        change
        for encoder in encoders(model)
        if not encoder.architecture.pieces.fused
        for k in range(len(encoder.layers))
        for change in _changes(encoder, k, recompute)
    ]
    for module, cls, pair in changes:
        module.__class__ = cls
        module.__dict__.pop(seams.PAIR, None)
        if pair is not None:
            module.__dict__[seams.PAIR] = pair
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes `patch`, in place: every module has the class that it had. Returns the model."""
    for module in model.modules():
        if isinstance(module, seams.Patched):
            module.__class__ = module.original
            module.__dict__.pop(seams.PAIR, None)
    return model


class _Change(NamedTuple):
    module: nn.Module
    cls: type[nn.Module]
    pair: seams.Pair | None = None


def _changes(encoder: Encoder, k: int, recompute: str) -> list[_Change]:
    """What is to be done to the modules of a layer; raises UserError if it is built otherwise."""
    feed_forward = encoder.feed_forward(k)
    encoder.attention_block(k)  # is there
    row, attention = encoder.architecture.pieces, encoder.architecture.attention
    layer = _Layer(encoder.layers[k], feed_forward.activation, recompute)
    if row.pre_norm:
        return [_inner(layer, row)] if feed_forward.activation else []
    return [*_attention(layer, row, attention), *_feed_forward(layer, row, attention)]


class _Layer(NamedTuple):
    module: nn.Module
    primitive: str
    recompute: str

    def change(self, seam: type, owner: str, pair: seams.Pair | None = None, **paths: str):
        """The module at `owner` gets the forward of `seam`, which finds there what of `paths` lies
        within it."""
        module = find(self.module, owner)
        original = module.original if isinstance(module, seams.Patched) else type(module)
        if not original.forward.__module__.startswith("transformers.models."):
            raise UserError(
                f"{original.__name__} has a forward that is not of transformers: what it computes "
                "is not known, so it cannot be patched"
            )
        inside = {name: _within(path, owner) for name, path in paths.items()}
        inside = tuple((name, path) for name, path in inside.items() if path)
        cls = seams.patched_class(seam, original, inside, self.primitive, self.recompute)
        return _Change(module, cls, pair)


def _attention(layer: _Layer, row: Pieces, attention: str) -> Iterator[_Change]:
    """The end of attention, by who applies its norm."""
    owner, ends = _owner(row.output_norm), {"norm": row.output_norm, "dropout": row.output_dropout}
    if owner == _owner(row.output) == attention:
        yield layer.change(seams.Attention, owner, output=row.output, **ends)
    elif owner == _owner(row.output):
        yield layer.change(seams.AddNorm, owner, down=row.output, **ends)
    elif owner:
        yield layer.change(seams.Attending, owner, attention=attention, **ends)


def _feed_forward(layer: _Layer, row: Pieces, attention: str) -> Iterator[_Change]:
    """A post-norm feed-forward part, by who applies its norm."""
    ends = {"down": row.down, "norm": row.norm, "dropout": row.dropout}
    begins = {"up": row.up, "activation": row.activation}
    if not _owner(row.norm):
        mine = {} if _owner(row.output_norm) else {"output_norm": row.output_norm}
        parts = {"attention": attention, "whole": _owner(row.down), **mine, **begins, **ends}
        yield layer.change(seams.Layer, "", **parts)
    elif not layer.primitive:
        yield layer.change(seams.AddNorm, _owner(row.down), **ends)
    else:
        first, last = _owner(row.up), _owner(row.down)
        pair = seams.Pair(find(layer.module, first), find(layer.module, last))
        yield layer.change(seams.Intermediate, first, pair, **begins)
        yield layer.change(seams.Output, last, pair, **ends)


def _inner(layer: _Layer, row: Pieces) -> _Change:
    """A pre-norm feed-forward part, as far as one module holds it."""
    names = ("norm", "up", "packed", "gate", "activation", "inner_dropout", "down")
    return layer.change(
        seams.Inner, _owner(row.packed or row.up), **{name: getattr(row, name) for name in names}
    )


def _owner(path: str) -> str:
    """The path of the module that holds what lies at this one."""
    return path.rpartition(".")[0]


def _within(path: str, owner: str) -> str:
    """The path from an owner, "" if it is not inside of it."""
    if not owner:
        return path
    return path.removeprefix(f"{owner}.") if path.startswith(f"{owner}.") else ""
