"""The row kernel over tensors: program, dropout, residual and LayerNorm in one pass over the rows.

As in `execute`: no autograd, outputs are the caller's, and who serves a call is decided there. Its
gradients come in one pass too, with those of weight, bias and other row vectors as column sums.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend, reference
from . import residual_norm_reference as oracle
from .execute import ABSENT, DTYPES, Pass, chunks_of, compute_dtype, engine_of, matrix


def forward(
    which: Pass,
    inputs: Sequence[Tensor],
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    threshold: int,
    seed: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    row: int = 0,
) -> None:
    """y = LayerNorm(residual + dropout(program(inputs))); see csrc/residual_norm.h.

    Args:
        which: a Program of one output over `inputs`.
        threshold: of 65536, how many values drop an element (`residual_norm_reference.threshold`).
        seed: int64, one element, on the tensors' device; None without dropout.
        stats: [2, rows], written: mean and reciprocal deviation, in the compute type, each dense;
            or None.
        row: of the dropout mask, for the first row here; other than 0 on the CPU only.
    """
    if y.numel() == 0:
        return
    engine, where = engine_of(y)
    if engine == "triton":
        mean, rstd = (None, None) if stats is None else stats
        backend.triton()[0].residual_norm.forward(
            which.program, inputs, residual, weight, bias, eps, threshold, seed, y, mean, rstd
        )
    elif (native := which.on(engine)) is not None:
        module = backend.cpp()[0]
        run = module.cuda_residual_norm if where else module.residual_norm
        run(
            native,
            *y.shape,
            [matrix(x) for x in inputs],
            matrix(residual),
            matrix(weight),
            matrix(bias),
            eps,
            threshold,
            seed.data_ptr() if threshold else 0,
            *_statistics(stats),
            matrix(y),
            row,
            *where,
        )
    else:
        if stats is None:
            dtype = compute_dtype(*inputs, residual, weight, bias)
            stats = y.new_empty((2, y.shape[0]), dtype=dtype)
        mean, rstd = stats
        s = _sum(which, inputs, residual, threshold, seed, stats.dtype, row)[0]
        variance, average = torch.var_mean(s, 1, correction=0)
        mean.copy_(average)
        rstd.copy_((variance + eps).rsqrt())
        normal = (s - mean[:, None]) * rstd[:, None]
        normal = normal if weight is None else normal * _wide(weight, s.dtype)
        y.copy_(normal if bias is None else normal + _wide(bias, s.dtype))


def _statistics(stats: Tensor | None) -> tuple[tuple[int, int, int, int], ...]:
    """Mean and reciprocal deviation as matrices of one column."""
    if stats is None:
        return ABSENT, ABSENT
    mean, dtype = stats.data_ptr(), DTYPES[stats.dtype]
    rstd = mean + stats.stride(0) * stats.element_size()
    return (mean, dtype, 1, 0), (rstd, dtype, 1, 0)


def _wide(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype == dtype else x.to(dtype)


def _sum(which, inputs, residual, threshold, seed, dtype, row) -> tuple[Tensor, Tensor | float]:
    """In torch: what the norm normalises, and what dropout multiplied with."""
    (s,) = reference.run(which.program, [_wide(x, dtype) for x in inputs])
    kept = 1.0
    if threshold:
        rows, columns = s.shape
        mask = oracle.dropout_mask(seed, row + rows, columns, threshold / 65536)[row:]
        kept = mask.to(dtype) * oracle.scale(threshold / 65536)
        s = s * kept
    return (s if residual is None else s + _wide(residual, dtype)), kept


def backward(
    which: Pass,
    inputs: Sequence[Tensor],
    residual: Tensor | None,
    weight: Tensor | None,
    threshold: int,
    seed: Tensor | None,
    stats: Tensor,
    dy: Tensor,
    gradient: Pass,
    gradients: Sequence[Tensor],
    dresidual: Tensor | None,
    added_to: int,
    summed: Sequence[int],
    row: int = 0,
) -> Tensor:
    """Gradients of `forward`, which is computed again from its operands.

    Args:
        gradient: the Program of the gradients of `which`: its inputs are the upstream gradient,
            then `inputs`; its outputs are written to `gradients`.
        dresidual: written; None if the residual's gradient is added to output `added_to` of
            `gradient` instead (the program reads the residual too), or if nobody wants it.
        added_to: -1, or a position in `gradients`.
        summed: positions in `gradients` whose column sums are wanted too.

    Returns:
        [2 + len(summed), columns] in the compute type: the gradients of weight and of bias, then
        the sums.
    """
    rows, columns = dy.shape
    engine, where = engine_of(dy)
    natives = which.on(engine), gradient.on(engine)
    if engine == "triton":
        kernels = backend.triton()[0].residual_norm
        chunks = kernels.chunks(rows, columns, dy.device)
    elif None not in natives:
        chunk, chunks = chunks_of(rows, engine)
    else:
        return _reference_backward(
            which, inputs, residual, weight, threshold, seed, stats, dy, gradient, gradients,
            dresidual, added_to, summed, row,
        )  # fmt: skip
    sums = dy.new_empty((chunks, 2 + len(summed), columns), dtype=stats.dtype)
    if engine == "triton":
        kernels.backward(
            which.program, gradient.program, inputs, residual, weight, *stats, threshold, seed,
            dy, gradients, dresidual, added_to, sums, summed,
        )  # fmt: skip
    elif sums.numel():
        module = backend.cpp()[0]
        run = module.cuda_residual_norm_backward if where else module.residual_norm_backward
        run(
            natives[0],
            rows,
            columns,
            [matrix(x) for x in inputs],
            matrix(residual),
            matrix(weight),
            ABSENT,
            0.0,
            threshold,
            seed.data_ptr() if threshold else 0,
            *_statistics(stats),
            matrix(dy),
            natives[1],
            [matrix(x) for x in gradients],
            matrix(dresidual),
            added_to,
            sums.data_ptr(),
            chunk,
            list(summed),
            row,
            *where,
        )
    return sums.sum(0) if sums.shape[0] != 1 else sums[0]


def _reference_backward(
    which, inputs, residual, weight, threshold, seed, stats, dy, gradient, gradients,
    dresidual, added_to, summed, row,
) -> Tensor:  # fmt: skip
    dtype = stats.dtype
    mean, rstd = stats
    s, kept = _sum(which, inputs, residual, threshold, seed, dtype, row)
    normal = (s - mean[:, None]) * rstd[:, None]
    dy = _wide(dy, dtype)
    upstream = dy if weight is None else dy * _wide(weight, dtype)
    ds = upstream - upstream.mean(1, keepdim=True)
    ds = (ds - normal * (upstream * normal).mean(1, keepdim=True)) * rstd[:, None]
    results = reference.run(gradient.program, [ds * kept, *(_wide(x, dtype) for x in inputs)])
    for k, (target, result) in enumerate(zip(gradients, results, strict=True)):
        target.copy_(result + ds if k == added_to else result)
    if dresidual is not None:
        dresidual.copy_(ds)
    return torch.stack(
        [(dy * normal).sum(0), dy.sum(0), *(results[k].sum(0) for k in summed)],
    )
