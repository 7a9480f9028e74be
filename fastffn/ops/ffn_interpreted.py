"""The block by torch's products and interpreted Programs: no gene needs a compilation.

Rows go through the whole unit in slabs, so that temporaries are the size of a slab, not of the
batch. A slab's size depends on the widths alone: whatever is computed again in the backward is
computed in the same pieces by the same calls, and comes out bit for bit the same.

Genes that share a prologue share the first product: it is computed once at the largest width, and
each gene takes its leading columns.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..expr.genes import Z1, Z2, ZG, X
from . import execute, row_kernel
from .execute import HALVES, compute_dtype
from .ffn_plan import Plan, Segment
from .matmul import linear, weight_gradient

# Bytes of a slab of the widest intermediate. Shorter slabs were no faster (docs/design.md), and
# each costs an addition to the weights' gradients: none has fewer than _MIN_ROWS rows.
_SLAB_BYTES = 8 << 20
_MIN_ROWS = 1024


@dataclass
class Call:
    """Operands of one call; matrices, see `ffn`. All genes have the prologue of the first."""

    x: Tensor
    up: Tensor
    up_bias: Tensor | None
    gate: Tensor | None
    gate_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    seed: Tensor | None
    plans: Sequence[Plan]
    widths: Sequence[int]
    threshold: int
    eps: float

    def __post_init__(self):
        self.width = max(self.widths)
        self.dtype = self.up.dtype
        self.stat_dtype = compute_dtype(self.x, self.up, self.norm_weight, self.norm_bias)

    def slabs(self) -> Iterator[slice]:
        """The pieces of the rows; slice(None) if there is but one."""
        rows = self.x.shape[0]
        widest = max(self.x.shape[1], self.width)
        size = max(_MIN_ROWS, _SLAB_BYTES // (widest * self.up.element_size()) & -64)
        if self.x.device.type != "cpu" or rows <= size + size // 2:
            yield slice(None)
            return
        for start in range(0, rows, size):
            yield slice(start, start + size)

    @functools.cached_property
    def parts(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of up, and of gate if there is one, at the width of this call."""
        parts = [(self.up, self.up_bias)]
        parts += [(self.gate, self.gate_bias)] if self.gate is not None else []
        if self.width == self.up.shape[0]:
            return parts
        return [
            (weight[: self.width], None if bias is None else bias[: self.width])
            for weight, bias in parts
        ]

    @functools.cached_property
    def expansion(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the first product: up, or up and gate as one."""
        if len(self.parts) == 1:
            return self.parts[0]
        weights, biases = zip(*self.parts, strict=True)
        if biases[0] is None and biases[1] is None:
            return torch.cat(weights), None
        biases = [w.new_zeros(self.width) if b is None else b for w, b in self.parts]
        return torch.cat(weights), torch.cat(biases)

    def _is_long(self, rows: int) -> bool:
        """Whether it pays to put up and gate together: that copies both, 2 I H numbers; else their
        products are put together, 2 I numbers a row."""
        return len(self.parts) == 1 or rows > 4 * self.x.shape[1]

    def expand(self, p: Tensor) -> Tensor:
        """The first product of some rows: [rows, I], or [rows, 2 I] with the gate's part behind."""
        if self._is_long(p.shape[0]):
            return linear(p, *self.expansion)
        return torch.cat([linear(p, *part) for part in self.parts], dim=1)

    def expand_backward(self, dz: Tensor) -> Tensor:
        """The gradient of p from that of the first product."""
        if self._is_long(dz.shape[0]):
            return linear(dz, self.expansion[0].t())
        (up, _), (gate, _) = self.parts
        return linear(dz[:, : self.width], up.t()) + linear(dz[:, self.width :], gate.t())

    def contraction(self, width: int) -> Tensor:
        """The leading columns of the second product's weight."""
        return self.down if width == self.down.shape[1] else self.down[:, :width]

    def seed_of(self, k: int) -> Tensor | None:
        return None if self.seed is None else self.seed[k : k + 1]


def matrix(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised [rows, columns]: what `forward` keeps."""
    return like.new_empty((rows, columns))


class _Whole:
    """A matrix of all rows, put together from slabs; of a single slab it is that tensor itself."""

    def __init__(self, rows: int):
        self.rows = rows
        self.tensor: Tensor | None = None

    def put(self, part: slice, value: Tensor) -> None:
        if part == slice(None):
            self.tensor = value
            return
        if self.tensor is None:
            self.tensor = matrix(value, self.rows, value.shape[1])
        self.tensor[part] = value


def _rows(x: Tensor, part: slice) -> Tensor:
    return x if part == slice(None) else x[part]


def _value(segment: Segment, sources: dict[str, Tensor], out: Tensor) -> Tensor:
    inputs = [sources[name] for name in segment.inputs]
    execute.elementwise(segment.value, out.shape, inputs, [out])
    return out


def prologue_of(call: Call, x: Tensor) -> Tensor:
    segment = call.plans[0].prologue
    if segment is None:
        return x if x.dtype == call.dtype else x.to(call.dtype)
    return _value(segment, {X: x}, x.new_empty(x.shape, dtype=call.dtype))


def sources_of(call: Call, k: int, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """What gene k's middle may read: leading columns of the first product, and of x."""
    width = call.widths[k]
    sources = {Z1: z if width == z.shape[1] else z[:, :width]}
    plan = call.plans[k]
    if plan.gated:
        sources[ZG] = z[:, call.width : call.width + width]
    if plan.middle.reads_x:
        sources[X] = x if width == x.shape[1] else x[:, :width]
    return sources


def _activation(call: Call, k: int, x: Tensor, z: Tensor, in_place: bool = False) -> Tensor:
    """In z's memory if `in_place`: a Program writes its only output at its end."""
    sources = sources_of(call, k, x, z)
    out = sources[Z1] if in_place else z.new_empty(sources[Z1].shape)
    return _value(call.plans[k].middle, sources, out)


def _epilogue_inputs(plan: Plan, x: Tensor, z2: Tensor) -> list[Tensor]:
    return [z2 if name == Z2 else x for name in plan.epilogue.inputs]


def forward(call: Call, outputs: Sequence[Tensor], recompute: str | None) -> list[Tensor]:
    """Fills the outputs of the genes; returns what the backward wants kept besides the operands.

    Args:
        outputs: [rows, H], one per gene.
        recompute: None keeps nothing. "all": mean and rstd of each gene's rows, [2, rows]. And
            "activation": the first product z, and each gene's second product z2. And "none": each
            gene's activation.
    """
    x, genes = call.x, range(len(call.plans))
    rows = x.shape[0]
    stats = [None] * len(genes)
    if recompute is not None:
        stats = [x.new_empty((2, rows), dtype=call.stat_dtype) for _ in genes]
    keep_products = recompute in ("none", "activation")
    kept_z = _Whole(rows)
    kept_z2, kept_a = [_Whole(rows) for _ in genes], [_Whole(rows) for _ in genes]
    for part in call.slabs():
        xs = _rows(x, part)
        z = call.expand(prologue_of(call, xs))
        if keep_products:
            kept_z.put(part, z)
        for k in genes:
            a = _activation(call, k, xs, z, in_place=not keep_products and len(genes) == 1)
            z2 = linear(a, call.contraction(call.widths[k]), call.down_bias)
            if keep_products:
                kept_z2[k].put(part, z2)
            if recompute == "none":
                kept_a[k].put(part, a)
            row_kernel.forward(
                call.plans[k].epilogue.value,
                _epilogue_inputs(call.plans[k], xs, z2),
                xs,
                call.norm_weight,
                call.norm_bias,
                call.eps,
                call.threshold,
                call.seed_of(k),
                _rows(outputs[k], part),
                stats[k] if stats[k] is None or part == slice(None) else stats[k][:, part],
                row=part.start or 0,
            )
    if recompute is None:
        return []
    wholes = [kept_z, *kept_z2] if keep_products else []
    wholes += kept_a if recompute == "none" else []
    return stats + [whole.tensor for whole in wholes]


@dataclass
class Gradients:
    """Of the operands, in their order; None where nobody wants it."""

    x: Tensor | None = None
    up: Tensor | None = None
    up_bias: Tensor | None = None
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    down: Tensor | None = None
    down_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


def backward(
    call: Call,
    kept: Sequence[Tensor],
    recompute: str,
    grads: Sequence[Tensor],
    wants_x: bool,
    wants_weights: bool,
) -> Gradients:
    """Gradients from those of the outputs; `kept` and `recompute` as in `forward`."""
    x, count = call.x, len(call.plans)
    stats, kept = kept[:count], kept[count:]
    kept_z = kept[0] if kept else None
    kept_z2 = kept[1 : 1 + count] or [None] * count
    kept_a = kept[1 + count :] or [None] * count
    order = sorted(range(count), key=lambda k: -call.widths[k])  # see `add`
    dx = x.new_empty(x.shape)
    total: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        """Adds what a slab or a gene contributes to a leading part: the first is the widest. Halves
        are added in float32."""
        if name not in total:
            total[name] = value
            return
        if total[name].dtype in HALVES:
            total[name] = total[name].float()
        total[name][tuple(slice(size) for size in value.shape)] += value

    for part in call.slabs():
        xs, dxs = _rows(x, part), _rows(dx, part)
        p = prologue_of(call, xs)
        z = call.expand(p) if kept_z is None else _rows(kept_z, part)
        dz = z.new_empty(z.shape)
        for k in order:
            first, plan, width = k == order[0], call.plans[k], call.widths[k]
            a = _activation(call, k, xs, z) if kept_a[k] is None else _rows(kept_a[k], part)
            down = call.contraction(width)
            z2 = linear(a, down, call.down_bias) if kept_z2[k] is None else _rows(kept_z2[k], part)
            into = dxs if first else torch.empty_like(dxs)
            dz2 = torch.empty_like(z2)
            reads_x = plan.epilogue.reads_x
            vectors = row_kernel.backward(
                plan.epilogue.value,
                _epilogue_inputs(plan, xs, z2),
                xs,
                call.norm_weight,
                call.threshold,
                call.seed_of(k),
                stats[k] if part == slice(None) else stats[k][:, part],
                _rows(grads[k], part),
                plan.epilogue.gradient,
                _epilogue_inputs(plan, into, dz2),
                None if reads_x else into,
                plan.epilogue.inputs.index(X) if reads_x else -1,
                (plan.epilogue.inputs.index(Z2),),
                row=part.start or 0,
            )
            add("vectors", vectors)
            da = linear(dz2, down.t())
            if wants_weights:
                add("down", weight_gradient(dz2, a))
            add("up_bias", _middle_backward(call, k, xs, z, da, into, dz, first))
            if not first:
                dxs += into
        if wants_weights:
            add("up", weight_gradient(dz, p))
        if wants_x:
            _prologue_backward(call, xs, call.expand_backward(dz), dxs)
    return gradients_of(call, dx if wants_x else None, total)


def _middle_backward(
    call: Call, k: int, x: Tensor, z: Tensor, da: Tensor, dx: Tensor, dz: Tensor, first: bool
) -> Tensor:
    """Writes gene k's gradient of the first product into `dz` (adds it, if not `first`) and adds to
    dx[:, :width] what its middle contributes; returns the columns' sums, [1 or 2, width]."""
    plan, width = call.plans[k], call.widths[k]
    sources = sources_of(call, k, x, z)
    targets = {Z1: da.new_empty(da.shape), ZG: da.new_empty(da.shape) if plan.gated else None}
    if first:
        targets = {Z1: dz[:, :width], ZG: dz[:, call.width : call.width + width]}
    inputs = [da, *(sources[name] for name in plan.middle.inputs)]
    if plan.middle.reads_x:
        targets[X] = dx[:, :width]
        inputs.append(targets[X])
    outputs = [targets[name] for name in plan.middle.inputs]
    summed = [i for i, name in enumerate(plan.middle.inputs) if name != X]
    sums = execute.summed_elementwise(plan.middle.gradient, inputs, outputs, summed)
    if not first:
        dz[:, :width] += targets[Z1]
        if plan.gated:
            dz[:, call.width : call.width + width] += targets[ZG]
    return sums


def _prologue_backward(call: Call, x: Tensor, dp: Tensor, dx: Tensor) -> None:
    """Adds to dx what the prologue contributes."""
    segment = call.plans[0].prologue
    if segment is None:
        dx += dp
    else:
        execute.elementwise(segment.gradient, dx.shape, [dp, x, dx], [dx])


def gradients_of(call: Call, dx: Tensor | None, total: dict[str, Tensor]) -> Gradients:
    """By operand, of the widths that were used, from the sums of a backward:

    up [I or 2 I, H]; down [H, I]; up_bias [1 or 2, I]; vectors: those of the norm's weight and bias
    and of the second bias, [3, H].
    """
    out, width = Gradients(x=dx), call.width
    if "up" in total:
        out.up, out.gate = total["up"][:width], total["up"][width:]
        out.down = total["down"]
    if "vectors" in total:
        out.norm_weight, out.norm_bias, out.down_bias = total["vectors"]
        out.up_bias, out.gate_bias = total["up_bias"][0], total["up_bias"][-1]
    for name in vars(out):
        operand, gradient = getattr(call, name), getattr(out, name)
        if operand is None or gradient is None:
            setattr(out, name, None)
        elif gradient.dtype != operand.dtype:
            setattr(out, name, gradient.to(operand.dtype))
    return out
