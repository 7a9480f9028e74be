"""What the matrix products are checked for, on any device: `test_kernels_linear` calls these in the
interpreter's process and on a GPU. Every function raises AssertionError where a check fails.
"""

from dataclasses import replace
from unittest import mock

import torch
from oracle import assert_accurate
from segment_checks import truth
from torch import Tensor

from fastffn.expr import Expr, Program, backward_program, forward_program
from fastffn.kernels import linear, tiles

SENTINEL = 768.0  # exact in every type

LAYOUTS = {  # shape of the memory; strides and offset of the [r, c] view of it
    "contiguous": lambda r, c: ((r, c), (c, 1), 0),
    "transposed": lambda r, c: ((c, r), (1, r), 0),
    "pitched": lambda r, c: ((r + 1, c + 8 - c % 8), (c + 8 - c % 8, 1), 0),
    "pitched transposed": lambda r, c: ((c + 1, r + 8 - r % 8), (1, r + 8 - r % 8), 0),
    "last slice": lambda r, c: ((r, c + 8 - c % 8), (c + 8 - c % 8, 1), 8 - c % 8),
    "shifted": lambda r, c: ((r, c + 5), (c + 5, 1), 3),
    "second half": lambda r, c: ((r, 2 * c), (2 * c, 1), c),
    "stepped": lambda r, c: ((2 * r, 3 * c), (6 * c, 3), 0),
    "row": lambda r, c: ((1, c), (0, 1), 0),
    "column": lambda r, c: ((r, 1), (1, 0), 0),
    "scalar": lambda r, c: ((1, 1), (0, 0), 0),
}


def matrix(device, shape, layout, dtype, generator=None, around=torch.nan) -> Tensor:
    """A matrix of the strides that `layout` names: normal numbers, or NaN without a generator.

    The memory around it holds `around`.
    """
    size, strides, offset = LAYOUTS[layout](*shape)
    memory = torch.full(size, around, dtype=dtype).view(-1)
    inside = torch.arange(memory.numel()).as_strided(shape, strides, offset).reshape(-1)
    if generator is None:
        memory[inside] = torch.nan
    else:
        values = torch.randn(memory.shape, generator=generator, dtype=torch.float64)
        memory[inside] = values.to(dtype)[inside]
    return memory.to(device).as_strided(shape, strides, offset)


def untouched(tensor: Tensor) -> bool:
    """Whether the memory around an output is as it was. Overwrites the output."""
    tensor.fill_(SENTINEL)
    memory = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return bool((memory.set_(tensor.untyped_storage()) == SENTINEL).all())


def results(expr: Expr, backward: bool, operands: list[Tensor], dtype) -> list[Tensor]:
    """The outputs of the forward or backward Program of `expr`, by the reference in `dtype`."""
    operands = [operand.to(dtype) for operand in operands]
    if backward:
        return truth(expr, operands[1:], operands[0], dtype)[1:]
    return truth(expr, operands, operands[0], dtype)[:1]


