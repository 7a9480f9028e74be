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

    def where(self) -> tuple[int, int]:
        stream = 0 if self.device == "cpu" else torch.cuda.current_stream().cuda_stream
        return 0, stream

    def elementwise(self, program: Program, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        size = tuple(outputs[0].shape)
        operands = [
            (x.data_ptr(), CODES[x.dtype], x.expand(size).stride()) for x in (*inputs, *outputs)
        ]
        self.module.cuda_elementwise(self.program(program), size, operands, *self.where())


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
    moved = [inputs[name].to(device).expand(size) for name in expr.inputs]
    outs = [poisoned(size, dtype, device) for _ in same]
    cuda.elementwise(forward_program(expr), moved, outs[:1])
    cuda.elementwise(backward_program(expr), [grad.to(device), *moved], outs[1:])
    for what, out, want, usual in zip(["value", *expr.inputs], outs, exact, same, strict=True):
        assert_accurate(out.cpu(), want, usual, f"{what} of {expr}")
