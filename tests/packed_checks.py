"""Random encoders for the tests of csrc's `Encoder`, and what they compute by the formula in torch.

`rounded` says how a product's operands are rounded, as csrc/cpu/gemm.h does: sums, norms, attention
and programs are then those of the formula's dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from fastffn.expr.genes import Z1, Z2, ZG, X
from fastffn.ops import backend, reference
from fastffn.ops.ffn_plan import plan
from fastffn.serve.packing import _segment

EPS = 1e-3


@dataclass
class Linear:
    weight: Tensor
    bias: Tensor | None

    def tuple(self):
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return self.weight.data_ptr(), bias, len(self.weight)


@dataclass
class Norm:
    weight: Tensor | None
    bias: Tensor | None

    def tuple(self):
        return *(0 if x is None else x.data_ptr() for x in (self.weight, self.bias)), EPS

    def __call__(self, x: Tensor) -> Tensor:
        vectors = (None if v is None else v.to(x) for v in (self.weight, self.bias))
        return F.layer_norm(x, x.shape[-1:], *vectors, EPS)


@dataclass
class Unit:
    gene: str
    first: list[Linear]  # up, or up and gate
    down: Linear
    norm: Norm


@dataclass
class Layer:
    qkv: list[Linear]
    output: Linear
    scale: float
    norm: Norm | None
    units: list[Unit]
    cosines: Tensor | None = None
    sines: Tensor | None = None
    window: int = -1  # all


@dataclass
class Embeddings:
    words: Tensor
    positions: Tensor
    norm: Norm
    segments: Tensor | None = None
    before: Linear | None = None
    trigram: bool = False
    after: Linear | None = None


@dataclass
class Model:
    hidden: int
    heads: int
    layers: list[Layer] = field(default_factory=list)
    last: Norm | None = None  # behind all layers: their norms then stand before
    order: list[int] | None = None
    embeddings: Embeddings | None = None


class Maker:
    """Random weights of usual sizes; `whole` False: some biases and norms' weights are absent."""

    def __init__(self, seed: int = 0, whole: bool = True):
        self.generator = torch.Generator().manual_seed(seed)
        self.whole = whole

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def is_there(self) -> bool:
        return self.whole or bool(torch.rand((), generator=self.generator) < 0.5)

    def linear(self, inputs: int, outputs: int) -> Linear:
        weight = self.normal(outputs, inputs) / inputs**0.5
        return Linear(weight, self.normal(outputs) * 0.3 if self.is_there() else None)

    def norm(self, width: int) -> Norm:
        weight = 1 + 0.3 * self.normal(width) if self.is_there() else None
        return Norm(weight, 0.3 * self.normal(width) if self.is_there() else None)

    def unit(self, hidden: int, width: int, gene: str) -> Unit:
        first = [self.linear(hidden, width) for _ in range(1 + plan(gene).gated)]
        return Unit(gene, first, self.linear(width, hidden), self.norm(hidden))

    def layer(self, hidden: int, heads: int, units: Sequence[tuple[int, str]]) -> Layer:
        qkv = [self.linear(hidden, hidden) for _ in range(3)]
        made = [self.unit(hidden, width, gene) for width, gene in units]
        scale = (hidden // heads) ** -0.5
        return Layer(qkv, self.linear(hidden, hidden), scale, self.norm(hidden), made)


@dataclass
class Held:
    """An encoder with the tables that it does not copy."""

    run: Callable
    model: Model


def packed(model: Model, precision: str = "float32") -> Held:
    """csrc's Encoder of it."""
    encoder = backend.cpp()[0].Encoder(
        model.hidden,
        model.heads,
        model.hidden // model.heads,
        precision,
        model.last is not None,
    )
    for layer in model.layers:
        units = []
        for unit in layer.units:
            parts = plan(unit.gene)
            segments = (_segment(part) for part in (parts.prologue, parts.middle, parts.epilogue))
            first = [part.tuple() for part in unit.first]
            width = unit.down.weight.shape[1]
            units.append((first, unit.down.tuple(), width, *segments, unit.norm.tuple()))
        qkv = [part.tuple() for part in layer.qkv]
        encoder.add_layer(
            qkv,
            layer.output.tuple(),
            layer.scale,
            None if layer.norm is None else layer.norm.tuple(),
            units,
            *(0 if x is None else x.data_ptr() for x in (layer.cosines, layer.sines)),
            0 if layer.cosines is None else len(layer.cosines),
            layer.window,
        )
    if model.last is not None:
        encoder.set_last_norm(model.last.tuple())
    for index in (model.order or [])[len(model.layers) :]:
        encoder.repeat_layer(index)
    if (e := model.embeddings) is not None:
        encoder.set_embeddings(
            e.words.data_ptr(),
            *e.words.shape,
            e.trigram,
            None if e.before is None else e.before.tuple(),
            e.positions.data_ptr(),
            len(e.positions),
            0 if e.segments is None else e.segments.data_ptr(),
            0 if e.segments is None else len(e.segments),
            e.norm.tuple(),
            None if e.after is None else e.after.tuple(),
        )
    return Held(encoder.run, model)


def run(encoder, starts: Tensor, hidden: Tensor | int, threads: int = 1, bias=None, **tokens):
    """The encoder's result; `hidden`: what the layers begin with, or H where `ids` are given.

    Rows before and behind the result are checked to stay what they were.
    """
    rows, width = int(starts[-1]), hidden if isinstance(hidden, int) else hidden.shape[1]
    guarded = torch.full((rows + 2, width), 7.0)
    out = guarded[1 : rows + 1]
    if not isinstance(hidden, int):
        out.copy_(hidden)
    given = [tokens.get(name) for name in ("ids", "places", "kinds")]
    addresses = [0 if x is None else x.data_ptr() for x in given]
    bias_of = (0, 0) if bias is None else (bias.data_ptr(), bias.shape[-1])
    encoder.run(*addresses, out.data_ptr(), starts.data_ptr(), len(starts) - 1, threads, *bias_of)
    assert (guarded[[0, -1]] == 7).all()
    return out.clone()


def plain(x: Tensor) -> Tensor:
    return x


def bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def bytes_of_rows(x: Tensor) -> Tensor:
    """Rows of activations in 8 bits with a zero point; the range holds 0."""
    single = x.float()
    low, high = single.amin(-1, True).clamp(max=0), single.amax(-1, True).clamp(min=0)
    scale = high / 255 - low / 255
    scale = torch.where(scale > 1e-30, scale, torch.ones_like(scale))
    zero = (-low / scale + 0.5).floor()
    q = (single / scale + zero + 0.5).clamp(0, 255).floor()
    return (q - zero).to(x.dtype) * scale.to(x.dtype)


def bytes_of_weights(weight: Tensor) -> Tensor:
    """Each output's weights in -127 .. 127."""
    scale = weight.float().abs().amax(-1, True) / 127
    q = (weight.float() / torch.where(scale > 0, scale, torch.ones_like(scale))).round()
    return q.to(weight.dtype) * scale.to(weight.dtype)


ROUNDINGS: dict[str, tuple[Callable, Callable]] = {  # of rows, of weights
    "float32": (plain, plain),
    "bfloat16": (bfloat16, bfloat16),
    "int8": (bytes_of_rows, bytes_of_weights),
}


def product(x: Tensor, layer: Linear, precision: str) -> Tensor:
    rows, weights = ROUNDINGS[precision]
    bias = None if layer.bias is None else layer.bias.to(x)
    return F.linear(rows(x), weights(layer.weight.to(x)), bias)


def formula(model: Model, hidden: Tensor, starts: Tensor, bias=None, precision: str = "float32"):
    """What the layers make of [tokens, H], in the dtype of `hidden`."""
    h = hidden
    for index in model.order or range(len(model.layers)):
        layer = model.layers[index]
        before = model.last is not None
        x = layer.norm(h) if before and layer.norm is not None else h
        q, k, v = (product(x, part, precision) for part in layer.qkv)
        if layer.cosines is not None:
            q, k = (rotated(x, layer, starts, model.heads) for x in (q, k))
        mixed = attention(q, k, v, starts, model.heads, layer.scale, bias, layer.window)
        h = h + product(mixed, layer.output, precision)
        h = h if before else layer.norm(h)
        for unit in layer.units:
            x = unit.norm(h) if before else h
            h = h + feed_forward(unit, x, precision)
            h = h if before else unit.norm(h)
    return h if model.last is None else model.last(h)


def rotated(x: Tensor, layer: Layer, starts: Tensor, heads: int) -> Tensor:
    places = torch.arange(len(x)) - starts[:-1].repeat_interleave(starts.diff())
    cosine, sine = (t[places][:, None].to(x) for t in (layer.cosines, layer.sines))
    a, b = x.unflatten(1, (heads, -1)).chunk(2, -1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1).flatten(1)


def attention(q, k, v, starts, heads, scale, bias, window=-1):
    parts = [q[:0]]
    for first, last in pairwise(starts.tolist()):
        one, two, three = (
            x[first:last].unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v)
        )
        scores = one @ two.mT * scale
        if bias is not None:
            scores = scores + bias[:, : last - first, : last - first].to(scores)
        if window >= 0:
            columns = torch.arange(last - first)
            far = (columns[:, None] - columns).abs() > window
            scores = scores.masked_fill(far, float("-inf"))
        parts.append((scores.softmax(-1) @ three).transpose(0, 1).flatten(1))
    return torch.cat(parts)


