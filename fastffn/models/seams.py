"""The forwards that `patch` puts into modules of transformers: one for each way a layer is cut.

    AddNorm        a module (x, residual) -> norm(residual + dropout(product(x))): BERT's outputs
    Intermediate   f(up(x)), and `Output`, what comes behind it: together the op `ffn`. The first
                   hands x on as it is, and the second, getting one tensor twice, computes it all
    Attending      a module that calls its attention and normalises the sum: MPNet's
    Attention      the same, with the projections in it: ALBERT's
    Layer          a layer that does so with its feed-forward part, or both parts: DistilBERT's
    Inner          f(up(x)) of a pre-norm layer, gated or not, with whatever else the module does

Each takes the place of a forward of transformers 5 and calls what it calls, in its order, wherever
the ops do not apply.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..functional import elementwise, residual_norm
from ..layers.ffn import is_plain
from ..ops import ffn as op
from ..ops.elementwise import is_decomposed
from ..ops.elementwise import is_plain as is_unwatched
from ..ops.matmul import linear
from . import worthwhile
from .modeling_efficientbert import eager_attention
from .pieces import activation_name, find

PAIR = "_fastffn_pair"


class Patched:
    """The first base of a patched module's class.

    Class attributes:
        original: the class that it had.
        paths: from the module to the pieces that the forward uses, by the names of `Pieces`.
        primitive: of the activation; "" if it is none of ours.
        recompute: as in `patch`.
    """

    original: type[nn.Module]
    paths: dict[str, str]
    primitive: str
    recompute: str

    def __reduce_ex__(self, protocol):  # the class is made at run time and has no place of its own
        cls = type(self)
        settings = tuple(cls.paths.items()), cls.primitive, cls.recompute
        return _blank, (cls.seam, cls.original, *settings), self.__dict__

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), "by fastffn")))

    def piece(self, name: str):
        """What the module has by that name of `Pieces`; None if nothing."""
        path = self.paths.get(name)
        return find(self, path) if path else None


@functools.cache
def patched_class(
    seam: type, original: type, paths: tuple[tuple[str, str], ...], primitive: str, recompute: str
) -> type[nn.Module]:
    """A class of the original's name that has the forward of `seam`; the same one at every call."""
    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "seam": seam,
        "original": original,
        "paths": dict(paths),
        "primitive": primitive,
        "recompute": recompute,
    }
    return type(original.__name__, (seam, original), names)


def _blank(*settings) -> nn.Module:
    cls = patched_class(*settings)
    return cls.__new__(cls)


def is_bare(module: nn.Module | None) -> bool:
    """Whether nobody watches what goes into the module and comes out of it."""
    return module is None or not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def computes(activation, primitive: str) -> bool:
    """Whether an activation is that primitive still, and nobody watches it."""
    bare = not isinstance(activation, nn.Module) or is_bare(activation)
    return bare and activation_name(activation) == primitive


def share(dropout: nn.Dropout | None) -> float:
    """The probability that is in force."""
    return dropout.p if dropout is not None and dropout.training else 0.0


def _ends_plainly(norm: nn.Module, dropout: nn.Module | None, width: int) -> bool:
    return (
        is_plain(norm, nn.LayerNorm)
        and norm.normalized_shape == (width,)
        and is_plain(dropout, nn.Dropout)
        and (dropout is None or dropout.p < 1)
    )


