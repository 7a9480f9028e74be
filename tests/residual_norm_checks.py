"""What the row kernel is checked for, on any device: `test_kernels_residual_norm` calls these in
the interpreter's process and on a GPU. Every function raises AssertionError where a check fails.
"""

import torch
import triton
import triton.language as tl
from segment_checks import SENTINEL, spread, within_rule
from torch import Tensor

from fastffn.expr import Expr, backward_program, forward_program
from fastffn.kernels import philox, residual_norm
from fastffn.ops import reference
from fastffn.ops.residual_norm_reference import dropout_mask, threshold
from fastffn.ops.residual_norm_reference import philox as philox_reference
from fastffn.ops.residual_norm_reference import residual_norm as oracle

EPS = 1e-5
SEED = 0x0123456789ABCDEF


class Guarded:
    """Copies of tensors on a device, strides and alignment kept; around outputs is a sentinel."""

    def __init__(self, device: str):
        self.device = device
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """`tensor` there; memory between its elements is NaN, which no result may contain."""
        size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        offset = tensor.storage_offset() % 8
        dtype = tensor.dtype
        buffer = torch.full(
            (max(0, size) + offset + 8,), torch.nan, dtype=dtype, device=self.device
        )
        view = buffer.as_strided(tensor.shape, tensor.stride(), offset)
        if 0 in tensor.stride():  # overlapping elements cannot be copied to
            source = tensor.as_strided((size,), (1,), tensor.storage_offset())
            buffer[offset : offset + size] = source.to(self.device)
        else:
            view.copy_(tensor)
        return view

    def output(self, tensor: Tensor) -> Tensor:
        """Memory of the form of `tensor`: NaN where the result goes, a sentinel elsewhere."""
        view = self.copy(tensor)
        storage = torch.empty(0, dtype=view.dtype, device=self.device).set_(view.untyped_storage())
        storage.fill_(SENTINEL)
        view.fill_(torch.nan)
        self.outputs.append((storage, view))
        return view

    def results(self) -> list[Tensor]:
        """The outputs on the CPU, in order; memory around them must be as it was."""
        results = [view.cpu().clone() for _, view in self.outputs]
        for storage, view in self.outputs:
            view.fill_(SENTINEL)
            assert bool((storage == SENTINEL).all()), "memory around an output was written"
        return results


def truth(expr, inputs, residual, weight, bias, p, upstream, dtype) -> list[Tensor]:
    """By the oracle in `dtype`: y, then the gradients of inputs, residual, weight, bias and e.

    Where the residual is one of the inputs, its gradient is in that input's. Those of weight and
    bias are None where they are absent.
    """
    leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in inputs]
    shared = [i for i, tensor in enumerate(inputs) if tensor is residual]
    r = leaves[shared[0]] if shared else residual.to(dtype).clone().requires_grad_()
    w, b = (None if t is None else t.to(dtype).clone().requires_grad_() for t in (weight, bias))
    value = reference.elementwise(expr, dict(zip(expr.inputs, leaves, strict=True)))
    y = oracle(value, r, w, b, p, EPS, SEED)
    wanted = [*leaves, r, *(t for t in (w, b) if t is not None)]
    gradients = list(torch.autograd.grad(y, wanted, upstream.to(dtype), allow_unused=True))
    for at, t in ((len(leaves) + 1, w), (len(leaves) + 2, b)):
        if t is None:
            gradients.insert(at, None)
    return [y.detach(), *gradients]


