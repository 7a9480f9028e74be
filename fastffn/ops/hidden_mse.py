"""The op `fastffn::hidden_mse`: squared error of projected student states, without keeping them.

    P = student @ weight.T + bias       [.., T], or the student itself
    loss = mean over real tokens and the width of (P - teacher)^2

Rows go in slabs. A slab is projected, compared and summed, and where gradients are wanted theirs
are made at once, while the difference is there: with D = P - teacher, zero at padding,

    d student = c D weight        d weight = c D^T student        d bias = c sum D        c = 2 / n

Kept for the backward are these three, so as much as student and weight take and nothing of the
teacher's size, and c: the kept gradients lack the factor, because c is so small that float16 would
lose them. (Of half precision they lack the power of two in c, whose product rounds nothing.) The
backward multiplies both by the upstream gradient.

Without a projection there is no product to save: the backward takes the difference again, in one
pass over the states, and nothing but them is kept.

On a CPU the real rows of a padded batch are gathered before the product, and padding costs nothing.
Elsewhere that would wait for the device, so padding is computed and masked out. Sums are per row,
then per slab, then over slabs, so that the loss does not depend on the number of threads.

Why not autograd over the formula: it keeps the projected states and their difference. Why not make
the gradients of a projection in the backward: its product would be computed twice.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from . import execute
from . import hidden_mse_reference as oracle
from .elementwise import is_decomposed, is_plain
from .execute import HALVES, compute_dtype
from .loss_inputs import check_teacher, real_tokens, save, saved
from .matmul import linear, weight_gradient

# Bytes of a slab of differences, and the fewest rows. With a projection each slab costs an addition
# to the gradient of the weight, without one a slab had better stay in cache. A GPU needs more rows
# at a time to be busy.
_SLAB_BYTES = {"cpu": 8 << 20}
_SLAB_BYTES_ELSEWHERE = 64 << 20
_MIN_ROWS = 1024
_CACHED_BYTES = 3 << 19

_library = torch.library.Library("fastffn", "FRAGMENT")
_OPERANDS = "Tensor student, Tensor teacher, Tensor? weight, Tensor? bias, Tensor? real"
_library.define(f"hidden_mse({_OPERANDS}) -> Tensor")
_library.define(f"hidden_mse_forward({_OPERANDS}, bool[] wanted) -> (Tensor, Tensor, Tensor?[])")
_library.define(
    "hidden_mse_difference(Tensor student, Tensor teacher, Tensor? real, Tensor factor) -> Tensor"
)


def hidden_mse(
    student: Tensor,
    teacher: Tensor,
    attention_mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Mean squared difference of hidden states over all real tokens and the width.

    The loss on hidden states and embeddings of TinyBERT (arXiv 1909.10351) and EfficientBERT (arXiv
    2109.07222), which count padding too; here it is left out. A long sentence weighs more than a
    short one: each token counts the same.

    Args:
        student: [batch, length, student width] (any leading dimensions without `lengths`), float32,
            float64, bfloat16 or float16, any strides.
        teacher: [batch, length, teacher width]; no gradient flows into it.
        attention_mask: [batch, length], bool or integers, non-zero at real tokens; None: all real.
            What padding holds, NaN included, changes nothing and its gradient is 0.
        weight: [teacher width, student width], of the student's dtype: projects the student. None:
            the widths are equal.
        bias: [teacher width] or None.
        lengths: [batch] integers, instead of a mask of right padding.

    Returns:
        A scalar, float64 if student or teacher is, else float32: half precision rounds the
        projected states, as torch does, and nothing after. 0 without tokens. Differentiable once.
        Under autocast the product is in autocast's type.

    Raises:
        UserError: shapes, dtypes or devices that do not fit each other, or a teacher that requires
            a gradient.
    """
    _check(student, teacher, weight, bias)
    real = real_tokens(student.shape[:-1], student.device, attention_mask, lengths)
    operands = (student, teacher, weight, bias, real)
    if is_decomposed():
        return oracle.hidden_mse(student, teacher, real, weight, bias)
    device = student.device.type
    if not is_plain([x for x in operands if x is not None]):
        return _op(*operands)
    if torch.is_autocast_enabled(device):
        return _autocast(device, *operands)
    if any(_wanted(operands)):
        return _HiddenMSE.apply(True, *operands)
    return _inference(*operands)


