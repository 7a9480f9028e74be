"""The op `fastffn::ffn`: one feed-forward unit with residual and LayerNorm, forward and backward.

    p  = prologue(x)                    [.., H]   elementwise, skipped if it is x
    z  = p @ [up; gate].T + bias        [.., I] or [.., 2 I]   one product
    a  = middle(z1, zg, x[.., :I])      [.., I]   elementwise
    z2 = a @ down.T + bias              [.., H]
    y  = LayerNorm(x + dropout(epilogue(z2, x)))        one pass over the rows

Several genes in one call share x, the weights and the first product, which is computed at the
largest width: gene k has the leading widths[k] columns of it.

What autograd keeps is the caller's choice, in numbers per row (token):

    recompute      kept besides x                          computed again in the backward
    "none"         I (2 I gated) + H + 2, and I on CPU     prologue, epilogue
    "activation"   I (2 I gated) + H + 2                   and middle: no product
    "all"          2                                       and both products

(2: mean and reciprocal deviation of the LayerNorm.) All three give the same gradients, bit for bit:
what is computed again is computed by the same calls on the same pieces.

The dropout mask is a function of a seed (csrc/random.h), drawn from torch's generator of the
device, so nothing is stored and nothing depends on the number of threads.

Autograd sits at the op's Autograd key, as in `elementwise`. Under autocast the products run in
autocast's type on casts of the weights, the LayerNorm in float32, as torch does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..expr import Gene
from . import backend, execute, ffn_fused, ffn_interpreted, ffn_reference
from . import residual_norm_reference as oracle
from .elementwise import constant_result, is_decomposed, is_plain
from .ffn_interpreted import Call
from .ffn_plan import plan
from .slices import accumulated, padded

_OPERANDS = (
    "Tensor x, Tensor up, Tensor? up_bias, Tensor? gate, Tensor? gate_bias, Tensor down, "
    "Tensor? down_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? seed"
)
_SETTINGS = "str genes, int[] widths, float dropout, float eps, str recompute"  # genes: a line each
_COUNT = 10  # operands
RECOMPUTE = ("none", "activation", "all")

_library = torch.library.Library("fastffn", "FRAGMENT")
_library.define(f"ffn({_OPERANDS}, {_SETTINGS}) -> Tensor[]")
_library.define(f"ffn_forward({_OPERANDS}, {_SETTINGS}) -> (Tensor[], Tensor[])")
_library.define(
    f"ffn_backward(Tensor[] grads, Tensor[] kept, {_OPERANDS}, {_SETTINGS}, bool wants_x, "
    "bool wants_weights) -> Tensor?[]"
)


def ffn(
    x: Tensor,
    gene: Gene | str,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    dropout: float = 0.0,
    eps: float = 1e-5,
    recompute: str = "none",
    seed: Tensor | None = None,
) -> Tensor:
    """One unit of a searched feed-forward network, with residual and LayerNorm.

    Args:
        x: [.., H], float32, float64, bfloat16 or float16, any strides.
        gene: the unit's function, such as "tanh(down(gelu(up(x))))"; of a `Gene` the expression
            counts, not stack and ratio: the widths are those of the weights.
        up, gate: [I, H]; `gate` exactly if the function has one. down: [H, I]. Rows may have a
            stride: leading slices of larger weights are not copied.
        up_bias, gate_bias: [I] or None. down_bias: [H] or None. norm_weight, norm_bias: [H] or
        None.
        dropout: probability, in steps of 1 / 65536; the caller says 0 in evaluation.
        eps: of the LayerNorm.
        recompute: what is kept for the backward, see the module's docstring.
        seed: int64, one element, on x's device: fixes the dropout mask. None draws one from torch's
            generator.

    Returns:
        [.., H] of x's dtype; under autocast float32. Differentiable once.

    Raises:
        UserError: shapes, dtypes or devices that do not fit each other; an unknown `recompute`.
        ExprError: the text is no function of a unit.
    """
    operands = [x, up, up_bias, gate, gate_bias, down, down_bias, norm_weight, norm_bias, seed]
    text = _text(gene)
    _check(operands, text, dropout, recompute)
    return run(operands, (text, (up.shape[0],), dropout, eps, recompute))[0]


@constant_result
def _text(gene: Gene | str) -> str:
    return str(gene.expr) if isinstance(gene, Gene) else gene


@constant_result
def _is_gated(gene: str) -> bool:
    return plan(gene).gated


def _check(operands, gene: str, dropout: float, recompute: str) -> None:
    x, up, up_bias, gate, gate_bias, down, down_bias, norm_weight, norm_bias, seed = operands
    if recompute not in RECOMPUTE:
        raise UserError(f"recompute: expected one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout: expected a probability from 0 to below 1, got {dropout!r}")
    if x.dim() == 0 or up.dim() != 2 or x.shape[-1] != up.shape[1] or up.shape[1] == 0:
        raise UserError(f"ffn: x {list(x.shape)} does not go into up {list(up.shape)}")
    if _is_gated(gene) != (gate is not None):
        raise UserError("ffn: give `gate` exactly if the function has one")
    width, hidden = up.shape
    expected = (
        ("up", up, (width, hidden)),
        ("up_bias", up_bias, (width,)),
        ("gate", gate, (width, hidden)),
        ("gate_bias", gate_bias, (width,)),
        ("down", down, (hidden, width)),
        ("down_bias", down_bias, (hidden,)),
        ("norm_weight", norm_weight, (hidden,)),
        ("norm_bias", norm_bias, (hidden,)),
    )
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise UserError(f"ffn: {name} is {list(tensor.shape)}, expected {list(shape)}")
        if tensor.device != x.device:
            raise UserError(f"ffn: {name} is on {tensor.device} and x on {x.device}; move one")
        if tensor.dtype not in execute.DTYPES:
            raise UserError(f"ffn: {name} is {tensor.dtype}; take a floating-point type")
    for name, tensor, _ in expected[1:6]:
        if tensor is not None and tensor.dtype != up.dtype:
            raise UserError(f"ffn: {name} is {tensor.dtype} and up {up.dtype}; they are one type")
    if x.dtype not in execute.DTYPES:
        raise UserError(f"ffn: x is {x.dtype}; take float32, float64, bfloat16 or float16")
    execute.check_seed("ffn", seed, x, 1)


def run(operands: Sequence[Tensor | None], settings: tuple) -> list[Tensor]:
    """The op on checked operands (in the order of the schema) and settings, the fast way if there
    is one: without the dispatcher, which is a good part of a small call."""
    if settings[2] > 0 and operands[-1] is None and not backend.is_portable():
        operands = [*operands[:-1], oracle.draw_seeds(operands[0], len(settings[1]))]
    if is_decomposed():
        return _reference(operands, settings)
    if not is_plain([x for x in operands if x is not None]):
        return _op(*operands, *settings)
    device = operands[0].device.type
    if torch.is_autocast_enabled(device):
        return _autocast(device, *operands, *settings)
    if _wants_gradients(operands):
        return list(_FFN.apply(True, settings, *operands))
    return _inference(*operands, *settings)


def _wants_gradients(operands) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)


def _reference(operands: Sequence[Tensor | None], settings: tuple) -> list[Tensor]:
    genes, widths, dropout, eps, _ = settings
    return [
        ffn_reference.ffn(*operands[:-1], seed, gene, width, dropout, eps)
        for gene, width, seed in zip(
            genes.split("\n"), widths, _seeds(operands[-1], len(widths)), strict=True
        )
    ]


def _seeds(seed: Tensor | None, count: int) -> Sequence[Tensor | None]:
    return [None] * count if seed is None else seed.unbind()


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _call(
    operands: Sequence[Tensor | None], genes: str, widths, dropout: float, eps: float
) -> Call:
    x, *others = map(execute.in_memory, operands)
    return Call(
        _rows(x),
        *others,
        [plan(gene) for gene in genes.split("\n")],
        widths,
        oracle.threshold(dropout),
        eps,
    )


def _engine(x: Tensor, up: Tensor):
    """Who computes: the fused kernels know no float64."""
    fused = execute.engine_of(x)[0] == "triton" and torch.float64 not in (x.dtype, up.dtype)
    return ffn_fused if fused else ffn_interpreted


def _compute(operands, settings, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
    genes, widths, dropout, eps, recompute = settings
    x = operands[0]
    call = _call(operands, genes, widths, dropout, eps)
    outputs = [execute.dense_like(x, x.dtype) for _ in widths]
    # Views of the outputs are filled, not returned: an output of a Function that is a view could
    # not be changed in place.
    matrices = [y if y.dim() == 2 else y.view(call.x.shape) for y in outputs]
    kept = _engine(x, call.up).forward(call, matrices, recompute if keep else None)
    return outputs, kept


def _inference(*arguments) -> list[Tensor]:
    return _compute(arguments[:_COUNT], arguments[_COUNT:], keep=False)[0]


def _forward(*arguments) -> tuple[list[Tensor], list[Tensor]]:
    return _compute(arguments[:_COUNT], arguments[_COUNT:], keep=True)


def _backward(grads, kept, *arguments) -> list[Tensor | None]:
    """The gradients, each of the size of its operand."""
    gradients = _leading_gradients(grads, kept, *arguments)
    return [padded(g, operand) for g, operand in zip(gradients, arguments, strict=False)]


def _leading_gradients(grads, kept, *arguments) -> list[Tensor | None]:
    """The gradients, those of weights of which leading slices were used of the slices' size."""
    operands, settings = arguments[:_COUNT], arguments[_COUNT:]
    *settings, wants_x, wants_weights = settings
    genes, widths, dropout, eps, recompute = settings
    x = operands[0]
    call = _call(operands, genes, widths, dropout, eps)
    grads = [_rows(execute.in_memory(grad)) for grad in grads]
    found = _engine(x, call.up).backward(call, kept, recompute, grads, wants_x, wants_weights)
    gradients = list(vars(found).values())
    if found.x is not None:
        gradients[0] = found.x.view(x.shape)
    return gradients