def feed_forward(unit: Unit, h: Tensor, precision: str) -> Tensor:
    parts = plan(unit.gene)
    x = h if parts.prologue is None else reference.elementwise(parts.prologue.expr, {X: h})
    inputs = dict(zip((Z1, ZG), (product(x, part, precision) for part in unit.first), strict=False))
    inputs[X] = h[:, : unit.down.weight.shape[1]]
    a = reference.elementwise(parts.middle.expr, inputs)
    z2 = product(a, unit.down, precision)
    return reference.elementwise(parts.epilogue.expr, {Z2: z2, X: h})


def embedded(model: Model, starts, ids, places=None, kinds=None, precision="float32", dtype=None):
    """What the layers begin with, [tokens, H]."""
    e, dtype = model.embeddings, dtype or torch.float64
    precision = "float32" if precision == "int8" else precision  # tables are not in 8 bits
    words, count = e.words[ids].to(dtype), len(ids)
    if e.trigram:
        before, after = torch.zeros_like(words), torch.zeros_like(words)
        for first, last in pairwise(starts.tolist()):
            for row in range(first, last):
                own = places[row] if places is not None else row
                near = (
                    {}
                    if places is None
                    else {
                        at: int(places[at] - own) for at in (row - 1, row + 1) if first <= at < last
                    }
                )
                if row > first and near.get(row - 1, -1) == -1:
                    before[row] = words[row - 1]
                if row + 1 < last and near.get(row + 1, 1) == 1:
                    after[row] = words[row + 1]
        words = torch.cat((before, words, after), 1)
    if e.before is not None:
        words = product(words, e.before, precision)
    if places is None:
        lengths = starts.diff()
        places = torch.arange(count) - starts[:-1].repeat_interleave(lengths)
    total = words + e.positions[places].to(dtype)
    if e.segments is not None:
        total = total + e.segments[torch.zeros(count, dtype=int) if kinds is None else kinds].to(
            dtype
        )
    total = e.norm(total)
    return total if e.after is None else product(total, e.after, precision)
