"""The op `fastffn::elementwise`: an expression over tensors, forward and backward in one pass each.

Shapes broadcast as in torch. The forward keeps its inputs and nothing else; the backward Program
recomputes what it needs, which costs less than writing and reading intermediates. One op boundary:
schema, fake and device implementations are registered, and the autograd.Function sits at the op's
Autograd key, so that opcheck passes and torch.compile takes the op whole.
(torch.library.custom_op with register_autograd does the same at about twice the overhead per call.)

Who serves a call: see `execute`; under a function transform and in the portable form
(`backend.portable`) it is the reference.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import UserError
from ..expr import Expr, backward_program, forward_program
from . import backend, execute, reference
from .execute import DTYPES, HALVES, Pass

_library = torch.library.Library("fastffn", "FRAGMENT")
_library.define("elementwise(str expr, Tensor[] inputs) -> Tensor")
_library.define(
    "elementwise_backward(str expr, Tensor grad, Tensor[] inputs, bool[] wanted) -> Tensor[]"
)


def elementwise(expr: Expr | str, /, **inputs: Tensor) -> Tensor:
    """Evaluates an expression over tensors.

    Args:
        expr: an `Expr` or its text, such as "mul(gelu(a), sigmoid(b))".
        **inputs: one tensor per input of the expression, float32, float64, bfloat16 or float16, on
            one device; any strides; shapes broadcast. Different dtypes promote as in torch.
            bfloat16 and float16 are computed in float32 and rounded once, to nearest even.

    Returns:
        A tensor of the broadcast shape. It is differentiable once; for gradients of gradients use
        `fastffn.ops.reference.elementwise`. (A lone add, mul or relu is torch's own operator, and
        under forward-mode differentiation or a function transform so is every operation.)

    Raises:
        ExprError: the text is no expression.
        UserError: a tensor is missing, unknown, of another device or no dense floating-point
            tensor; shapes that do not broadcast.
    """
    text, names, lone = _describe(expr)
    if tuple(inputs) != names:
        _check_names(text, names, inputs)
    tensors = [inputs[name] for name in names]
    _check_tensors(names, tensors)
    if lone is not None:
        op, *operands = lone
        _shape(tensors)
        return reference.PRIMITIVES[op](*(inputs[name] for name in operands))
    if is_decomposed():
        return reference.evaluate(_postfix(text), inputs)
    return _autograd(text, tensors) if is_plain(tensors) else _forward_op(text, tensors)


def constant_result(function):
    """torch.compile calls the function while tracing instead of tracing it. This is all that
    torch.compiler.assume_constant_result does, without its import of the whole compiler (1.6 s).
    """
    function._dynamo_marked_constant = True
    return function


@constant_result
def _describe(expr: Expr | str) -> tuple[str, tuple[str, ...], tuple[str, ...] | None]:
    """Text, names of the inputs, and (operation, operands) where torch's own operator serves best:
    one operation that memory bounds in both directions, so that there is nothing to fuse.
    """
    text = expr if isinstance(expr, str) else str(expr)
    expr = _compiled(text).expr
    lone = None
    if expr.height == 1 and expr.op in ("add", "mul", "relu"):
        lone = (expr.op, *(arg.name for arg in expr.args))
    return text, expr.inputs, lone


@constant_result
def _postfix(text: str) -> reference.Postfix:
    return _compiled(text).postfix


def _check_names(text: str, names: tuple[str, ...], inputs: dict[str, Tensor]) -> None:
    missing = [name for name in names if name not in inputs]
    unknown = [name for name in inputs if name not in names]
    if missing or unknown:
        what = f"{missing[0]!r} is missing" if missing else f"{unknown[0]!r} is no input of it"
        raise UserError(f"elementwise {text}: {what}; its inputs are {', '.join(names)}")


def _check_tensors(names: tuple[str, ...], tensors: Sequence[Tensor]) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise UserError(f"elementwise: {name} is a {type(tensor).__name__}, not a tensor")
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"elementwise: {name} is {tensor.dtype}; take float32, float64, bfloat16 or float16"
            )
        if tensor.layout is not torch.strided:
            raise UserError(f"elementwise: {name} is {tensor.layout}; make it dense first")
        if tensor.device != tensors[0].device:
            raise UserError(
                f"elementwise: {name} is on {tensor.device} and {names[0]} on {tensors[0].device}; "
                "move them to one device"
            )


def is_decomposed() -> bool:
    """Whether torch's own functions run in an op's place: in the portable form, and under vmap, jvp
    or another transform, which the ops have no rule for."""
    if backend.is_portable():
        return True
    if torch.compiler.is_compiling():
        return False
    return (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether only autograd sees the call: the dispatcher, half of the overhead, is left out."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.autograd._profiler_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(
            type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type in ("cpu", "cuda")
            for tensor in tensors
        )
    )


class _Compiled:
    """The Programs of one expression text."""

    def __init__(self, expr: Expr):
        self.expr = expr
        self.postfix = reference.postfix(expr)
        self.forward = Pass(forward_program(expr))
        self._backward: dict[tuple[bool, ...], Pass] = {}

    def backward(self, wanted: tuple[bool, ...]) -> Pass:
        if wanted not in self._backward:
            names = [n for n, want in zip(self.expr.inputs, wanted, strict=True) if want]
            self._backward[wanted] = Pass(backward_program(self.expr, tuple(names)))
        return self._backward[wanted]


@functools.lru_cache(maxsize=4096)
def _compiled(text: str) -> _Compiled:
    return _Compiled(Expr.parse(text))


def _shape(tensors: Sequence[Tensor]) -> torch.Size:
    if all(tensor.shape == tensors[0].shape for tensor in tensors):
        return tensors[0].shape
    try:
        return torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    except RuntimeError:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise UserError(f"elementwise: the shapes {shapes} do not broadcast") from None


def _dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """As torch promotes: tensors without dimensions count only if there are no others."""
    counted = [tensor.dtype for tensor in tensors if tensor.dim()]
    counted = counted or [tensor.dtype for tensor in tensors]
    return functools.reduce(torch.promote_types, counted)


def _empty(shape: torch.Size, dtype: torch.dtype, like: Sequence[Tensor]) -> Tensor:
    """An output in the memory order of the first tensor of its shape, to be walked like it."""
    for tensor in like:
        if tensor.shape == shape:
            return torch.empty_like(tensor, dtype=dtype)
    return like[0].new_empty(shape, dtype=dtype)


def _forward(text: str, inputs: Sequence[Tensor]) -> Tensor:
    compiled, size = _compiled(text), _shape(inputs)
    output = _empty(size, _dtype(inputs), inputs)
    execute.elementwise(compiled.forward, size, inputs, [output])
    return output


def _fake_forward(text: str, inputs: list[Tensor]) -> Tensor:
    return _empty(_shape(inputs), _dtype(inputs), inputs)


def _gradients(
    grad: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor]]:
    """The wanted inputs, and where the backward writes their gradients before they are summed.

    A gradient has the whole size, and float32 for a half that will be summed.
    """
    size, targets, gradients = grad.shape, [], []
    for tensor, want in zip(inputs, wanted, strict=True):
        if want:
            summed = tensor.shape != size and tensor.dtype in HALVES
            dtype = torch.float32 if summed else tensor.dtype
            targets.append(tensor)
            gradients.append(_empty(size, dtype, (*inputs, grad)))
    return targets, gradients


def _backward(
    text: str, grad: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    compiled, wanted = _compiled(text), tuple(wanted)
    targets, gradients = _gradients(grad, inputs, wanted)
    execute.elementwise(compiled.backward(wanted), grad.shape, (grad, *inputs), gradients)
    return [
        gradient if gradient.shape == x.shape else gradient.sum_to_size(x.shape).to(x.dtype)
        for x, gradient in zip(targets, gradients, strict=True)
    ]


def _fake_backward(
    text: str, grad: Tensor, inputs: list[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    return [
        gradient if gradient.shape == x.shape else x.new_empty(x.shape)
        for x, gradient in zip(*_gradients(grad, inputs, wanted), strict=True)
    ]


def _below_autograd(text: str, inputs: Sequence[Tensor]) -> Tensor:
    if is_plain(inputs):
        return _forward(text, inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(text, inputs)


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text: str, *inputs: Tensor) -> Tensor:
        ctx.text = text
        ctx.interpreted = backend.is_interpreting()
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
        run = _backward if is_plain((grad, *inputs)) else _backward_op
        with backend.interpreted(ctx.interpreted):
            gradients = iter(run(ctx.text, grad, inputs, wanted))
        return None, *(next(gradients) if want else None for want in wanted)


def _autograd(text: str, inputs: Sequence[Tensor]) -> Tensor:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _Elementwise.apply(text, *inputs)
    return _below_autograd(text, inputs)


for _device in ("CPU", "CUDA", "CompositeExplicitAutograd"):  # the last: by the reference
    _library.impl("elementwise", _forward, _device)
    _library.impl("elementwise_backward", _backward, _device)
_library.impl("elementwise", _autograd, "Autograd")
torch.library.register_fake("fastffn::elementwise", _fake_forward, lib=_library)
torch.library.register_fake("fastffn::elementwise_backward", _fake_backward, lib=_library)
_forward_op = torch.ops.fastffn.elementwise.default
_backward_op = torch.ops.fastffn.elementwise_backward.default
