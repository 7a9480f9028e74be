"""The op `fastffn::residual_norm`: y = LayerNorm(residual + dropout(x)), one pass over the rows.

    x, residual   [.., H]
    weight, bias  [H] or None

Kept for the backward: x, residual, and mean and reciprocal deviation of each row. The sum is
computed again, and the dropout mask is a function of the seed (csrc/random.h). The backward is one
pass too, with the gradients of weight and bias as column sums on the way. `ffn` has this with the
gene's epilogue in front of it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from . import backend, execute, row_kernel
from . import residual_norm_reference as oracle
from .elementwise import is_decomposed, is_plain
from .ffn_plan import COPY, COPY_GRADIENT

_library = torch.library.Library("fastffn", "FRAGMENT")
_OPERANDS = "Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed"
_library.define(f"residual_norm({_OPERANDS}, float dropout, float eps) -> Tensor")
_library.define(f"residual_norm_forward({_OPERANDS}, float dropout, float eps) -> (Tensor, Tensor)")
_library.define(
    f"residual_norm_backward(Tensor grad, Tensor stats, {_OPERANDS}, float dropout) -> Tensor?[]"
)


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    eps: float = 1e-5,
    seed: Tensor | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x)) over the last dimension.

    Args:
        x, residual: [.., H], float32, float64, bfloat16 or float16, any strides.
        weight, bias: [H] or None.
        dropout: probability, in steps of 1 / 65536; the caller says 0 in evaluation.
        eps: added to the variance.
        seed: int64, one element, on x's device: fixes the mask. None draws one from torch's
            generator.

    Returns:
        [.., H], of the wider dtype of x and residual; under autocast float32. Differentiable once.

    Raises:
        UserError: shapes, dtypes or devices that do not fit each other.
    """
    _check(x, residual, weight, bias, dropout, seed)
    if dropout > 0 and seed is None:
        if backend.is_portable():
            x, dropout = F.dropout(x, dropout), 0.0
        else:
            seed = oracle.draw_seeds(x, 1)
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        residual = residual if residual.dtype == torch.float64 else residual.float()
    if is_decomposed():
        seed = 0 if seed is None else seed
        return oracle.residual_norm(x, residual, weight, bias, dropout, eps, seed)
    operands = (x, residual, weight, bias, seed)
    if not _all_plain(operands):
        return _op(*operands, dropout, eps)
    if _wants_gradients(operands):
        return _ResidualNorm.apply(True, dropout, eps, *operands)
    return _inference(*operands, dropout, eps)


def _check(x, residual, weight, bias, dropout: float, seed) -> None:
    shape, row, device = x.shape, x.shape[-1:], x.device
    if shape != residual.shape or not row or row[0] == 0:
        raise UserError(
            f"residual_norm: x {list(shape)} and residual {list(residual.shape)}; "
            "both are [.., H] of one shape"
        )
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in execute.DTYPES:
            raise UserError(f"residual_norm: {name} is {tensor.dtype}; take a floating-point type")
        if tensor.device != device:
            raise UserError(f"residual_norm: {name} is on {tensor.device} and x on {device}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != row:
            raise UserError(f"residual_norm: {name} is {list(tensor.shape)}, expected {list(row)}")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout: expected a probability from 0 to below 1, got {dropout!r}")
    execute.check_seed("residual_norm", seed, x, 1)


def _all_plain(tensors) -> bool:
    return is_plain([x for x in tensors if x is not None])


def _wants_gradients(operands) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)


def _output(x: Tensor, residual: Tensor) -> Tensor:
    dtype = x.dtype if x.dtype == residual.dtype else torch.promote_types(x.dtype, residual.dtype)
    return execute.dense_like(x, dtype)