def _fake_inference(*arguments) -> list[Tensor]:
    x, widths = arguments[0], arguments[_COUNT + 1]
    return [x.new_empty(x.shape) for _ in widths]


def _fake_forward(*arguments) -> tuple[list[Tensor], list[Tensor]]:
    x, up, _, gate, *_, norm_weight, norm_bias, _ = arguments[:_COUNT]
    _, widths, _, _, recompute = arguments[_COUNT:]
    rows = x.numel() // x.shape[-1]
    dtype = execute.compute_dtype(x, up, norm_weight, norm_bias)
    kept = [x.new_empty((2, rows), dtype=dtype) for _ in widths]
    if recompute != "all":
        total, fused = max(widths) * (1 if gate is None else 2), _engine(x, up) is ffn_fused
        sizes = [total, *(x.shape[-1] for _ in widths)]
        sizes += widths if recompute == "none" and not fused else []
        matrix = ffn_fused.matrix if fused else ffn_interpreted.matrix
        kept += [matrix(up, rows, columns) for columns in sizes]
    return _fake_inference(*arguments), kept


def _fake_backward(grads, kept, *arguments) -> list[Tensor | None]:
    *_, wants_x, wants_weights = arguments
    wanted = [wants_x, *(wants_weights for _ in range(_COUNT - 2))]
    vectors = (2, 4, 6, 7, 8)  # their gradients cost nothing, so they are always there
    return [
        x.new_empty(x.shape) if x is not None and (want or i in vectors) else None
        for i, (x, want) in enumerate(zip(arguments[: _COUNT - 1], wanted, strict=True))
    ]


