"""What the elementwise kernels are checked for, on any device: `test_kernels_segment` calls these
in the interpreter's process and on a GPU. Every function raises AssertionError where a check
fails.
"""

import torch
from torch import Tensor

from fastffn.expr import Expr, backward_program, forward_program
from fastffn.kernels import segment
from fastffn.ops import reference

SENTINEL = 777.0


def spread(shape: tuple[int, int], layout: str, dtype: torch.dtype, generator) -> Tensor:
    """A [rows, columns] tensor of normal numbers with the strides that `layout` names."""
    rows, columns = shape
    buffer_shape, view = {
        "contiguous": ((rows, columns), lambda t: t),
        "pitched": ((rows, columns + 4), lambda t: t[:, :columns]),
        "shifted": ((rows, columns + 5), lambda t: t[:, 3 : 3 + columns]),
        "stepped": ((2 * rows, 3 * columns), lambda t: t[::2, ::3]),
        "transposed": ((columns, rows), lambda t: t.t()),
        "row": ((1, columns), lambda t: t.expand(rows, columns)),
        "column": ((rows, 1), lambda t: t.expand(rows, columns)),
        "scalar": ((1, 1), lambda t: t.expand(rows, columns)),
    }[layout]
    values = torch.randn(buffer_shape, generator=generator, dtype=torch.float64) * 2
    return view(values.to(dtype))


def run_on(device: str, program, inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """`segment.run` on `device` with the strides of `inputs` and `outputs` (both on the CPU) kept.

    The outputs' memory starts as NaN inside the views and as a sentinel around them, which must
    stay.
    """

    def move(tensor: Tensor) -> Tensor:
        size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.as_strided((size,), (1,), tensor.storage_offset())
        offset = tensor.storage_offset() % 8  # keeps the alignment of the first element
        buffer = torch.full((size + offset + 8,), SENTINEL, dtype=tensor.dtype, device=device)
        buffer[offset : offset + size] = flat.to(device)
        return buffer.as_strided(tensor.shape, tensor.stride(), offset)

    moved = [move(tensor) for tensor in inputs]
    targets = [move(tensor) for tensor in outputs]
    whole = []
    for target in targets:
        storage = torch.empty(0, dtype=target.dtype, device=device).set_(target.untyped_storage())
        storage.fill_(SENTINEL)
        target.fill_(torch.nan)
        whole.append(storage)
    segment.run(program, moved, targets)
    results = [target.cpu().clone() for target in targets]
    for storage, target in zip(whole, targets, strict=True):
        target.fill_(SENTINEL)
        assert bool((storage == SENTINEL).all()), "memory around an output was written"
    return results


def within_rule(out: Tensor, exact: Tensor, usual: Tensor, what: str):
    """The oracle rule: at most twice torch's error in the same type, plus 1e-6 of the maximum."""
    error = (out.double() - exact).abs().max()
    allowed = 2 * (usual.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert error <= allowed, f"{what}: error {error:.3g} where {allowed:.3g} is allowed"


def truth(expr: Expr, inputs: list[Tensor], upstream: Tensor, dtype) -> list[Tensor]:
    """The value and the gradient of every input, by the reference in `dtype`."""
    leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in inputs]
    value = reference.elementwise(expr, dict(zip(expr.inputs, leaves, strict=True)))
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream.to(dtype))]


def agrees(
    device: str,
    text: str,
    shape: tuple[int, int] = (9, 67),
    dtype: torch.dtype = torch.float32,
    layouts: tuple[str, ...] = ("contiguous",),
    out_layout: str = "contiguous",
    grad_layout: str = "contiguous",
    ties: bool = False,
):
    """Forward and backward of the expression `text` keep the oracle rule.

    Args:
        layouts: of the inputs, in order; the last one serves all further inputs.
        ties: inputs are small whole numbers, so that max has ties and the kinks are hit.
    """
    expr = Expr.parse(text)
    generator = torch.Generator().manual_seed(0)
    names = [layouts[min(i, len(layouts) - 1)] for i in range(len(expr.inputs))]
    inputs = [spread(shape, name, dtype, generator) for name in names]
    if ties:
        inputs = [tensor.clone().round().clamp(-2, 2) for tensor in inputs]
    upstream = spread(shape, grad_layout, dtype, generator)
    exact = truth(expr, inputs, upstream, torch.float64)
    usual = truth(expr, inputs, upstream, dtype)
    # The interpreter cuts off where the hardware rounds to bf16: there torch does the rounding.
    out_dtype = torch.float32 if device == "cpu" and dtype == torch.bfloat16 else dtype

    def empty() -> Tensor:
        return spread(shape, out_layout, out_dtype, generator)

    (value,) = run_on(device, forward_program(expr), inputs, [empty()])
    within_rule(value.to(dtype), exact[0], usual[0], f"{text}: value")
    outputs = [empty() for _ in inputs]
    gradients = run_on(device, backward_program(expr), [upstream, *inputs], outputs)
    for name, out, want, torchs in zip(expr.inputs, gradients, exact[1:], usual[1:], strict=True):
        within_rule(out.to(dtype), want, torchs, f"{text}: gradient of {name}")


