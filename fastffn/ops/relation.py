"""Attention-relation distillation: KL between two models' token-to-token relations.

A relation of a and b, both [batch, length, width], is what attention computes, head by head:

    softmax(a_h b_h^T / (sqrt(d) * temperature))         d = width / num_heads, h = 1 .. num_heads

MiniLMv2 (arXiv 2012.15828) splits queries, keys or values of one layer into *relation heads*
(usually 48), whatever the number of attention heads, and pulls the student's relations towards
the teacher's. Only length x length maps are compared, so the two widths may differ.

What is computed here, for each example and head, is

    sum_i w_i KL(P_i || R_i)       P teacher's rows, R student's, w_i = 1 / (heads * tokens * batch)

that is, the mean over relation heads, over the real tokens of each example, over the examples.
Masked keys take no part in the softmax; masked queries weigh nothing; what padding holds, NaN
and infinity included, changes nothing; an example without tokens adds 0.

Loss and gradient are made in one pass over chunks of (batch x heads), because a chunk holds all
that the gradient needs: with G = w (R - P), dL/da = G b and dL/db = G^T a. Saved for backward are
only those two, as large as the inputs, and no length x length map outlives its chunk. Why not
plain autograd over the formula: it keeps 8 bytes per map entry and relation, 10 GB for QQ, KK and
VV at batch 32, length 512 and 48 heads. `relation_reference.py` holds that formula, as the oracle.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastffn.errors import UserError

# Entries of the length x length maps computed at a time; four maps of fp32 are then 16 MiB.
_CHUNK = 1 << 20


def split_relation_heads(x: Tensor, num_heads: int) -> Tensor:
    """Splits the width into relation heads: [batch, length, width] -> [batch, heads, length, d].

    A view. The number of relation heads is independent of the model's attention heads.

    Raises:
        UserError: `num_heads` does not divide the width.
    """
    if num_heads < 1 or x.shape[-1] % num_heads:
        raise _heads_error(num_heads, {x.shape[-1]})
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def relation_kl(
    student_a: Tensor,
    student_b: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor,
    num_heads: int = 48,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """KL divergence of the student's relations of (a, b) from the teacher's, a scalar.

    Args:
        student_a, student_b: [batch, length, student width], floating point.
        teacher_a, teacher_b: [batch, length, teacher width]; no gradient flows into them.
        num_heads: relation heads; must divide both widths.
        attention_mask: [batch, length], bool or integer, non-zero at real tokens; None: all real.
        temperature: divides the scores; the loss is multiplied by its square, which keeps the
            gradient's size.

    Returns:
        A scalar in nats, float64 for float64 students and else float32. Sums are made in that
        precision whatever the inputs' (autocast has no say). Differentiable once.

    Raises:
        UserError: shapes or heads that do not fit, a mask of another shape or type, a teacher
            that requires a gradient, a temperature that is not positive.
    """
    _check(student_a, student_b, teacher_a, teacher_b, num_heads, attention_mask, temperature)
    return _RelationKL.apply(
        student_a,
        student_b,
        teacher_a,
        teacher_b,
        num_heads,
        attention_mask,
        temperature,
        torch.is_grad_enabled(),
    )


def relation_loss(
    pairs: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    weights: Sequence[float] | None = None,
    num_heads: int = 48,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Weighted sum of several relations' `relation_kl`, a scalar.

    MiniLMv2's loss is `pairs = [(q_s, q_s, q_t, q_t), (k_s, ...), (v_s, ...)]`, weights 1;
    MiniLM's is (q_s, k_s, q_t, k_t) and (v_s, v_s, v_t, v_t) with the attention heads.

    Args:
        pairs: (student_a, student_b, teacher_a, teacher_b) of each relation.
        weights: one number for each pair; None: 1 each.

    Raises:
        UserError: no pairs, as many weights as there are not pairs, or as `relation_kl`.
    """
    if not pairs:
        raise UserError("relation_loss needs at least one pair of tensors to relate")
    weights = [1.0] * len(pairs) if weights is None else list(weights)
    if len(weights) != len(pairs):
        raise UserError(f"{len(weights)} weights for {len(pairs)} relations: give one for each")
    terms = [
        weight * relation_kl(*pair, num_heads, attention_mask, temperature)
        for weight, pair in zip(weights, pairs, strict=True)
    ]
    return torch.stack(terms).sum()


class _RelationKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_a, student_b, teacher_a, teacher_b, heads, mask, tau, with_grad):
        dtype = torch.float64 if student_a.dtype == torch.float64 else torch.float32
        real = None if mask is None else mask != 0
        with torch.autocast(student_a.device.type, enabled=False):
            loss, grad_a, grad_b = _loss_and_gradients(
                (student_a, student_b),
                (teacher_a, teacher_b),
                heads,
                real,
                tau,
                dtype,
                [with_grad and need for need in ctx.needs_input_grad[:2]],
            )
        ctx.save_for_backward(grad_a, grad_b)
        return loss

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("relation_kl can be differentiated once: its gradient has none")
        grads = [None if saved is None else saved * grad for saved in ctx.saved_tensors]
        return *grads, None, None, None, None, None, None