def _check(student: Tensor, teacher: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check_teacher(teacher)
    named = {"student": student, "teacher": teacher, "weight": weight, "bias": bias}
    for name, x in named.items():
        if x is None:
            continue
        if x.dtype not in execute.DTYPES:
            raise UserError(f"hidden_mse: {name} is {x.dtype}; take a floating-point type")
        if x.device != student.device:
            raise UserError(f"hidden_mse: {name} is on {x.device}, the student on {student.device}")
    ends = (*student.shape[-1:], *teacher.shape[-1:])
    if student.shape[:-1] != teacher.shape[:-1] or len(ends) < 2 or 0 in ends:
        raise UserError(
            f"the student's {list(student.shape)} and the teacher's {list(teacher.shape)} are not "
            "states of the same tokens"
        )
    here, there = ends
    if weight is None:
        if bias is not None:
            raise UserError("hidden_mse: a bias needs a weight; give both or neither")
        if here != there:
            raise UserError(
                f"the student is {here} wide and the teacher {there}: "
                f"project the student by a weight of [{there}, {here}]"
            )
        return
    if weight.shape != (there, here):
        raise UserError(
            f"hidden_mse: weight is {list(weight.shape)}, expected [teacher width, student width] "
            f"= {[there, here]}"
        )
    if bias is not None and bias.shape != (there,):
        raise UserError(f"hidden_mse: bias is {list(bias.shape)}, expected {[there]}")
    if torch.is_autocast_enabled(student.device.type):
        return
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != student.dtype:
            raise UserError(
                f"hidden_mse: {name} is {x.dtype} and the student {student.dtype}: "
                "convert one, or run under autocast"
            )


def _wanted(operands) -> list[bool]:
    """Whether student, weight and bias want a gradient."""
    student, _, weight, bias, _ = operands
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in (student, weight, bias)]


