"""The op `fastffn::relation`: how far a student's token-to-token maps are from a teacher's.

Per example and relation head, over real tokens, with d the width of a head:

    S = a b^T / (sqrt(d) temperature)     R = softmax(S)      student
    T = the same of the teacher           P = softmax(T)

    divergence         value of a query's row          what of it is whose
    kl                 sum P (log P - log R)           MiniLM 2002.10957, MiniLMv2 2012.15828
    reverse_kl         sum R (log R - log P)
    probability_mse    sum (R - P)^2                   AutoDistil 2201.12507
    score_mse          sum (S - T)^2                   TinyBERT 1909.10351, EfficientBERT 2109.07222

The op returns the rows' values, [batch, heads, length], or with `weights` their weighted sum. No
length x length map is kept or, in a kernel, ever made: on a CPU csrc/cpu/relation_head.h holds a
strip of it at a time, on CUDA kernels/relation.py a tile.

Kept for the backward. A weighted sum on a CPU makes loss and gradients in one call, since the
gradient of a sum is known but for a factor, and the exponentials are there: kept is the gradient,
as large as a and b. Everything else keeps the inputs; on CUDA also some statistics of each row,
from which the backward computes its tiles again.

A relation of a with itself (b and teacher_b None) is symmetric, which halves the work. The
functions for users are in `relation_losses`.
"""

import torch
from torch import Tensor

from . import backend, relation_chunked
from . import relation_reference as oracle
from .elementwise import is_decomposed, is_plain
from .execute import DTYPES, HALVES, compute_dtype, in_memory
from .loss_inputs import save, saved

DIVERGENCES = ("kl", "reverse_kl", "probability_mse", "score_mse")  # csrc/relation.h
_ABSENT = (0, 0, 0, 0, 0)

_library = torch.library.Library("fastffn", "FRAGMENT")
_OPERANDS = "Tensor a, Tensor? b, Tensor teacher_a, Tensor? teacher_b, Tensor? real"
_SETTINGS = "int heads, float temperature, str divergence"
_library.define(f"relation({_OPERANDS}, Tensor? weights, {_SETTINGS}) -> Tensor")
_library.define(
    f"relation_forward({_OPERANDS}, Tensor? weights, {_SETTINGS}, bool[] wanted)"
    " -> (Tensor, Tensor?[])"
)
_library.define(
    f"relation_backward({_OPERANDS}, Tensor weights, Tensor?[] kept, {_SETTINGS}, bool[] wanted)"
    " -> Tensor?[]"
)


def relation(
    a: Tensor,
    b: Tensor | None,
    teacher_a: Tensor,
    teacher_b: Tensor | None,
    real: Tensor | None,
    weights: Tensor | None,
    heads: int,
    temperature: float = 1.0,
    divergence: str = "kl",
) -> Tensor:
    """Values of the rows, or their weighted sum; the caller has checked the arguments.

    Args:
        a, b: [batch, length, heads * d], any floating-point type and strides.
        teacher_a, teacher_b: [batch, length, heads * d_t]; no gradient flows into them. b and
            teacher_b are None for a relation of each with itself.
        real: bool [batch, length], or None: all tokens are real. What padding holds, NaN included,
            changes nothing.
        weights: of the rows, [batch, heads, length] in the result's type, any strides, 0 at
            padding; no gradient flows into them.

    Returns:
        [batch, heads, length], 0 at padding, or a scalar: float64 if an operand is, else float32.
        Differentiable once. Equal inputs give equal bits, on any number of threads.

    Raises:
        ValueError: one of b and teacher_b is None.
    """
    if (b is None) != (teacher_b is None):
        raise ValueError("relation: b and teacher_b are given both, or neither")
    operands = (a, b, teacher_a, teacher_b, real)
    settings = (heads, temperature, divergence)
    if is_decomposed():
        rows = oracle.relation(*operands, *settings)
        return rows if weights is None else (rows * weights).sum()
    if not is_plain([x for x in (*operands, weights) if x is not None]):
        return _op(*operands, weights, *settings)
    if any(_wanted(a, b)):
        return _Relation.apply(True, *operands, weights, *settings)
    return _inference(*operands, weights, *settings)


