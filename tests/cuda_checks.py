"""What the CUDA functions of csrc are checked for: `test_cuda_emulated` calls these on the
emulator's module and on a GPU. Every function raises AssertionError where a check fails.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from oracle import assert_accurate
from torch import Tensor

from fastffn.expr import Expr, Program, backward_program, forward_program
from fastffn.ops import reference
from fastffn.ops import residual_norm_reference as norm_reference

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
DTYPES = list(CODES)


@dataclass(frozen=True)
class Cuda:
    """The functions on addresses of one device, called with tensors.

    Attributes:
        module: has cuda_elementwise and the others, and Program.
        device: where its addresses lie: "cpu" for the emulator.
    """

    module: ModuleType
    device: str

    def program(self, program: Program):
        return self.module.Program(program.packed())

    def routine(self, program: Program, registers: int, width: int = -1) -> Tensor:
        """The bytes of a program in device memory."""
        packed = self.module.cuda_routine(self.program(program), registers, width)
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(self.device)

    def where(self) -> tuple[int, int]:
        stream = 0 if self.device == "cpu" else torch.cuda.current_stream().cuda_stream
        return 0, stream

    def elementwise(self, program: Program, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        size = tuple(outputs[0].shape)
        operands = [
            (x.data_ptr(), CODES[x.dtype], x.expand(size).stride()) for x in (*inputs, *outputs)
        ]
        self.module.cuda_elementwise(self.program(program), size, operands, *self.where())

    def summed_elementwise(
        self,
        program: Program,
        operands: list[Tensor],
        sums: Tensor,
        chunk: int,
        summed: tuple[int, ...],
        routine: Tensor | None = None,
        registers: int = 0,
    ) -> None:
        rows, columns = operands[-1].shape
        self.module.cuda_summed_elementwise(
            *(self.program(program), rows, columns, [matrix(x) for x in operands]),
            *(sums.data_ptr(), chunk, list(summed), *self.where()),
            routine=routine.data_ptr() if routine is not None else 0,
            registers=registers,
        )


def matrix(x: Tensor | None) -> tuple[int, int, int, int]:
    """A matrix or a row vector; a column vector must be given as a matrix."""
    if x is None:
        return 0, 0, 0, 0
    row, column = x.stride() if x.dim() == 2 else (0, x.stride(0))
    return x.data_ptr(), CODES[x.dtype], row, column


def moved(x: Tensor | None, device: str) -> Tensor | None:
    """On a device with the same strides, which `to` gives up."""
    if x is None or device == "cpu":
        return x
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def compute_type(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in {x.dtype for x in tensors} else torch.float32


def poisoned(shape, dtype, device) -> Tensor:
    """Memory full of NaN, so that what a kernel forgets to write shows."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def elementwise(cuda: Cuda, expr: Expr, inputs: dict[str, Tensor], grad: Tensor) -> None:
    """Value and gradients before their sums over broadcast dimensions, by the oracle rule."""
    size, dtype = grad.shape, grad.dtype
    broadcast = {name: x.expand(size) for name, x in inputs.items()}

    def truth(kind: torch.dtype) -> list[Tensor]:
        leaves = {n: x.to(kind, copy=True).requires_grad_() for n, x in broadcast.items()}
        value = reference.elementwise(expr, leaves)
        return [value.detach(), *torch.autograd.grad(value, list(leaves.values()), grad.to(kind))]

    exact, same = truth(torch.float64), truth(dtype)
    device = cuda.device
    operands = [moved(inputs[name], device).expand(size) for name in expr.inputs]
    outs = [poisoned(size, dtype, device) for _ in same]
    cuda.elementwise(forward_program(expr), operands, outs[:1])
    cuda.elementwise(backward_program(expr), [moved(grad, device), *operands], outs[1:])
    for what, out, want, usual in zip(["value", *expr.inputs], outs, exact, same, strict=True):
        assert_accurate(out.cpu(), want, usual, f"{what} of {expr}")