def _as_torch(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The ops end in float32 under autocast, and so does torch on a GPU; on a CPU it leaves a norm
    in the type of what it normalises."""
    return y.to(dtype) if y.device.type == "cpu" else y


def add_norm(x: Tensor, residual: Tensor, norm: nn.Module, dropout: nn.Module | None) -> Tensor:
    """norm(residual + dropout(x)), each [.., H]."""
    pays = worthwhile.residual_norm(x, residual, share(dropout))
    if pays and x.shape == residual.shape and _ends_plainly(norm, dropout, x.shape[-1]):
        y = residual_norm(x, residual, norm.weight, norm.bias, share(dropout), norm.eps)
        return _as_torch(y, torch.promote_types(x.dtype, residual.dtype))
    return norm((x if dropout is None else dropout(x)) + residual)


@dataclass
class Unit:
    """The modules of a post-norm feed-forward part, as they are at one call."""

    up: nn.Module
    down: nn.Module
    norm: nn.Module
    dropout: nn.Module | None

    def takes(self, x: Tensor) -> bool:
        """Whether the op may stand for the modules."""
        up, down = self.up, self.down
        if not (is_plain(up, nn.Linear) and is_plain(down, nn.Linear)):
            return False
        width, hidden = up.weight.shape
        autocast = x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)
        return (
            x.dim() > 0
            and x.shape[-1] == hidden
            and down.weight.shape == (hidden, width)
            and down.weight.dtype == up.weight.dtype
            and (x.dtype == up.weight.dtype or autocast)
            and x.is_floating_point()
            and _ends_plainly(self.norm, self.dropout, hidden)
        )

    def run(self, x: Tensor, primitive: str, recompute: str) -> Tensor:
        """norm(x + dropout(down(f(up(x)))))."""
        up, down, norm = self.up, self.down, self.norm
        operands = [x, up.weight, up.bias, None, None, down.weight, down.bias]
        operands += [norm.weight, norm.bias, None]
        gene, widths = f"down({primitive}(up(x)))", (up.weight.shape[0],)
        settings = gene, widths, share(self.dropout), norm.eps, recompute
        return _as_torch(op.run(operands, settings)[0], x.dtype)


@dataclass
class Pair:
    """Intermediate and output of one layer, which know of each other by this and not as children:
    a child of both would stand twice in the state dict."""

    intermediate: nn.Module
    output: nn.Module

    def unit(self) -> Unit:
        output = self.output
        ends = [output.piece(name) for name in ("down", "norm", "dropout")]
        return Unit(self.intermediate.piece("up"), *ends)

    def joins(self, module: nn.Module, x: Tensor) -> bool:
        """Whether `module`, one of the two or a copy by DataParallel, leaves all to the output."""
        if not worthwhile.whole_unit(x, module.primitive, module.recompute):
            return False
        return (
            self.intermediate is module
            and isinstance(self.output, Patched)
            and is_bare(module)
            and is_bare(self.output)
            and computes(module.piece("activation"), module.primitive)
            and self.unit().takes(x)
        )


class AddNorm(Patched):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        x = self.piece("down")(hidden_states)
        return add_norm(x, input_tensor, self.piece("norm"), self.piece("dropout"))


class Intermediate(Patched):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if self._fastffn_pair.joins(self, hidden_states):
            return hidden_states
        return super().forward(hidden_states)


class Output(AddNorm):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if hidden_states is input_tensor:
            unit = self._fastffn_pair.unit()
            return unit.run(input_tensor, self.primitive, self.recompute)
        return super().forward(hidden_states, input_tensor)


class Attending(Patched):
    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple:
        mixed, *others = self.piece("attention")(hidden_states, *args, **kwargs)
        y = add_norm(mixed, hidden_states, self.piece("norm"), self.piece("dropout"))
        return y, *others


class Attention(Patched):
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query, key, value = (
            layer(hidden_states).view(heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        mixed, probabilities = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=share(self.attention_dropout),
            scaling=self.scaling,
            **kwargs,
        )
        x = self.piece("output")(mixed.reshape(*hidden_states.shape[:-1], -1))
        y = add_norm(x, hidden_states, self.piece("norm"), self.piece("dropout"))
        return y, probabilities


class Layer(Patched):
    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        x = self.piece("attention")(hidden_states, *args, **kwargs)[0]
        norm = self.piece("output_norm")
        x = x if norm is None else add_norm(x, hidden_states, norm, None)
        names = ("up", "down", "norm", "dropout")
        unit, whole = Unit(*map(self.piece, names)), self.piece("whole")
        activation = self.piece("activation")
        pays = self.primitive and worthwhile.whole_unit(x, self.primitive, self.recompute)
        if pays and is_bare(whole) and computes(activation, self.primitive) and unit.takes(x):
            return unit.run(x, self.primitive, self.recompute)
        if whole is not None:
            return add_norm(whole(x), x, unit.norm, None)
        return add_norm(unit.down(activation(unit.up(x))), x, unit.norm, unit.dropout)


class Inner(Patched):
    def forward(self, hidden_states: Tensor) -> Tensor:
        norm, packed, gate = self.piece("norm"), self.piece("packed"), self.piece("gate")
        x = hidden_states if norm is None else norm(hidden_states)
        if packed is None:
            x = self.activate(product(self.piece("up"), x), None if gate is None else gate(x))
        else:
            x = self.activate(*product(packed, x).chunk(2, dim=-1))
        dropout, down = self.piece("inner_dropout"), self.piece("down")
        x = x if dropout is None else dropout(x)
        return x if down is None else product(down, x)

    def activate(self, up: Tensor, gate: Tensor | None) -> Tensor:
        activation, gated = self.piece("activation"), gate is not None
        pays = worthwhile.elementwise(up, self.primitive, gated)
        if pays and computes(activation, self.primitive):
            if gated:
                return elementwise(f"mul({self.primitive}(a), b)", a=up, b=gate)
            return elementwise(f"{self.primitive}(a)", a=up)
        return activation(up) * gate if gated else activation(up)


def product(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x); of a plain one in inference by the library that is fast on this processor."""
    if (
        torch.is_grad_enabled()
        or not worthwhile.faster_products(x)
        or not is_plain(layer, nn.Linear)
        or not is_unwatched((x, layer.weight))
        or is_decomposed()
    ):
        return layer(x)
    rows = linear(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias)
    return rows.view(*x.shape[:-1], rows.shape[-1])