def special_values(device: str, text: str):
    """Infinities, NaN, zeros and huge arguments give what torch gives; NaN never gets lost."""
    expr = Expr.parse(text)
    inf, nan = torch.inf, torch.nan
    points = [nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 30.0, -30.0, 100.0, -100.0]
    grid = torch.tensor(points)
    pair = torch.meshgrid(grid, grid, indexing="ij")
    inputs = [pair[i].contiguous() for i in range(len(expr.inputs))]
    upstream = torch.full_like(inputs[0], 0.75)
    want = truth(expr, inputs, upstream, torch.float32)
    (value,) = run_on(device, forward_program(expr), inputs, [torch.empty_like(upstream)])
    # At infinity torch's own devices differ in which results are NaN; elsewhere they agree.
    finite = torch.stack([~tensor.isinf() for tensor in inputs]).all(0)
    sure = finite | ~want[0].isnan()
    torch.testing.assert_close(value[sure], want[0][sure], rtol=1e-5, atol=1e-30, equal_nan=True)
    outputs = [torch.empty_like(upstream) for _ in inputs]
    gradients = run_on(device, backward_program(expr), [upstream, *inputs], outputs)
    for out, expected in zip(gradients, want[1:], strict=True):
        torch.testing.assert_close(
            out[finite], expected[finite], rtol=1e-5, atol=1e-6, equal_nan=True
        )


def small_arguments(device: str):
    """tanh and elu keep their relative accuracy near 0, where the plain formulas cancel."""
    x = torch.logspace(-30, 0.5, 4096).reshape(32, 128)
    x = torch.cat([x, -x])
    for text, function in (("tanh(a)", torch.tanh), ("elu(a)", torch.nn.functional.elu)):
        (out,) = run_on(device, forward_program(Expr.parse(text)), [x], [torch.empty_like(x)])
        exact = function(x.double())
        relative = ((out.double() - exact) / exact).abs().max()
        assert relative < 5e-7, f"{text}: relative error {relative:.3g}"


def far_rows(path: str, rows: int, stride: int):
    """Rows more than 2^31 elements apart, in a sparse file instead of memory (CPU only)."""
    shape, dtype = (rows, 36), torch.float16
    buffer = torch.from_file(path, shared=True, size=rows * stride, dtype=dtype)
    far = buffer.as_strided(shape, (stride, 1))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    program = forward_program(Expr.parse("relu(a)"))
    far.copy_(values)
    near = torch.full(shape, torch.nan, dtype=dtype)
    segment.run(program, [far], [near])
    torch.testing.assert_close(near, values.relu(), rtol=0, atol=0)
    far.fill_(torch.nan)
    segment.run(program, [values], [far])
    torch.testing.assert_close(far.clone(), values.relu(), rtol=0, atol=0)


def mixed_types(device: str):
    """16-bit inputs into an fp32 output are not rounded on the way; any fp64 makes all fp64."""
    generator = torch.Generator().manual_seed(0)
    program = forward_program(Expr.parse("mul(gelu(a), tanh(b))"))
    for types in ((torch.bfloat16, torch.float16), (torch.float32, torch.float64)):
        a, b = (spread((7, 45), "contiguous", dtype, generator) for dtype in types)
        out_type = torch.float64 if torch.float64 in types else torch.float32
        (out,) = run_on(device, program, [a, b], [torch.empty(7, 45, dtype=out_type)])
        exact = torch.nn.functional.gelu(a.double(), approximate="tanh") * torch.tanh(b.double())
        tolerance = 1e-14 if out_type == torch.float64 else 1e-6
        assert (out.double() - exact).abs().max() <= tolerance * exact.abs().max()
        if out_type == torch.float64:
            continue
        (rounded,) = run_on(device, program, [a, b], [torch.empty(7, 45, dtype=torch.bfloat16)])
        torch.testing.assert_close(rounded.double(), exact, rtol=2**-7, atol=1e-30)


def empty_and_single(device: str):
    """Nothing to compute is no launch; single rows, columns and elements are computed."""
    program = forward_program(Expr.parse("mul(a, b)"))
    for shape in ((0, 5), (5, 0), (0, 0), (1, 1), (1, 135), (135, 1)):
        a, b = torch.randn(shape), torch.randn(shape)
        out = torch.full(shape, torch.nan, device=device)
        segment.run(program, [a.to(device), b.to(device)], [out])
        torch.testing.assert_close(out.cpu(), a * b)
    a = torch.randn(9, 4, device=device)[:, 1:2]  # a strided single column
    out = torch.full((9, 1), torch.nan, device=device)
    segment.run(program, [a, a], [out])
    torch.testing.assert_close(out, a * a)
