"""The block on the Triton kernels: every segment inside a product or inside the row kernel.

    forward    [prologue]   product -> middle        product         row kernel with the epilogue
    backward   row kernel   product -> gradient of the middle, activation, bias gradients
               weight gradient   product -> gradient of the prologue, added to dx   weight gradient

The activation that the second weight's gradient needs is computed beside the middle's gradient,
with which it shares most of its work, from the first product, whether that was kept or computed
again. So "none" keeps what "activation" keeps, and all modes agree bit for bit.

See `ffn_interpreted` for the arguments; genes that share the first product store it, and take their
segments from there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..expr.genes import Z1, Z2, ZG, X
from . import backend, execute, row_kernel
from .ffn_interpreted import Call, Gradients, gradients_of, prologue_of, sources_of
from .ffn_plan import ADD, COPY


def matrix(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised [rows, columns] whose rows start at multiples of 8 elements, for loads of 16
    bytes: at a pitch of 540 the widest are 8, at 135 single items (docs/kernels.md)."""
    return like.new_empty((rows, -(-columns // 8) * 8))[:, :columns]


def _kernels():
    return backend.triton()[0].linear


def _first_product(call: Call, p: Tensor) -> Tensor:
    """z alone: [rows, I], or [rows, 2 I] with the gate's part behind the other."""
    weight, bias = call.expansion
    z = matrix(p, p.shape[0], weight.shape[0])
    _kernels().run(p, [weight.t()], [bias], COPY.program, [], [z])
    return z


def _activation(call: Call, p: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The activation of the only gene, and z if it is to be kept, from one product."""
    plan, width, rows = call.plans[0], call.width, p.shape[0]
    weights = [weight.t() for weight, _ in call.parts]
    biases = [bias for _, bias in call.parts]
    a = matrix(p, rows, width)
    extras = [call.x[:, :width]] if plan.middle.reads_x else []
    if not keep:
        _kernels().run(p, weights, biases, plan.middle.value.program, extras, [a])
        return a, None
    z = matrix(p, rows, width * len(weights))
    program = plan.middle.value_and_inputs(len(weights))
    _kernels().run(p, weights, biases, program, extras, [a, *z.split(width, dim=1)])
    return a, z


def _second_product(call: Call, k: int, a: Tensor) -> Tensor:
    z2 = matrix(a, *call.x.shape)
    down = call.contraction(call.widths[k])
    _kernels().run(a, [down.t()], [call.down_bias], COPY.program, [], [z2])
    return z2


def _activation_from(call: Call, k: int, z: Tensor) -> Tensor:
    plan, sources = call.plans[k], sources_of(call, k, call.x, z)
    a = matrix(z, *sources[Z1].shape)
    inputs = [sources[name] for name in plan.middle.inputs]
    execute.elementwise(plan.middle.value, a.shape, inputs, [a])
    return a


def forward(call: Call, outputs: Sequence[Tensor], recompute: str | None) -> list[Tensor]:
    """Fills the outputs of the genes; returns what is kept: statistics, and but in "all" z and each
    z2."""
    x, genes = call.x, range(len(call.plans))
    p = prologue_of(call, x)
    keep = recompute in ("none", "activation")
    z = _first_product(call, p) if len(genes) > 1 else None
    stats, products = [], []
    for k in genes:
        if z is None:
            a, z = _activation(call, p, keep)
        else:
            a = _activation_from(call, k, z)
        z2 = _second_product(call, k, a)
        stats.append(None)
        if recompute is not None:
            stats[k] = x.new_empty((2, x.shape[0]), dtype=call.stat_dtype)
        plan = call.plans[k]
        row_kernel.forward(
            plan.epilogue.value,
            [z2 if name == Z2 else x for name in plan.epilogue.inputs],
            x,
            call.norm_weight,
            call.norm_bias,
            call.eps,
            call.threshold,
            call.seed_of(k),
            outputs[k],
            stats[k],
        )
        products.append(z2)
    if recompute is None:
        return []
    return stats + ([z, *products] if keep else [])


def _kept_products(call: Call, p: Tensor) -> tuple[Tensor, list[Tensor]]:
    """z and each z2 again, by the calls of the forward."""
    if len(call.plans) == 1:
        a, z = _activation(call, p, keep=True)
        return z, [_second_product(call, 0, a)]
    z = _first_product(call, p)
    genes = range(len(call.plans))
    return z, [_second_product(call, k, _activation_from(call, k, z)) for k in genes]


def backward(
    call: Call,
    kept: Sequence[Tensor],
    recompute: str,
    grads: Sequence[Tensor],
    wants_x: bool,
    wants_weights: bool,
) -> Gradients:
    """Gradients from those of the outputs; `kept` as `forward` returned it."""
    x, count, kernels = call.x, len(call.plans), _kernels()
    p = prologue_of(call, x)
    z, products = (kept[count], kept[count + 1 :]) if kept[count:] else _kept_products(call, p)
    dx, dz = x.new_empty(x.shape), matrix(z, *z.shape)
    order = sorted(range(count), key=lambda k: -call.widths[k])
    total: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        """To the leading part of the sum so far, of which the first contribution is the widest."""
        if name not in total:
            total[name] = value
        else:
            total[name][tuple(slice(size) for size in value.shape)] += value

    for k in order:
        plan, width, first = call.plans[k], call.widths[k], k == order[0]
        z2, into = products[k], dx if first else torch.empty_like(dx)
        dz2 = matrix(z2, *z2.shape)
        reads_x = plan.epilogue.reads_x
        vectors = row_kernel.backward(
            plan.epilogue.value,
            [z2 if name == Z2 else x for name in plan.epilogue.inputs],
            x,
            call.norm_weight,
            call.threshold,
            call.seed_of(k),
            kept[k],
            grads[k],
            plan.epilogue.gradient,
            [dz2 if name == Z2 else into for name in plan.epilogue.inputs],
            None if reads_x else into,
            plan.epilogue.inputs.index(X) if reads_x else -1,
            (plan.epilogue.inputs.index(Z2),),
        )
        add("vectors", vectors)
        a = matrix(z2, z2.shape[0], width)
        add("up_bias", _middle_backward(call, k, z, dz2, a, into, dz, first))
        if wants_weights:
            ddown = call.down.new_empty((call.down.shape[0], width))
            kernels.weight_gradient(dz2, a, ddown)
            add("down", ddown)
        if not first:
            dx += into
    if wants_weights:
        total["up"] = call.up.new_empty((z.shape[1], x.shape[1]))
        kernels.weight_gradient(dz, p, total["up"])
    if wants_x:
        segment = call.plans[0].prologue
        program = (ADD if segment is None else segment.gradient).program
        extras = [dx] if segment is None else [x, dx]
        kernels.run(dz, [call.expansion[0]], [None], program, extras, [dx])
    return gradients_of(call, dx if wants_x else None, total)


def _middle_backward(
    call: Call, k: int, z: Tensor, dz2: Tensor, a: Tensor, dx: Tensor, dz: Tensor, first: bool
) -> Tensor:
    """One product: writes the activation and the gradient of z (adds it, if not `first`), adds to
    dx what the middle contributes; returns the columns' sums, [1 or 2, width]."""
    plan, width, kernels = call.plans[k], call.widths[k], _kernels()
    names = plan.middle.inputs
    sources = sources_of(call, k, call.x, z)
    extras = [sources[name] for name in names]
    targets = {Z1: dz[:, :width], ZG: dz[:, call.width : call.width + width], X: dx[:, :width]}
    if not first:
        targets |= {name: torch.empty_like(a) for name in (Z1, ZG) if name in names}
    if plan.middle.reads_x:
        extras.append(targets[X])
    outputs = [targets[name] for name in names] + [a]
    summed = tuple(i for i, name in enumerate(names) if name != X)
    rows, inner = dz2.shape
    tiles = kernels.rows_of_sums(rows, width, inner, dz2.dtype)
    sums = dz2.new_empty((tiles, len(summed), width), dtype=torch.float32)
    program = plan.middle.gradient_and_value.program
    kernels.run(dz2, [call.contraction(width)], [None], program, extras, outputs, sums, summed)
    if not first:
        dz[:, :width] += targets[Z1]
        if ZG in names:
            dz[:, call.width : call.width + width] += targets[ZG]
    return sums.sum(0)