def agrees(
    device: str,
    text: str,
    shape: tuple[int, int] = (9, 67),
    dtype: torch.dtype = torch.float32,
    p: float = 0.25,
    layouts: tuple[str, ...] = ("contiguous",),
    out_layout: str = "contiguous",
    grad_layout: str = "contiguous",
    affine: tuple[str, ...] = ("weight", "bias"),
    affine_dtype: torch.dtype | None = None,
    parts: int = 3,
):
    """Forward and backward keep the oracle rule; an input named x is the residual as well.

    Args:
        layouts: of the inputs and the residual, in order; the last one serves all further ones.
        affine: which of weight and bias there are.
        parts: chunks of the column sums.
    """
    expr = Expr.parse(text)
    generator = torch.Generator().manual_seed(0)
    names = [layouts[min(i, len(layouts) - 1)] for i in range(len(expr.inputs) + 1)]
    inputs = [spread(shape, name, dtype, generator) for name in names[:-1]]
    shared = expr.inputs.index("x") if "x" in expr.inputs else -1
    residual = spread(shape, names[-1], dtype, generator) if shared < 0 else inputs[shared]
    upstream = spread(shape, grad_layout, dtype, generator)
    vectors = {
        name: torch.randn(shape[1], generator=generator).to(affine_dtype or dtype)
        for name in ("weight", "bias")
        if name in affine
    }
    weight, bias = vectors.get("weight"), vectors.get("bias")
    arguments = (expr, inputs, residual, weight, bias, p, upstream)
    exact, usual = truth(*arguments, torch.float64), truth(*arguments, dtype)

    # The interpreter cuts off where the hardware rounds to bf16: there torch does the rounding.
    out_dtype = torch.float32 if device == "cpu" and dtype == torch.bfloat16 else dtype
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    program, gradient = forward_program(expr), backward_program(expr)
    memory = Guarded(device)
    there = [memory.copy(tensor) for tensor in inputs]
    residual_there = memory.copy(residual) if shared < 0 else there[shared]
    weight_there, bias_there = (None if t is None else t.to(device) for t in (weight, bias))
    upstream_there = memory.copy(upstream)
    seed = torch.tensor([SEED], device=device)

    def empty() -> Tensor:
        return memory.output(spread(shape, out_layout, out_dtype, generator))

    y = empty()
    mean, rstd = (memory.output(torch.empty(shape[0], dtype=sum_dtype)) for _ in range(2))
    residual_norm.forward(
        program,
        there,
        residual_there,
        weight_there,
        bias_there,
        EPS,
        threshold(p),
        seed,
        y,
        mean,
        rstd,
    )
    gradients = [empty() for _ in inputs]
    dresidual = None if shared >= 0 else empty()
    summed = tuple(range(len(inputs)))
    form = (parts, 2 + len(summed), shape[1])
    sums = memory.output(torch.empty(form, dtype=sum_dtype))
    residual_norm.backward(
        program,
        gradient,
        there,
        residual_there,
        weight_there,
        mean,
        rstd,
        threshold(p),
        seed,
        upstream_there,
        gradients,
        dresidual,
        shared,
        sums,
        summed,
    )
    y, _, _, *gradients, sums = memory.results()
    results = [y, *gradients]
    for out, want, torchs in zip(results, exact, usual, strict=False):
        within_rule(out.to(dtype), want, torchs, f"{text}: result {len(results)}")
    sums = sums.sum(0)
    for at, out in enumerate(sums[:2]):
        if exact[len(inputs) + 2 + at] is not None:
            i = len(inputs) + 2 + at
            within_rule(out.to(dtype), exact[i], usual[i], f"{text}: weight, bias: {at}")
    for at, out in enumerate(sums[2:]):
        want, torchs = exact[1 + at].sum(0), usual[1 + at].sum(0)
        within_rule(out.to(dtype), want, torchs, f"{text}: sum of gradient {at}")


