"""The op `fastffn::elementwise`: an expression over tensors, forward and backward in one pass each.

Shapes broadcast as in torch. The forward keeps its inputs and nothing else; the backward Program
recomputes what it needs, which costs less than writing and reading intermediates. One op boundary:
schema, fake and device implementations are registered, and the autograd.Function sits at the op's
Autograd key, so that opcheck passes and torch.compile takes the op whole. (torch.library.custom_op
with register_autograd does the same at about twice the overhead per call.)
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..expr import Expr, Program, backward_program, forward_program
from . import backend, reference

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc DType
_MAX_DIMS, _MAX_OPERANDS, _MAX_REGISTERS = 8, 16, 256  # csrc/elementwise.h, csrc/module.cpp

_library = torch.library.Library("fastffn", "FRAGMENT")
_library.define("elementwise(str expr, Tensor[] inputs) -> Tensor")
_library.define(
    "elementwise_backward(str expr, Tensor grad, Tensor[] inputs, bool[] wanted) -> Tensor[]"
)


def elementwise(expr: Expr | str, **inputs: Tensor) -> Tensor:
    """Evaluates an expression over tensors.

    Args:
        expr: an `Expr` or its text, such as "mul(gelu(a), sigmoid(b))".
        **inputs: one tensor per input of the expression, float32, float64, bfloat16 or float16, on
            one device; any strides; shapes broadcast. Different dtypes promote as in torch.
            bfloat16 and float16 are computed in float32 and rounded once, to nearest even.

    Returns:
        A tensor of the broadcast shape. It is differentiable once; for gradients of gradients use
        `fastffn.ops.reference.elementwise`. (A lone add, mul or relu is torch's own operator.)

    Raises:
        ExprError: the text is no expression.
        UserError: a tensor is missing, unknown, of another device or no floating-point tensor;
            shapes that do not broadcast.
    """
    text, names = _describe(expr)
    if tuple(inputs) != names:
        _check_names(text, names, inputs)
    tensors = [inputs[name] for name in names]
    _check_tensors(names, tensors)
    if _is_torchs_own(text):
        _shape(tensors)
        return reference.elementwise(_compiled(text).expr, inputs)
    return _autograd(text, tensors) if _plain(tensors) else _forward_op(text, tensors)


def _describe(expr: Expr | str) -> tuple[str, tuple[str, ...]]:
    """The text of the expression and the names of its inputs."""
    text = expr if isinstance(expr, str) else str(expr)
    return text, _compiled(text).expr.inputs


def _is_torchs_own(text: str) -> bool:
    """Whether the expression is one operation that memory bounds in both directions: nothing is
    left to fuse, and torch's own operator has the lower overhead per call.
    """
    expr = _compiled(text).expr
    return expr.height == 1 and expr.op in ("add", "mul", "relu")


# torch.compile then calls them while tracing instead of tracing them. This is all that
# torch.compiler.assume_constant_result does, without its import of the whole compiler (1.6 s).
_describe._dynamo_marked_constant = True
_is_torchs_own._dynamo_marked_constant = True


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether only autograd sees the call: the dispatcher, half of the overhead, is left out."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def _check_names(text: str, names: tuple[str, ...], inputs: dict[str, Tensor]) -> None:
    missing = [name for name in names if name not in inputs]
    unknown = [name for name in inputs if name not in names]
    if missing or unknown:
        what = f"{missing[0]!r} is missing" if missing else f"{unknown[0]!r} is no input of it"
        raise UserError(f"elementwise {text}: {what}; its inputs are {', '.join(names)}")


def _check_tensors(names: tuple[str, ...], tensors: Sequence[Tensor]) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"elementwise: {name} is {tensor.dtype}; take float32, float64, bfloat16 or float16"
            )
        if tensor.device != tensors[0].device:
            raise UserError(
                f"elementwise: {name} is on {tensor.device} and {names[0]} on {tensors[0].device}; "
                "move them to one device"
            )


@dataclass(frozen=True)
class _Compiled:
    """What is derived once per expression text."""

    expr: Expr
    forward: Program

    @functools.cached_property
    def native_forward(self):
        return backend.cpp()[0].Program(self.forward.packed())

    @functools.cache  # noqa: B019  the instances live as long as the cache of texts anyway
    def backward(self, wanted: tuple[bool, ...]) -> Program:
        names = [n for n, want in zip(self.expr.inputs, wanted, strict=True) if want]
        return backward_program(self.expr, tuple(names))

    @functools.cache  # noqa: B019
    def native_backward(self, wanted: tuple[bool, ...]):
        return backend.cpp()[0].Program(self.backward(wanted).packed())


@functools.lru_cache(maxsize=4096)
def _compiled(text: str) -> _Compiled:
    expr = Expr.parse(text)
    return _Compiled(expr, forward_program(expr))


def _shape(tensors: Sequence[Tensor]) -> torch.Size:
    if all(tensor.shape == tensors[0].shape for tensor in tensors):
        return tensors[0].shape
    try:
        return torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    except RuntimeError:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise UserError(f"elementwise: the shapes {shapes} do not broadcast") from None


def _dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _empty(shape: torch.Size, dtype: torch.dtype, like: Sequence[Tensor]) -> Tensor:
    """An output in the memory order of the first tensor of its shape, to be walked like it."""
    for tensor in like:
        if tensor.shape == shape:
            return torch.empty_like(tensor, dtype=dtype)
    return like[0].new_empty(shape, dtype=dtype)


def _run_cpp(native, size: torch.Size, tensors: Sequence[Tensor]) -> None:
    operands = [
        (
            tensor.data_ptr(),
            _DTYPES[tensor.dtype],
            tensor.stride() if tensor.shape == size else tensor.expand(size).stride(),
        )
        for tensor in tensors
    ]
    backend.cpp()[0].elementwise(native, size, operands)


def _cpp_takes(program: Program, dims: int) -> bool:
    return (
        backend.cpp()[0] is not None
        and dims <= _MAX_DIMS
        and len(program.inputs) + len(program.outputs) <= _MAX_OPERANDS
        and program.registers <= _MAX_REGISTERS
    )


def _rows(tensor: Tensor, size: torch.Size) -> Tensor:
    """`tensor` over `size` as two dimensions; a copy only if its strides cannot say so."""
    columns = size[-1] if size else 1
    return tensor.expand(size).reshape(-1, columns)


def _run_triton(program: Program, size: torch.Size, inputs: Sequence[Tensor], outputs) -> None:
    views = [_rows(output, size) for output in outputs]
    backend.triton()[0].run(program, [_rows(tensor, size) for tensor in inputs], views)
    for output, view in zip(outputs, views, strict=True):
        if (
            view.data_ptr() != output.data_ptr()
        ):  # an output whose strides two dimensions cannot say
            output.copy_(view.view(size))


def _forward(text: str, inputs: Sequence[Tensor]) -> Tensor:
    compiled = _compiled(text)
    size = _shape(inputs)
    if inputs[0].is_cuda and backend.triton()[0]:
        output = _empty(size, _dtype(inputs), inputs)
        _run_triton(compiled.forward, size, inputs, [output])
        return output
    if not inputs[0].is_cuda and _cpp_takes(compiled.forward, len(size)):
        output = _empty(size, _dtype(inputs), inputs)
        _run_cpp(compiled.native_forward, size, (*inputs, output))
        return output
    output = reference.elementwise(
        compiled.expr, dict(zip(compiled.expr.inputs, inputs, strict=True))
    )
    return output.clone() if compiled.expr.is_leaf else output


def _gradients_like(grad: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """Where the backward writes: each gradient over the whole size, before it is summed."""
    size = grad.shape
    gradients = []
    for tensor, want in zip(inputs, wanted, strict=True):
        if want:
            summed = tensor.shape != size and tensor.dtype in (torch.bfloat16, torch.float16)
            dtype = torch.float32 if summed else tensor.dtype
            gradients.append(_empty(size, dtype, (*inputs, grad)))
    return gradients


def _backward(
    text: str, grad: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    compiled = _compiled(text)
    wanted = tuple(wanted)
    targets = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
    program = compiled.backward(wanted)
    on_gpu = grad.is_cuda and backend.triton()[0]
    if on_gpu or (not grad.is_cuda and _cpp_takes(program, grad.dim())):
        gradients = _gradients_like(grad, inputs, wanted)
        if on_gpu:
            _run_triton(program, grad.shape, (grad, *inputs), gradients)
        else:
            native = compiled.native_backward(wanted)
            _run_cpp(native, grad.shape, (grad, *inputs, *gradients))
        return [
            gradient.sum_to_size(tensor.shape).to(tensor.dtype)
            if gradient.shape != tensor.shape
            else gradient
            for gradient, tensor in zip(gradients, targets, strict=True)
        ]
    with torch.enable_grad():
        leaves = [
            tensor.detach().requires_grad_(want)
            for tensor, want in zip(inputs, wanted, strict=True)
        ]
        output = reference.elementwise(
            compiled.expr, dict(zip(compiled.expr.inputs, leaves, strict=True))
        )
    needed = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
    return [g.clone() for g in torch.autograd.grad(output, needed, grad.to(output.dtype))]


def _fake_forward(text: str, inputs: list[Tensor]) -> Tensor:
    return _empty(_shape(inputs), _dtype(inputs), inputs)


def _fake_backward(
    text: str, grad: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    targets = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
    return [
        target.new_empty(target.shape) if target.shape != grad.shape else gradient
        for target, gradient in zip(targets, _gradients_like(grad, inputs, wanted), strict=True)
    ]


def _below_autograd(text: str, inputs: Sequence[Tensor]) -> Tensor:
    if _plain(inputs):
        return _forward(text, inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(text, inputs)


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text: str, *inputs: Tensor) -> Tensor:
        ctx.text = text
        ctx.save_for_backward(*inputs)
        return _below_autograd(text, inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.is_grad_enabled():  # once_differentiable lets some double backwards pass, and lie
            raise RuntimeError(
                "fastffn: gradients of gradients (create_graph=True) are not available here; "
                "use fastffn.ops.reference.elementwise for this expression"
            )
        wanted = ctx.needs_input_grad[1:]
        inputs = ctx.saved_tensors
        run = _backward if _plain((grad, *inputs)) else _backward_op
        gradients = iter(run(ctx.text, grad, inputs, wanted))
        return None, *(next(gradients) if want else None for want in wanted)


def _autograd(text: str, inputs: Sequence[Tensor]) -> Tensor:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _Elementwise.apply(text, *inputs)
    return _below_autograd(text, inputs)


_library.impl("elementwise", _forward, "CompositeExplicitAutograd")
_library.impl("elementwise", _autograd, "Autograd")
_library.impl("elementwise_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastffn::elementwise", _fake_forward, lib=_library)
torch.library.register_fake("fastffn::elementwise_backward", _fake_backward, lib=_library)
_forward_op = torch.ops.fastffn.elementwise.default
_backward_op = torch.ops.fastffn.elementwise_backward.default