def _wanted(a: Tensor, b: Tensor | None) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in (a, b)]


def _scales(a: Tensor, teacher_a: Tensor, heads: int, temperature: float) -> tuple[float, float]:
    return tuple((x.shape[-1] / heads) ** -0.5 / temperature for x in (a, teacher_a))


def _engine(a, b, teacher_a, teacher_b, real) -> str:
    return backend.relation_engine([x for x in (a, b, teacher_a, teacher_b) if x is not None])


def _kept_dtype(x: Tensor) -> torch.dtype:
    """Of gradients that still lack the upstream factor: in half precision they might underflow."""
    return torch.float32 if x.dtype in HALVES else x.dtype


def _tokens(x: Tensor | None) -> tuple[int, int, int, int, int]:
    return _ABSENT if x is None else (x.data_ptr(), DTYPES[x.dtype], *x.stride())


def _run_cpp(operands, weights, settings, rows, loss, gradients) -> None:
    a, b, teacher_a, teacher_b, real = operands
    heads, temperature, divergence = settings
    batch, length, width = a.shape
    backend.cpp()[0].relation(
        batch,
        length,
        heads,
        width // heads,
        teacher_a.shape[-1] // heads,
        *(_tokens(x) for x in (a, b, teacher_a, teacher_b)),
        0 if real is None else real.data_ptr(),
        (0, 0) if real is None else real.stride(),
        *_scales(a, teacher_a, heads, temperature),
        DIVERGENCES.index(divergence),
        0 if weights is None else weights.data_ptr(),
        (0, 0, 0) if weights is None else weights.stride(),
        compute_dtype(*operands[:4]) == torch.float64,
        0 if rows is None else rows.data_ptr(),
        0 if loss is None else loss.data_ptr(),
        *(_tokens(x) for x in gradients),
    )


def _empty_rows(operands, heads: int) -> Tensor:
    a = operands[0]
    return a.new_empty((a.shape[0], heads, a.shape[1]), dtype=compute_dtype(*operands[:4]))


def _empty_gradients(a, b, wanted, dtype_of) -> list[Tensor | None]:
    return [
        x.new_empty(x.shape, dtype=dtype_of(x)) if want else None
        for x, want in zip((a, b), wanted, strict=True)
    ]


def _forward(a, b, teacher_a, teacher_b, real, weights, heads, temperature, divergence, wanted):
    """(rows or weighted sum, what is kept: gradients or statistics)."""
    operands = [in_memory(x) for x in (a, b, teacher_a, teacher_b)] + [real]
    settings = heads, temperature, divergence
    engine = _engine(*operands)
    if engine == "triton":
        rows = _empty_rows(operands, heads)
        kernels = backend.triton()[0].relation
        stats = None
        if any(wanted):
            stats = rows.new_empty((kernels.stats_count(divergence), *rows.shape))
        scales = _scales(a, teacher_a, heads, temperature)
        kernels.forward(*operands, heads, *scales, divergence, rows, stats)
        return (rows if weights is None else (rows * weights).sum()), [stats]
    rows = _empty_rows(operands, heads) if weights is None else None
    loss = None if weights is None else a.new_empty((), dtype=weights.dtype)
    gradients = [None, None]
    if weights is not None:
        gradients = _empty_gradients(a, b, wanted, _kept_dtype)
    run = _run_cpp if engine == "cpp" else relation_chunked.run
    run(operands, weights, settings, rows, loss, gradients)
    return (rows if weights is None else loss), gradients