def agrees(
    device: str,
    text: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    products: int = 1,
    backward: bool = False,
    a: str = "contiguous",
    weight: str = "transposed",
    extra: str = "contiguous",
    out: str = "contiguous",
    out_dtype: torch.dtype | None = None,
    bias: str | None = "contiguous",
    summed: tuple[int, ...] = (),
    keep: bool = False,
    alias: bool = False,
    full_tiles: bool = False,
):
    """Outputs and sums of products with the Program of the expression `text` keep the oracle rule.

    Args:
        shape: M, N, K.
        backward: the gradients of `text` with the first product upstream, instead of its value.
        a, weight, extra, out, bias: layouts; `out` serves the first output, the others are
            contiguous. `bias` None: there is none.
        keep: the products are outputs as well.
        alias: the first output overwrites the first extra.
        full_tiles: of the size that many rows get.
    """
    if full_tiles:
        with mock.patch.object(tiles, "_FILLED", 1):
            tiles.linear.cache_clear()
            agrees(
                device, text, shape, dtype, products, backward, a, weight, extra, out, out_dtype,
                bias, summed, keep, alias,
            )  # fmt: skip
        tiles.linear.cache_clear()
        return
    M, N, K = shape
    generator = torch.Generator().manual_seed(0)
    expr = Expr.parse(text)
    program = (backward_program if backward else forward_program)(expr)
    if keep:
        program = replace(program, outputs=(*range(products), *program.outputs))
    left = matrix(device, (M, K), a, dtype, generator)
    weights = [matrix(device, (K, N), weight, dtype, generator) for _ in range(products)]
    biases = [None] * products
    if bias:
        biases = [matrix(device, (1, N), bias, dtype, generator)[0] for _ in range(products)]
    extras = [
        matrix(device, (M, N), extra, dtype, generator)
        for _ in range(len(program.inputs) - products)
    ]
    layouts = [out, *("contiguous" for _ in program.outputs[1:])]
    outputs = [
        matrix(device, (M, N), layout, out_dtype or dtype, around=SENTINEL) for layout in layouts
    ]
    row_tiles = linear.rows_of_sums(M, N, K, dtype)
    sums = torch.full((row_tiles, len(summed), N), torch.nan, device=device) if summed else None

    def wanted(compute: torch.dtype) -> list[Tensor]:
        values = []
        for w, b in zip(weights, biases, strict=True):
            z = left.cpu().to(compute) @ w.cpu().to(compute)
            values.append(z if b is None else z + b.cpu().to(compute))
        operands = values + [extra.cpu() for extra in extras]
        return (values if keep else []) + results(expr, backward, operands, compute)

    exact, usual = wanted(torch.float64), wanted(dtype)
    if alias:
        outputs[0] = extras[0]
    linear.run(left, weights, biases, program, extras, outputs, sums, summed)
    for i, (got, want, torchs) in enumerate(zip(outputs, exact, usual, strict=True)):
        torchs = torchs.to(got.dtype)  # which may round more
        assert_accurate(got.cpu(), want, torchs, f"{text}: output {i}")
    for i, output in enumerate(summed):
        torchs = usual[output].to(torch.float64 if dtype == torch.float32 else dtype).sum(0)
        error = (sums[:, i].sum(0).cpu().double() - exact[output].sum(0)).abs().max()
        scale = exact[output].abs().sum(0).max()
        allowed = 2 * (torchs.double() - exact[output].sum(0)).abs().max() + 1e-6 * scale
        assert error <= allowed, f"{text}: sums of {output}: {error:.3g}, allowed {allowed:.3g}"
    for output in outputs if not alias else []:
        assert untouched(output), "memory around an output was written"


def propagates(device: str):
    """NaN and infinity in a factor reach the rows and columns that they should, and no others."""
    M, N, K = 40, 50, 70
    generator = torch.Generator().manual_seed(0)
    program = forward_program(Expr.parse("relu(z)"))
    for value in (torch.nan, torch.inf, -torch.inf):
        left = matrix(device, (M, K), "contiguous", torch.float32, generator)
        weight = matrix(device, (K, N), "transposed", torch.float32, generator)
        left[3, 69], weight[69, 7] = value, value
        out = matrix(device, (M, N), "contiguous", torch.float32)
        sums = torch.empty(linear.rows_of_sums(M, N, K, torch.float32), 1, N, device=device)
        linear.run(left, [weight], [None], program, [], [out], sums, (0,))
        want = torch.relu(left.cpu() @ weight.cpu())
        torch.testing.assert_close(out.cpu(), want, rtol=1e-5, atol=1e-4, equal_nan=True)
        total = sums.sum((0, 1)).cpu()
        torch.testing.assert_close(total, want.sum(0), rtol=1e-4, atol=1e-3, equal_nan=True)