def summed_elementwise(
    cuda: Cuda, expr: Expr, inputs: dict[str, Tensor], grad: Tensor, chunk: int
) -> None:
    """The gradients of `expr` and their column sums, by the oracle rule; twice the same bits."""
    (rows, columns), dtype, device = grad.shape, grad.dtype, cuda.device

    def truth(kind: torch.dtype) -> list[Tensor]:
        leaves = {
            n: x.expand(grad.shape).to(kind, copy=True).requires_grad_() for n, x in inputs.items()
        }
        value = reference.elementwise(expr, leaves)
        gradients = torch.autograd.grad(value, list(leaves.values()), grad.to(kind))
        return [*gradients, *(gradient.sum(0) for gradient in reversed(gradients))]

    exact, same = truth(torch.float64), truth(dtype)
    count = len(expr.inputs)
    summed = tuple(reversed(range(count)))
    given = [moved(inputs[name], device).expand(grad.shape) for name in expr.inputs]
    results = []
    for _ in range(2):
        outs = [poisoned(grad.shape, dtype, device) for _ in range(count)]
        sums = poisoned((-(-rows // chunk), count, columns), compute_type(grad), device)
        operands = [moved(grad, device), *given, *outs]
        cuda.summed_elementwise(backward_program(expr), operands, sums, chunk, summed)
        results.append([*outs, *sums.sum(0).unbind(0)])
    for out, again, want, usual in zip(*results, exact, same, strict=True):
        assert out.equal(again)
        assert_accurate(out.cpu(), want, usual, str(expr))


@dataclass
class Norm:
    """A call of the row kernel: layer_norm(residual + dropout(expr(inputs))) and its gradients.

    The residual is the input `residual_of` of the expression too, or a tensor of its own.
    """

    expr: Expr
    inputs: dict[str, Tensor]
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor
    p: float = 0.0
    seed: int = 0
    eps: float = 1e-5
    residual_of: str | None = None

    def truth(self, kind: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
        """Value and gradients by torch, and the row sum of the program's first gradient."""
        leaves = {name: self.inputs[name] for name in self.expr.inputs}
        others = {"residual": self.residual, "weight": self.weight, "bias": self.bias}
        leaves.update({name: x for name, x in others.items() if x is not None})
        leaves = {n: x.to(kind, copy=True).requires_grad_() for n, x in leaves.items()}
        e = reference.elementwise(self.expr, {n: leaves[n] for n in self.expr.inputs})
        residual = leaves.get("residual", torch.zeros_like(e))
        affine = leaves.get("weight"), leaves.get("bias")
        y = norm_reference.residual_norm(e, residual, *affine, self.p, self.eps, self.seed)
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy.to(kind))
        results = dict(zip(leaves, gradients, strict=True))
        first = results[self.expr.inputs[0]].sum(0)
        if self.residual_of:
            results[self.residual_of] = results[self.residual_of] + results.pop("residual")
        return {"y": y.detach(), **results}, first

    def run(
        self, cuda: Cuda, chunk: int, first_row: int = 0, captured: Expr | None = None
    ) -> dict[str, Tensor]:
        """The same by the kernels, the gradients of the first input summed over the rows too.

        Where `captured` is given, the call names its programs, and device memory those of `expr`.
        """
        device, (rows, columns), dtype = cuda.device, self.dy.shape, self.dy.dtype
        inputs = [moved(self.inputs[name], device) for name in self.expr.inputs]
        others = (self.residual, self.weight, self.bias)
        residual, weight, bias = (moved(x, device) for x in others)
        dy = moved(self.dy, device)
        compute = compute_type(dy, *inputs)
        mean, rstd = (poisoned((rows, 1), compute, device) for _ in range(2))
        y = poisoned(dy.shape, dtype, device)
        seed = torch.tensor([self.seed], device=device)
        threshold = norm_reference.threshold(self.p)
        programs = forward_program(self.expr), backward_program(self.expr)
        forward, backward = {}, {}
        if captured:
            routines = [cuda.routine(program, 8) for program in programs]
            forward = {"routine": routines[0].data_ptr(), "registers": 8}
            backward = {**forward, "gradient_routine": routines[1].data_ptr()}
            programs = forward_program(captured), backward_program(captured)
        common = [
            *(cuda.program(programs[0]), rows, columns),
            *([matrix(x) for x in inputs], matrix(residual), matrix(weight), matrix(bias)),
            *(self.eps, threshold, seed.data_ptr() if threshold else 0, matrix(mean), matrix(rstd)),
        ]
        cuda.module.cuda_residual_norm(*common, matrix(y), first_row, *cuda.where(), **forward)
        gradients = [poisoned(dy.shape, dtype, device) for _ in inputs]
        alone = residual is not None and self.residual_of is None
        dresidual = poisoned(dy.shape, dtype, device) if alone else None
        added_to = self.expr.inputs.index(self.residual_of) if self.residual_of else -1
        sums = poisoned((-(-rows // chunk), 3, columns), compute, device)
        cuda.module.cuda_residual_norm_backward(
            *(*common, matrix(dy), cuda.program(programs[1])),
            *([matrix(x) for x in gradients], matrix(dresidual), added_to),
            *(sums.data_ptr(), chunk, [0], first_row, *cuda.where()),
            **backward,
        )
        sums = sums.sum(0)
        results = {"y": y, **dict(zip(self.expr.inputs, gradients, strict=True))}
        if alone:
            results["residual"] = dresidual
        if self.weight is not None:
            results["weight"] = sums[0]
        if self.bias is not None:
            results["bias"] = sums[1]
        self.first_summed = sums[2].cpu()
        return {name: x.cpu() for name, x in results.items()}

    def check(self, cuda: Cuda, chunk: int = 4) -> dict[str, Tensor]:
        """Runs twice: by the oracle rule, and twice the same bits."""
        (exact, exact_sum), (same, same_sum) = map(self.truth, (torch.float64, self.dy.dtype))
        if self.dy.shape[1] == 1:  # gradients are 0, and torch's are what is left of rounding
            exact = {name: x.where(x.abs() > 1e-12, 0) for name, x in exact.items()}
            exact_sum = exact_sum.where(exact_sum.abs() > 1e-12, 0)
        results, again = self.run(cuda, chunk), self.run(cuda, chunk)
        assert results.keys() == exact.keys()
        for name, out in results.items():
            assert out.equal(again[name])
            assert_accurate(out, exact[name], same[name], f"{name} of {self.expr}")
        assert_accurate(self.first_summed, exact_sum, same_sum, "sum of the first gradient")
        return results


def far_rows(cuda: Cuda, path: str) -> None:
    """Rows more than 2^31 elements apart, in a sparse file instead of memory (CPU only)."""
    shape, stride = (2, 36), 2**31 + 8
    buffer = torch.from_file(path, shared=True, size=stride + 36, dtype=torch.float16)
    far = buffer.as_strided(shape, (stride, 1))
    near = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    far.copy_(near)
    out = poisoned(shape, torch.float16, "cpu")
    relu, norm = (forward_program(Expr.parse(text)) for text in ("relu(a)", "add(a, a)"))
    cuda.elementwise(relu, [far], [out])
    assert out.equal(near.relu())
    far.fill_(torch.nan)
    cuda.elementwise(relu, [near], [far])
    assert far.equal(near.relu())
    far.copy_(near)
    common = [cuda.program(norm), *shape, [matrix(far)], matrix(far), matrix(None), matrix(None)]
    for y in (out, far):
        cuda.module.cuda_residual_norm(
            *(*common, 1e-5, 0, 0, matrix(None), matrix(None), matrix(y), 0, *cuda.where())
        )
    want = torch.nn.functional.layer_norm(3 * near.float(), shape[1:])
    torch.testing.assert_close(out.float(), want, rtol=1e-3, atol=1e-3)
    assert far.equal(out)