class _FFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plain: bool, settings, *operands):
        if plain:
            outputs, kept = _forward(*operands, *settings)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                outputs, kept = _forward_op(*operands, *settings)
        ctx.settings = settings
        ctx.interpreted = backend.is_interpreting()
        ctx.save_for_backward(*operands, *kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():  # once_differentiable lets some double backwards pass, and lie
            raise RuntimeError(
                "fastffn: gradients of gradients (create_graph=True) are not available here; "
                "use fastffn.ops.ffn_reference.ffn"
            )
        saved = ctx.saved_tensors  # once: a checkpoint computes them again at each look
        operands, kept = saved[:_COUNT], saved[_COUNT:]
        _, _, wants_x, *wants = ctx.needs_input_grad
        weights = any(wants[i] for i in (0, 2, 4))  # up, gate, down
        plain = is_plain([x for x in (*grads, *saved) if x is not None])
        arguments = list(grads), list(kept), *operands, *ctx.settings, wants_x, weights
        with backend.interpreted(ctx.interpreted):
            if not plain:
                return None, None, *_backward_op(*arguments), None
            gradients = _leading_gradients(*arguments)
        pairs = zip(gradients, operands, strict=False)
        return None, None, *(accumulated(gradient, operand) for gradient, operand in pairs), None


def _autograd(*arguments) -> list[Tensor]:
    operands, settings = arguments[:_COUNT], arguments[_COUNT:]
    if _wants_gradients(operands):
        return list(_FFN.apply(False, settings, *operands))
    with torch._C._AutoDispatchBelowAutograd():
        return _op(*arguments)


def _autocast(device: str, *arguments) -> list[Tensor]:
    """The products' operands in autocast's type, the parts of them that are used; x in float32, as
    torch normalises the sum under autocast."""
    operands, settings = list(arguments[:_COUNT]), arguments[_COUNT:]
    dtype, width = torch.get_autocast_dtype(device), max(settings[1])
    if operands[0].dtype != torch.float64:
        operands[0] = operands[0].float()
        for i in range(1, 7):  # weights and biases of the products
            x = operands[i]
            if x is None:
                continue
            if i < 5:
                x = x if x.shape[0] == width else x[:width]
            elif i == 5:
                x = x if x.shape[1] == width else x[:, :width]
            operands[i] = x.to(dtype)
    with torch.autocast(device, enabled=False):
        return run(operands, settings)


for _device in ("CPU", "CUDA", "CompositeExplicitAutograd"):  # the last: by the reference
    _library.impl("ffn", _inference, _device)
    _library.impl("ffn_forward", _forward, _device)
    _library.impl("ffn_backward", _backward, _device)
_library.impl("ffn", _autograd, "Autograd")
_library.impl("ffn", lambda *arguments: _autocast("cpu", *arguments), "AutocastCPU")
_library.impl("ffn", lambda *arguments: _autocast("cuda", *arguments), "AutocastCUDA")
torch.library.register_fake("fastffn::ffn", _fake_inference, lib=_library)
torch.library.register_fake("fastffn::ffn_forward", _fake_forward, lib=_library)
torch.library.register_fake("fastffn::ffn_backward", _fake_backward, lib=_library)
_op = torch.ops.fastffn.ffn.default
_forward_op = torch.ops.fastffn.ffn_forward.default
_backward_op = torch.ops.fastffn.ffn_backward.default

from . import flops  # noqa: E402, F401  once the ops are there