def empty_sizes(device: str):
    """Nothing to compute is no launch; a product without terms is its bias."""
    program: Program = forward_program(Expr.parse("relu(z)"))
    for M, N, K in ((0, 5, 3), (5, 0, 3), (4, 5, 0), (0, 0, 0)):
        left = torch.ones(M, K, device=device)
        bias = torch.arange(N, dtype=torch.float32, device=device)
        out = torch.full((M, N), torch.nan, device=device)
        linear.run(left, [torch.ones(K, N, device=device)], [bias], program, [], [out])
        torch.testing.assert_close(out, bias.expand(M, N))
    for M, N, K in ((0, 5, 3), (5, 0, 3), (5, 3, 0)):
        out = torch.full((N, K), torch.nan, device=device)
        linear.weight_gradient(
            torch.ones(M, N, device=device), torch.ones(M, K, device=device), out
        )
        assert bool((out == 0).all())


def weight_gradient_agrees(
    device: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    dz: str = "contiguous",
    x: str = "contiguous",
    out: str = "contiguous",
    out_dtype: torch.dtype | None = None,
):
    """dz^T x keeps the oracle rule, and comes out with the same bits twice; `shape`: M, N, K."""
    M, N, K = shape
    generator = torch.Generator().manual_seed(0)
    left = matrix(device, (M, N), dz, dtype, generator)
    right = matrix(device, (M, K), x, dtype, generator)
    got, again = (
        matrix(device, (N, K), out, out_dtype or dtype, around=SENTINEL) for _ in range(2)
    )
    linear.weight_gradient(left, right, got)
    linear.weight_gradient(left, right, again)
    assert torch.equal(got, again)
    left, right = left.cpu(), right.cpu()
    exact = left.double().t() @ right.double()
    usual = (left.t() @ right).to(got.dtype)
    assert_accurate(got.cpu(), exact, usual, "weight gradient")
    assert untouched(got), "memory around the result was written"


def far_rows(path: str, stride: int):
    """Rows more than 2^31 elements apart, in a sparse file instead of memory (CPU only)."""
    M, N, K, dtype = 3, 20, 18, torch.float16
    buffer = torch.from_file(path, shared=True, size=M * stride, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    near = matrix("cpu", (M, K), "contiguous", dtype, generator)
    weight = matrix("cpu", (K, N), "transposed", dtype, generator)
    far = buffer.as_strided((M, K), (stride, 1))
    far_out = buffer.as_strided((M, N), (stride, 1), K)
    far.copy_(near)
    program = forward_program(Expr.parse("relu(z)"))
    outs = [torch.empty(M, N, dtype=dtype), far_out]
    for left, out in ((near, outs[0]), (far, outs[1])):
        linear.run(left, [weight], [None], program, [], [out])
    assert torch.equal(outs[0], far_out.clone())
    gradients = [torch.empty(N, K, dtype=dtype) for _ in range(2)]
    linear.weight_gradient(outs[0], near, gradients[0])
    linear.weight_gradient(far_out, far, gradients[1])
    assert torch.equal(*gradients)


def one_program_many_operands(device: str):
    """What is remembered of one launch does not serve operands that need another one."""
    M, N, K = 40, 45, 33
    generator = torch.Generator().manual_seed(0)
    program = forward_program(Expr.parse("add(z, x)"))
    wide = [matrix(device, (M, 2 * n), "contiguous", torch.float32, generator) for n in (K, N, N)]
    w = matrix(device, (K, N), "contiguous", torch.float32, generator)
    for half in (1, 0):  # a distance to an aligned address must not be remembered
        left, extra, out = (
            x[:, half * n : (half + 1) * n] for x, n in zip(wide, (K, N, N), strict=True)
        )
        for rows in (M, 7, M):
            for bias in (None, extra[0]):
                want = left @ w + extra + (0 if bias is None else bias)
                linear.run(left[:rows], [w], [bias], program, [extra[:rows]], [out[:rows]])
                torch.testing.assert_close(out[:rows], want[:rows], rtol=1e-4, atol=1e-4)