def statistics(device: str, offset: float):
    """mean and rstd are right to a few units, where the values are far from 0 too."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 540, generator=generator) + offset
    y = torch.empty(5, 540, device=device)
    mean, rstd = torch.empty(2, 5, device=device)
    program = forward_program(Expr.parse("a"))
    zero = torch.zeros(1, 1).expand(5, 540).to(device)
    residual_norm.forward(program, [a.to(device)], zero, None, None, EPS, 0, None, y, mean, rstd)
    exact = a.double()
    torch.testing.assert_close(mean.cpu().double(), exact.mean(1), rtol=2e-7, atol=1e-7)
    want = (exact.var(1, correction=0) + EPS).rsqrt()
    torch.testing.assert_close(rstd.cpu().double(), want, rtol=1e-6, atol=0)
    spare = torch.full_like(y, torch.nan)
    residual_norm.forward(
        program, [a.to(device)], zero, None, None, EPS, 0, None, spare, None, None
    )
    torch.testing.assert_close(spare, y, rtol=0, atol=0)


def same_mask(device: str, shape: tuple[int, int], p: float, seed: int, dtype: torch.dtype):
    """Forward and backward drop exactly what `dropout_mask` says."""
    rows, columns = shape
    mask = dropout_mask(seed, rows, columns, p)
    expr = Expr.parse("a")
    ones = torch.ones(shape, dtype=dtype, device=device)
    y = torch.full(shape, torch.nan, dtype=dtype, device=device)
    mean, rstd = torch.empty(2, rows, device=device)
    there = torch.tensor([seed], device=device)
    arguments = (threshold(p), there)
    zero = torch.zeros_like(ones)
    program, gradient = forward_program(expr), backward_program(expr)
    residual_norm.forward(program, [ones], zero, None, None, EPS, *arguments, y, mean, rstd)
    mixed = mask.any(1) & ~mask.all(1)  # the mean lies between the kept and the dropped
    assert torch.equal((y > 0).cpu()[mixed], mask[mixed])
    assert (y[~mixed.to(device)] == 0).all()
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    de, ds = (torch.full_like(ones, torch.nan) for _ in range(2))
    sums = torch.empty(1, 2, columns, device=device)
    residual_norm.backward(
        program, gradient, [ones], zero, None, mean, rstd, *arguments, dy, [de], ds, -1, sums, ()
    )
    assert torch.equal((de != 0).cpu() | (ds == 0).cpu(), mask | (ds == 0).cpu())
    assert (ds != 0).cpu()[mixed].any(1).all()


@triton.jit
def _kept(
    out, seed, row,
    V: tl.constexpr, THRESHOLD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = tl.arange(0, WIDTH // V)[None, :] * V
    keep = philox.kept(seed, row + i, column, V, THRESHOLD, ROWS, WIDTH)
    tl.store(out + (i * WIDTH + tl.arange(0, WIDTH)[None, :]), keep.to(tl.int8))


def mask_of_far_rows(device: str, vector: int):
    """Rows beyond 2^32, which no memory holds, and seeds of all 64 bits."""
    for row in (0, 2**32 - 2, 2**40 + 3):
        for seed in (-1, SEED):
            there = torch.tensor([seed], device=device)
            out = torch.full((4, 128), 2, dtype=torch.int8, device=device)
            _kept[(1,)](out, there, row, vector, 20000, 4, 128)
            rows = torch.arange(row, row + 4)[:, None]
            group = torch.arange(16)[None]
            counter = (group, rows & 0xFFFFFFFF, rows >> 32, torch.zeros_like(rows))
            words = torch.stack(philox_reference(counter, seed), -1)
            halves = torch.stack([words & 0xFFFF, words >> 16], -1).reshape(4, 128)
            assert torch.equal(out.cpu().bool(), halves >= 20000)


def parts_do_not_matter(device: str):
    """The number of partial sums changes neither gradients nor, beyond rounding, the sums."""
    generator = torch.Generator().manual_seed(0)
    shape = (23, 45)
    expr = Expr.parse("tanh(a)")
    a, r, dy = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    weight = torch.randn(45, generator=generator).to(device)
    mean, rstd = torch.randn(23, generator=generator).to(device), torch.ones(23, device=device)
    seed = torch.tensor([5], device=device)
    found = []
    for parts in (1, 2, 5, 23, 40):
        da, dr = torch.full_like(a, torch.nan), torch.full_like(a, torch.nan)
        sums = torch.full((parts, 3, 45), torch.nan, device=device)
        residual_norm.backward(
            forward_program(expr),
            backward_program(expr),
            [a],
            r,
            weight,
            mean,
            rstd,
            9000,
            seed,
            dy,
            [da],
            dr,
            -1,
            sums,
            (0,),
        )
        found.append((da, dr, sums.sum(0)))
    for da, dr, sums in found[1:]:
        assert torch.equal(da, found[0][0])
        assert torch.equal(dr, found[0][1])
        torch.testing.assert_close(sums, found[0][2], rtol=1e-5, atol=1e-5)


def without_residual(device: str):
    """None is a residual of zeros."""
    expr = Expr.parse("tanh(a)")
    generator = torch.Generator().manual_seed(0)
    a, dy = (torch.randn(9, 45, generator=generator).to(device) for _ in range(2))
    program, gradient = forward_program(expr), backward_program(expr)
    found = []
    for residual in (None, torch.zeros_like(a)):
        y, da, ds = (torch.full_like(a, torch.nan) for _ in range(3))
        mean, rstd = torch.empty(2, 9, device=device)
        sums = torch.empty(2, 3, 45, device=device)
        residual_norm.forward(program, [a], residual, None, None, EPS, 0, None, y, mean, rstd)
        common = (program, gradient, [a], residual, None, mean, rstd, 0, None, dy)
        residual_norm.backward(*common, [da], ds, -1, sums, (0,))
        found.append((y, mean, rstd, da, ds, sums))
    for without, zeros in zip(*found, strict=True):
        assert torch.equal(without, zeros)


def constant_gradient(device: str):
    """y sums to 0 in each row: its sum has no gradient but that of the bias, the number of rows."""
    expr = Expr.parse("a")
    generator = torch.Generator().manual_seed(0)
    a, r = (torch.randn(21, 45, generator=generator).to(device) for _ in range(2))
    mean, rstd = (a + r).mean(1), ((a + r).var(1, correction=0) + EPS).rsqrt()
    dy = torch.ones(1, 1, device=device).expand(21, 45)
    da, dr = torch.full_like(a, torch.nan), torch.full_like(a, torch.nan)
    sums = torch.full((2, 2, 45), torch.nan, device=device)
    program, gradient = forward_program(expr), backward_program(expr)
    residual_norm.backward(
        program, gradient, [a], r, None, mean, rstd, 0, None, dy, [da], dr, -1, sums, ()
    )
    assert max(da.abs().max(), dr.abs().max()) < 1e-5
    assert (sums.sum(0)[1] == 21).all()


def nothing_to_compute(device: str):
    """No rows: the sums are zero. No columns: nothing is launched."""
    expr = Expr.parse("relu(a)")
    for shape in ((0, 12), (3, 0), (0, 0)):
        a, y, dy, da, dr = (torch.empty(shape, device=device) for _ in range(5))
        mean, rstd = (torch.zeros(shape[0], device=device) for _ in range(2))
        residual_norm.forward(
            forward_program(expr), [a], a, None, None, EPS, 0, None, y, mean, rstd
        )
        sums = torch.full((2, 3, shape[1]), torch.nan, device=device)
        residual_norm.backward(
            forward_program(expr),
            backward_program(expr),
            [a],
            a,
            None,
            mean,
            rstd,
            0,
            None,
            dy,
            [da],
            dr,
            -1,
            sums,
            (0,),
        )
        assert (sums == 0).all()


def bad_values_stay_in_their_row(device: str):
    """NaN and infinity spoil their own row, dropped or not, as in torch, and no other."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 70, generator=generator)
    r = torch.randn(6, 70, generator=generator)
    mask = dropout_mask(SEED, 6, 70, 0.5)
    a[1, int(mask[1].nonzero()[3])], a[3, 69], r[4, 0] = torch.nan, torch.inf, -torch.inf
    a[2, int((~mask[2]).nonzero()[0])] = torch.nan
    a[5, int((~mask[5]).nonzero()[0])] = torch.inf
    y = torch.empty(6, 70, device=device)
    mean, rstd = torch.empty(2, 6, device=device)
    seed = torch.tensor([SEED], device=device)
    program = forward_program(Expr.parse("a"))
    there = (a.to(device), r.to(device))
    residual_norm.forward(
        program, [there[0]], there[1], None, None, EPS, threshold(0.5), seed, y, mean, rstd
    )
    want = oracle(a, r, None, None, 0.5, EPS, SEED)
    torch.testing.assert_close(y.cpu(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert want.isnan().all(1).tolist() == [False, True, True, True, True, True]


def far_rows(path: str, rows: int, stride: int):
    """Rows more than 2^31 elements apart, in a sparse file instead of memory (CPU only)."""
    shape = (rows, 36)
    buffer = torch.from_file(path, shared=True, size=rows * stride, dtype=torch.float16)
    far = buffer.as_strided(shape, (stride, 1))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).half()
    near, ones = torch.full_like(values, torch.nan), torch.ones_like(values)
    mean, rstd = torch.empty(2, rows)
    program, gradient = (make(Expr.parse("a")) for make in (forward_program, backward_program))
    far.copy_(values)
    zero = torch.zeros_like(values)
    residual_norm.forward(program, [far], zero, None, None, EPS, 0, None, near, mean, rstd)
    want = oracle(values, zero, None, None, 0.0, EPS)
    torch.testing.assert_close(near, want, rtol=1e-3, atol=1e-3)
    far.fill_(torch.nan)
    residual_norm.forward(program, [values], zero, None, None, EPS, 0, None, far, mean, rstd)
    torch.testing.assert_close(far.clone(), near, rtol=0, atol=0)
    far.fill_(torch.nan)
    sums = torch.empty(1, 2, 36)
    residual_norm.backward(
        program,
        gradient,
        [values],
        zero,
        None,
        mean,
        rstd,
        0,
        None,
        near,
        [far],
        ones,
        -1,
        sums,
        (),
    )
    torch.testing.assert_close(far.clone(), ones, rtol=0, atol=0)