def _loss_and_gradients(student, teacher, heads, real, tau, dtype, needs):
    batch, length, width = student[0].shape
    scale = (width // heads) ** -0.5 / tau
    teacher_scale = (teacher[0].shape[-1] // heads) ** -0.5 / tau
    a, b = (_rows(x, heads, real, dtype) for x in student)
    ta, tb = (_rows(x, heads, real, dtype) for x in teacher)
    a *= scale
    ta *= teacher_scale
    weights, bias = _weights_and_bias(batch, length, heads, real, tau, a)

    loss = a.new_zeros(())
    grad_a = torch.empty_like(a) if needs[0] else None
    grad_b = torch.empty_like(b) if needs[1] else None
    step = max(1, _CHUNK // max(1, length * length))
    for start in range(0, batch * heads, step):
        rows = slice(start, start + step)
        teacher_log = (ta[rows] @ tb[rows].mT + bias[rows]).log_softmax(-1)
        student_log = (a[rows] @ b[rows].mT + bias[rows]).log_softmax(-1)
        p = teacher_log.exp()
        w = weights[rows].unsqueeze(-1)
        loss += (w * p * (teacher_log - student_log)).sum()
        if any(needs):
            g = student_log.exp_().sub_(p).mul_(w)
            if needs[0]:
                torch.bmm(g, b[rows], out=grad_a[rows])
            if needs[1]:
                torch.bmm(g.mT, a[rows], out=grad_b[rows])
    if needs[0]:
        grad_a *= scale  # a was scaled beforehand, so grad_b has its factor already
    grads = [
        None if grad is None else _unrows(grad, batch, heads).to(x.dtype)
        for grad, x in zip((grad_a, grad_b), student, strict=True)
    ]
    return loss, *grads


def _rows(x, heads, real, dtype):
    """[batch, length, width] -> fresh [batch * heads, length, d] of `dtype`, padding zeroed."""
    if real is not None:
        x = torch.where(real.unsqueeze(-1), x, 0)  # a product would keep NaN and infinity
    rows = split_relation_heads(x, heads).flatten(0, 1)
    return rows.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _unrows(rows, batch, heads):
    return rows.unflatten(0, (batch, heads)).transpose(1, 2).flatten(2)


def _weights_and_bias(batch, length, heads, real, tau, like):
    """Each query's weight [batch * heads, length]; what masks keys, [batch * heads, 1, length].

    The bias is finite: a row without any key has then a finite softmax, and weight 0.
    """
    if real is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=like.device)
    tokens = real.sum(-1, keepdim=True).clamp(min=1)
    weights = torch.where(real, tau * tau / (heads * batch * tokens.to(like.dtype)), 0)
    bias = torch.zeros_like(weights).masked_fill_(~real, torch.finfo(like.dtype).min / 4)
    weights, bias = (x.repeat_interleave(heads, 0) for x in (weights, bias))
    return weights, bias.unsqueeze(1)


def _check(student_a, student_b, teacher_a, teacher_b, heads, mask, temperature):
    named = {
        "student_a": student_a,
        "student_b": student_b,
        "teacher_a": teacher_a,
        "teacher_b": teacher_b,
    }
    for name, x in named.items():
        if x.dim() != 3 or not x.is_floating_point():
            raise UserError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)}: "
                "relations need floating point [batch, length, width]"
            )
        if x.shape[:2] != student_a.shape[:2]:
            raise UserError(
                f"{name} has shape {tuple(x.shape)} beside student_a's {tuple(student_a.shape)}: "
                "batch and length must agree"
            )
    for model, a, b in (("student", student_a, student_b), ("teacher", teacher_a, teacher_b)):
        if a.shape != b.shape:
            raise UserError(
                f"{model}_a is {a.shape[-1]} wide and {model}_b {b.shape[-1]}: "
                "a relation needs equal widths"
            )
    if teacher_a.requires_grad or teacher_b.requires_grad:
        raise UserError(
            "the teacher requires a gradient: run it under torch.inference_mode() or detach it"
        )
    widths = {student_a.shape[-1], teacher_a.shape[-1]}
    if heads < 1 or any(width % heads for width in widths):
        raise _heads_error(heads, widths)
    if mask is not None:
        if mask.shape != student_a.shape[:2]:
            raise UserError(
                f"attention_mask has shape {tuple(mask.shape)}: "
                f"expected [batch, length] = {list(student_a.shape[:2])}"
            )
        if mask.is_floating_point() or mask.is_complex():
            raise UserError(
                f"attention_mask is {mask.dtype}: expected bool or integers, 1 at real tokens "
                "(not a mask that is added to scores)"
            )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UserError(f"temperature {temperature} is not a positive number")


def _heads_error(heads, widths):
    common = math.gcd(*widths)
    fitting = [n for n in range(1, common + 1) if common % n == 0]
    return UserError(
        f"{heads} relation heads do not divide the width{'s' if len(widths) > 1 else ''} "
        f"{' and '.join(map(str, sorted(widths)))}: choose one of {fitting}"
    )