def _rows(x: Tensor) -> Tensor:
    x = execute.in_memory(x)
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _slabs(rows: int, row_bytes: int, device: str, projected: bool) -> Iterator[slice]:
    """The pieces of the rows, by their sizes alone."""
    limit = _SLAB_BYTES.get(device, _SLAB_BYTES_ELSEWHERE)
    if not projected and device == "cpu":
        size = max(1, _CACHED_BYTES // row_bytes)
    else:
        size = max(_MIN_ROWS, limit // row_bytes & -64)
    if rows <= size + size // 2:
        yield slice(0, rows)
        return
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _gathers(device: str) -> bool:
    """Whether rows are taken by index: elsewhere their number is not known without waiting."""
    return device == "cpu"


class _Sums:
    """Gradients of weight and bias, added up over slabs, in float32 at least."""

    def __init__(self):
        self.total: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.float() if value.dtype in HALVES else value
        self.total[name] = value if name not in self.total else self.total[name] + value


def _compute(student, teacher, weight, bias, real, wanted: Sequence[bool]):
    """(loss, factor, gradients of student, weight and bias without that factor or None).

    Without a projection no gradient is wanted here: see `_difference`.
    """
    shape, dtype, device = student.shape, compute_dtype(student, teacher), student.device.type
    x, target = _rows(student), _rows(teacher)
    real = None if real is None else real.reshape(-1)
    places = padding = None
    if real is not None and weight is not None and _gathers(device):
        places, padding = (which.nonzero().squeeze(-1) for which in (real, ~real))
        places = None if padding.numel() == 0 else places
        real = None
    rows = x.shape[0] if places is None else places.numel()
    wants_student, wants_weight, wants_bias = wanted

    row_bytes = target.shape[1] * dtype.itemsize
    slabs = list(_slabs(rows, row_bytes, device, weight is not None)) if rows else []
    count = x.new_full((), rows, dtype=dtype) if real is None else real.sum().to(dtype)
    count = (count * target.shape[1]).clamp_(min=1)
    factor = 2 / count
    if x.dtype in HALVES and any(wanted):
        mantissa, exponent = torch.frexp(factor)
        factor = torch.ldexp(torch.ones_like(factor), exponent)
    gradient, sums, losses, scratch = None, _Sums(), [], None
    if weight is None and slabs:  # one piece of memory for all, which stays in cache
        rows_of_slab = max(part.stop - part.start for part in slabs)
        scratch = x.new_empty((rows_of_slab, x.shape[1]), dtype=dtype)
    if wants_student and (places is not None or len(slabs) != 1):
        gradient = x.new_empty(x.shape)
        if places is not None:
            gradient.index_fill_(0, padding, 0)
    for part in slabs:
        xs, ts = (_take(tensor, part, places) for tensor in (x, target))
        if weight is None:
            projected, into = xs, scratch[: xs.shape[0]]
        else:
            projected = linear(xs, weight, bias)
            into = projected if projected.dtype == dtype else None
        difference = _subtract(projected, ts, dtype, into)
        squares = torch.linalg.vector_norm(difference, dim=1).square()
        losses.append((squares if real is None else torch.where(real[part], squares, 0)).sum())
        if not any(wanted):
            continue
        if real is not None:
            mask = real[part].unsqueeze(-1)
            difference = torch.where(mask, difference, 0)
            xs = torch.where(mask, xs, 0) if wants_weight else xs
        if x.dtype in HALVES:
            difference *= mantissa
        d = difference.to(x.dtype)
        if wants_weight:
            sums.add("weight", _weight_gradient(d, xs))
        if wants_bias:
            sums.add("bias", difference.sum(0))
        if wants_student:
            dx = linear(d, weight.t())
            if gradient is None:
                gradient = dx
            elif places is None:
                gradient[part] = dx
            else:
                gradient.index_copy_(0, places[part], dx)
    loss = torch.stack(losses).sum() if losses else x.new_zeros((), dtype=dtype)
    gradients = [
        gradient.view(shape) if wants_student else None,
        sums.total.get("weight", torch.zeros_like(weight) if wants_weight else None),
        sums.total.get("bias", torch.zeros_like(bias) if wants_bias else None),
    ]
    return loss / count, factor, gradients


def _take(x: Tensor, part: slice, places: Tensor | None) -> Tensor:
    if places is None:
        return x if part.stop - part.start == x.shape[0] else x[part]
    return x.index_select(0, places[part])


def _subtract(x: Tensor, teacher: Tensor, dtype: torch.dtype, into: Tensor | None) -> Tensor:
    """x - teacher in `dtype`, which is that of `into`: the memory for it, or None."""
    if x.dtype == dtype:
        return torch.sub(x, teacher, out=into)
    return x.to(dtype).sub_(teacher) if into is None else into.copy_(x).sub_(teacher)


def _difference(student: Tensor, teacher: Tensor, real: Tensor | None, factor: Tensor) -> Tensor:
    """factor (student - teacher) at real tokens, 0 elsewhere; of the student's shape and dtype."""
    out = student.new_empty(student.shape)
    x, target, into = _rows(student), _rows(teacher), out.view(-1, student.shape[-1])
    dtype, device = compute_dtype(student, teacher), student.device.type
    padding, gathers = None if real is None else ~real.reshape(-1, 1), _gathers(device)
    for part in _slabs(x.shape[0], x.shape[1] * dtype.itemsize, device, False):
        place = into[part] if out.dtype == dtype else None
        difference = _subtract(x[part], target[part], dtype, place).mul_(factor)
        if padding is not None and not gathers:
            difference.masked_fill_(padding[part], 0)
        if place is None:
            into[part] = difference
    if padding is not None and gathers:
        into.index_fill_(0, padding.squeeze(-1).nonzero().squeeze(-1), 0)
    return out


def _weight_gradient(d: Tensor, x: Tensor) -> Tensor:
    if d.dtype == torch.float16:  # without the factor, its sums exceed float16's range
        d, x = d.float(), x.float()
    return weight_gradient(d, x)


def _inference(*operands) -> Tensor:
    return _compute(*operands, (False, False, False))[0]


def _fake(student, teacher, weight, bias, real) -> Tensor:
    return student.new_empty((), dtype=compute_dtype(student, teacher))


def _fake_forward(student, teacher, weight, bias, real, wanted):
    loss, dtype = _fake(student, teacher, weight, bias, real), compute_dtype(student)
    dtypes = (student.dtype, dtype, dtype)
    gradients = [
        x.new_empty(x.shape, dtype=kept) if want else None
        for want, x, kept in zip(wanted, (student, weight, bias), dtypes, strict=True)
    ]
    return loss, torch.empty_like(loss), gradients


def _fake_difference(student, teacher, real, factor) -> Tensor:
    return student.new_empty(student.shape)


class _HiddenMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plain: bool, *operands):
        student, teacher, weight, bias, real = operands
        _, wants_student, _, wants_weight, wants_bias, _ = ctx.needs_input_grad
        ctx.projected = weight is not None
        wanted = [ctx.projected and wants_student, wants_weight, wants_bias]
        if plain:
            loss, factor, gradients = _compute(*operands, wanted)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                loss, factor, gradients = _forward_op(*operands, wanted)
        ctx.dtypes = [None if x is None else x.dtype for x in (student, weight, bias)]
        kept = gradients if ctx.projected else (student, teacher, real)
        save(ctx, factor, *kept)
        return loss

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # once_differentiable lets some double backwards pass, and lie
            raise RuntimeError(
                "fastffn: gradients of gradients (create_graph=True) are not available here; "
                "use fastffn.ops.hidden_mse_reference.hidden_mse"
            )
        factor, *kept = saved(ctx)
        factor = factor * grad
        if not ctx.projected:
            plain = is_plain([x for x in (factor, *kept) if x is not None])
            difference = (_difference if plain else _difference_op)(*kept, factor)
            return None, difference, None, None, None, None
        student, weight, bias = (
            None if x is None else (x.to(factor.dtype) * factor).to(dtype)
            for x, dtype in zip(kept, ctx.dtypes, strict=True)
        )
        return None, student, None, weight, bias, None


def _autograd(*operands) -> Tensor:
    if any(_wanted(operands)):
        return _HiddenMSE.apply(False, *operands)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(*operands)


def _autocast(device: str, student, teacher, weight, bias, real) -> Tensor:
    if weight is not None and student.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        student, weight = student.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return hidden_mse(student, teacher, real, weight, bias)


for _device in ("CPU", "CUDA", "CompositeExplicitAutograd"):
    _library.impl("hidden_mse", _inference, _device)
    _library.impl("hidden_mse_forward", _compute, _device)
    _library.impl("hidden_mse_difference", _difference, _device)
_library.impl("hidden_mse", _autograd, "Autograd")
_library.impl("hidden_mse", lambda *operands: _autocast("cpu", *operands), "AutocastCPU")
_library.impl("hidden_mse", lambda *operands: _autocast("cuda", *operands), "AutocastCUDA")
torch.library.register_fake("fastffn::hidden_mse", _fake, lib=_library)
torch.library.register_fake("fastffn::hidden_mse_forward", _fake_forward, lib=_library)
torch.library.register_fake("fastffn::hidden_mse_difference", _fake_difference, lib=_library)
_op = torch.ops.fastffn.hidden_mse.default
_forward_op = torch.ops.fastffn.hidden_mse_forward.default
_difference_op = torch.ops.fastffn.hidden_mse_difference.default