def _statistics(x: Tensor, residual: Tensor, weight, bias) -> Tensor:
    dtype = execute.compute_dtype(x, residual, weight, bias)
    return x.new_empty((2, x.numel() // x.shape[-1]), dtype=dtype)


def _rows(x: Tensor) -> Tensor:
    x = execute.in_memory(x)
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _run(x, residual, weight, bias, seed, dropout: float, eps: float, stats) -> Tensor:
    y = _output(x, residual)
    row_kernel.forward(
        COPY,
        [_rows(x)],
        _rows(residual),
        execute.in_memory(weight),
        execute.in_memory(bias),
        eps,
        oracle.threshold(dropout),
        seed,
        _rows(y),
        stats,
    )
    return y


def _forward(x, residual, weight, bias, seed, dropout: float, eps: float) -> tuple[Tensor, Tensor]:
    stats = _statistics(x, residual, weight, bias)
    return _run(x, residual, weight, bias, seed, dropout, eps, stats), stats


def _inference(*arguments) -> Tensor:
    return _run(*arguments, None)


def _backward(grad, stats, x, residual, weight, bias, seed, dropout: float) -> list[Tensor | None]:
    dx = execute.dense_like(x, x.dtype)
    same = dropout == 0 and x.dtype == residual.dtype  # then both have one gradient
    dresidual = dx if same else residual.new_empty(residual.shape)
    vectors = row_kernel.backward(
        COPY,
        [_rows(x)],
        _rows(residual),
        execute.in_memory(weight),
        oracle.threshold(dropout),
        seed,
        stats,
        _rows(grad),
        COPY_GRADIENT,
        [_rows(dx)],
        None if same else _rows(dresidual),
        -1,
        (),
    )
    row_vectors = zip((weight, bias), vectors, strict=True)
    return [dx, dresidual, *(None if v is None else g.to(v.dtype) for v, g in row_vectors)]


def _fake_backward(grad, stats, x, residual, weight, bias, seed, dropout) -> list[Tensor | None]:
    vectors = [None if v is None else v.new_empty(v.shape) for v in (weight, bias)]
    return [x.new_empty(x.shape), residual.new_empty(residual.shape), *vectors]


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plain: bool, dropout: float, eps: float, *operands):
        if plain:
            y, stats = _forward(*operands, dropout, eps)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y, stats = _forward_op(*operands, dropout, eps)
        ctx.dropout = dropout
        ctx.interpreted = backend.is_interpreting()
        ctx.save_for_backward(*operands, stats)
        return y

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # once_differentiable lets some double backwards pass, and lie
            raise RuntimeError(
                "fastffn: gradients of gradients (create_graph=True) are not available here; "
                "use fastffn.ops.residual_norm_reference.residual_norm"
            )
        *operands, stats = ctx.saved_tensors  # once: a checkpoint computes them at each look
        function = _backward if _all_plain((grad, stats, *operands)) else _backward_op
        with backend.interpreted(ctx.interpreted):
            return None, None, None, *function(grad, stats, *operands, ctx.dropout), None


def _autograd(*arguments) -> Tensor:
    *operands, dropout, eps = arguments
    if _wants_gradients(operands):
        return _ResidualNorm.apply(False, dropout, eps, *operands)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(*arguments)


for _device in ("CPU", "CUDA", "CompositeExplicitAutograd"):  # the last: by the reference
    _library.impl("residual_norm", _inference, _device)
    _library.impl("residual_norm_forward", _forward, _device)
    _library.impl("residual_norm_backward", _backward, _device)
_library.impl("residual_norm", _autograd, "Autograd")


@torch.library.register_fake("fastffn::residual_norm", lib=_library)
def _(x, residual, weight, bias, seed, dropout, eps):
    return _output(x, residual)


@torch.library.register_fake("fastffn::residual_norm_forward", lib=_library)
def _(x, residual, weight, bias, seed, dropout, eps):
    return _output(x, residual), _statistics(x, residual, weight, bias)


torch.library.register_fake("fastffn::residual_norm_backward", _fake_backward, lib=_library)
_op = torch.ops.fastffn.residual_norm.default
_forward_op = torch.ops.fastffn.residual_norm_forward.default
_backward_op = torch.ops.fastffn.residual_norm_backward.default