def _backward(
    a, b, teacher_a, teacher_b, real, weights, kept, heads, temperature, divergence, wanted
) -> list[Tensor | None]:
    """Gradients of the rows' sum, each row times its weight."""
    operands = [in_memory(x) for x in (a, b, teacher_a, teacher_b)] + [real]
    settings = heads, temperature, divergence
    weights = in_memory(weights)
    gradients = _empty_gradients(a, b, wanted, lambda x: x.dtype)
    engine = _engine(*operands)
    if engine == "triton":
        backend.triton()[0].relation.backward(
            *operands,
            heads,
            *_scales(a, teacher_a, heads, temperature),
            divergence,
            kept[0],
            weights,
            *gradients,
        )
    else:
        run = _run_cpp if engine == "cpp" else relation_chunked.run
        run(operands, weights, settings, None, None, gradients)
    return gradients


def _inference(*arguments) -> Tensor:
    return _forward(*arguments, (False, False))[0]


def _fake(*arguments) -> Tensor:
    *operands, weights, heads, _, _ = arguments
    rows = _empty_rows(operands, heads)
    return rows if weights is None else rows.new_empty(())


def _fake_forward(
    a, b, teacher_a, teacher_b, real, weights, heads, temperature, divergence, wanted
):
    operands = a, b, teacher_a, teacher_b, real
    rows = _empty_rows(operands, heads)
    kept = [None, None]
    if _engine(*operands) == "triton":
        count = backend.triton()[0].relation.stats_count(divergence)
        kept = [rows.new_empty((count, *rows.shape)) if any(wanted) else None]
    elif weights is not None:
        kept = _empty_gradients(a, b, wanted, _kept_dtype)
    return (rows if weights is None else rows.new_empty(())), kept


def _fake_backward(
    a, b, teacher_a, teacher_b, real, weights, kept, heads, temperature, divergence, wanted
) -> list[Tensor | None]:
    return _empty_gradients(a, b, wanted, lambda x: x.dtype)


class _Relation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plain: bool, *arguments):
        wanted = list(ctx.needs_input_grad[1:3])
        *operands, weights, heads, temperature, divergence = arguments
        if plain:
            result, kept = _forward(*arguments, wanted)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                result, kept = _forward_op(*arguments, wanted)
        ctx.settings = heads, temperature, divergence
        ctx.wanted, ctx.count = wanted, len(kept)
        ctx.has_gradients = weights is not None and _engine(*operands) != "triton"
        ctx.dtypes = [None if x is None else x.dtype for x in operands[:2]]
        again = () if ctx.has_gradients else (*operands, weights)
        save(ctx, *kept, *again)
        return result

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # once_differentiable lets some double backwards pass, and lie
            raise RuntimeError(
                "fastffn: relations can be differentiated once (no create_graph=True); "
                "use fastffn.ops.relation_reference.relation for more"
            )
        tensors = saved(ctx)
        kept, operands = tensors[: ctx.count], tensors[ctx.count :]
        if ctx.has_gradients:
            gradients = [
                None if x is None else (x * grad).to(dtype)
                for x, dtype in zip(kept, ctx.dtypes, strict=True)
            ]
        else:
            *operands, weights = operands
            weights = grad if weights is None else weights * grad
            plain = is_plain([x for x in (weights, *kept, *operands) if x is not None])
            function = _backward if plain else _backward_op
            gradients = function(*operands, weights, kept, *ctx.settings, ctx.wanted)
        return None, *gradients, *[None] * 7


def _autograd(*arguments) -> Tensor:
    if any(_wanted(*arguments[:2])):
        return _Relation.apply(False, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(*arguments)


for _device in ("CPU", "CUDA", "CompositeExplicitAutograd"):
    _library.impl("relation", _inference, _device)
    _library.impl("relation_forward", _forward, _device)
    _library.impl("relation_backward", _backward, _device)
_library.impl("relation", _autograd, "Autograd")
torch.library.register_fake("fastffn::relation", _fake, lib=_library)
torch.library.register_fake("fastffn::relation_forward", _fake_forward, lib=_library)
torch.library.register_fake("fastffn::relation_backward", _fake_backward, lib=_library)
_op = torch.ops.fastffn.relation.default
_forward_op = torch.ops.fastffn.relation_forward.default
_backward_op = torch.ops.fastffn.relation_backward.default
