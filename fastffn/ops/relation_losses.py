"""Distillation of relations between tokens: what users call, over the op `relation`.

A relation of a and b, both [batch, length, width], is what attention computes, head by head:

    softmax(a_h b_h^T / (sqrt(d) temperature))         d = width / num_heads, h = 1 .. num_heads

MiniLMv2 (arXiv 2012.15828) splits queries, keys or values of one layer into *relation heads*
(usually 48), whatever the number of attention heads, and pulls the student's relations towards the
teacher's. Only length x length maps are compared, so the two widths may differ. MiniLM (arXiv
2002.10957) relates queries to keys, and values to themselves, with the attention heads.

In all functions:

- A head is a slice of the last dimension; tensors are taken as they lie, by their strides.
- Masked keys take no part, masked queries weigh nothing: what padding holds, NaN and infinity
  included, changes nothing and gets no gradient. An example without tokens adds 0.
- No gradient flows into a teacher, and one that asks for it is refused.
- Memory is linear in the length where csrc or Triton serves (`fastffn doctor`), and equal inputs
  give equal bits on any number of threads.
- Sums are made in float32, of float64 in float64, whatever autocast says. Differentiable once.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .execute import DTYPES, compute_dtype
from .loss_inputs import check_teacher, real_tokens
from .relation import relation

REDUCTIONS = ("mean", "sum", "none")
RELATION_DIVERGENCES = ("kl", "reverse_kl", "probability_mse")
MASKED = ("zero", "exclude")


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
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reduction: str = "mean",
    divergence: str = "kl",
) -> Tensor:
    """Divergence between the student's relation of (a, b) and the teacher's.

    A relation of a tensor with itself is symmetric and costs half. It is known by identity, so give
    the same object twice: `student_a is student_b` and `teacher_a is teacher_b`.

    Args:
        student_a, student_b: [batch, length, student width], float32, float64, bfloat16 or float16.
        teacher_a, teacher_b: [batch, length, teacher width], of the student's or another type.
        num_heads: relation heads; must divide both widths.
        attention_mask: [batch, length], bool or integers, non-zero at real tokens; None: all real.
            Padding may be left, right or anywhere.
        temperature: divides the scores; the result is multiplied by its square, which keeps the
            gradient's size.
        lengths: instead of a mask, [batch] integers: the first so many tokens are real.
        reduction: "mean" over relation heads, the real tokens of an example, then examples, as in
            the papers; "sum"; or "none".
        divergence: of the teacher's row P and the student's R, "kl", KL(P || R); "reverse_kl",
            KL(R || P); or "probability_mse", sum (R - P)^2 (AutoDistil, arXiv 2201.12507).

    Returns:
        A scalar, or with reduction "none" [batch, heads, length] with 0 at padding. In nats (but
        for "probability_mse"); float64 if an operand is, else float32.

    Raises:
        UserError: shapes, types, devices or heads that do not fit, a mask of another shape or type,
            a teacher that requires a gradient, a temperature that is not positive, an unknown
            reduction or divergence.
    """
    one_of("divergence", divergence, RELATION_DIVERGENCES)
    check_temperature(temperature)
    tensors = (student_a, student_b, teacher_a, teacher_b)
    real = _checked(tensors, num_heads, attention_mask, lengths, reduction)
    size = num_heads, temperature, divergence
    if reduction == "none":
        return _relation(tensors, real, None, *size) * temperature**2
    weights = _weights(student_a, compute_dtype(*tensors), real, reduction == "mean", num_heads)
    return _relation(tensors, real, weights * temperature**2, *size)


def relation_loss(
    pairs: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    weights: Sequence[float] | None = None,
    num_heads: int = 48,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reduction: str = "mean",
    divergence: str = "kl",
) -> Tensor:
    """Weighted sum of several relations' `relation_kl`.

    MiniLMv2's loss is `pairs = [(q_s, q_s, q_t, q_t), (k_s, ...), (v_s, ...)]`, weights 1;
    MiniLM's is (q_s, k_s, q_t, k_t) and (v_s, v_s, v_t, v_t) with the attention heads.

    Args:
        pairs: (student_a, student_b, teacher_a, teacher_b) of each relation.
        weights: one number for each pair; None: 1 each.
        num_heads, attention_mask, temperature, lengths, reduction, divergence: as `relation_kl`.

    Raises:
        UserError: no pairs, or not four tensors in one; another number of weights than of pairs; or
            as `relation_kl`.
    """
    if not pairs:
        raise UserError("relation_loss needs at least one pair of tensors to relate")
    weights = [1.0] * len(pairs) if weights is None else list(weights)
    if len(weights) != len(pairs):
        raise UserError(f"{len(weights)} weights for {len(pairs)} relations: give one for each")
    if any(len(pair) != 4 for pair in pairs):
        raise UserError(
            "relation_loss: a pair is (student_a, student_b, teacher_a, teacher_b), four tensors"
        )
    total = None
    for weight, pair in zip(weights, pairs, strict=True):
        term = relation_kl(
            *pair,
            num_heads,
            attention_mask,
            temperature,
            lengths=lengths,
            reduction=reduction,
            divergence=divergence,
        )
        term = term if weight == 1 else weight * term
        total = term if total is None else total + term
    return total


def score_mse(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    num_heads: int,
    attention_mask: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    masked: str = "zero",
    reduction: str = "mean",
) -> Tensor:
    """Mean squared difference of attention scores before the softmax, q k^T / sqrt(d).

    The loss on attention of TinyBERT (arXiv 1909.10351), EfficientBERT (arXiv 2109.07222) and
    ERNIE-Tiny. Their codes also compare the rows of padded queries; here these weigh nothing.

    Args:
        student_q, student_k: [batch, length, student width], float32, float64, bfloat16 or float16.
        teacher_q, teacher_k: [batch, length, teacher width].
        num_heads: heads of both models.
        attention_mask, lengths: as `relation_kl`.
        masked: what becomes of scores with padding in the mean. "zero": they count as equal, and
            the mean is over all batch * heads * length^2, as in the papers; "exclude": it is over
            the scores between real tokens.
        reduction: "mean"; "sum"; or "none".

    Returns:
        A scalar, or with reduction "none" the sum over keys of each query, [batch, heads, length]
        with 0 at padding. float64 if an operand is, else float32.

    Raises:
        UserError: as `relation_kl`.
    """
    one_of("masked", masked, MASKED)
    tensors = (student_q, student_k, teacher_q, teacher_k)
    real = _checked(tensors, num_heads, attention_mask, lengths, reduction)
    if reduction == "none":
        return _relation(tensors, real, None, num_heads, 1.0, "score_mse")
    dtype = compute_dtype(*tensors)
    weights = _weights(student_q, dtype, real, False, num_heads)
    if reduction == "mean":
        batch, length, _ = student_q.shape
        if masked == "zero" or real is None:
            weights = weights / max(1, batch * num_heads * length * length)
        else:
            weights = weights / (num_heads * real.sum(-1).to(dtype).square().sum()).clamp(min=1)
    return _relation(tensors, real, weights, num_heads, 1.0, "score_mse")


def _relation(tensors, real, weights, num_heads: int, temperature: float, divergence: str):
    a, b, teacher_a, teacher_b = tensors
    if b is a and teacher_b is teacher_a:
        b = teacher_b = None
    return relation(
        a, b, teacher_a, teacher_b, real, weights, num_heads, float(temperature), divergence
    )


def _weights(like: Tensor, dtype, real: Tensor | None, mean: bool, heads: int) -> Tensor:
    """Of each row, [batch, heads, length]: 1 / (heads tokens batch) for the mean, else 1."""
    batch, length, _ = like.shape
    if real is None:
        weight = 1 / max(1, heads * length * batch) if mean else 1.0
        return torch.full((), weight, dtype=dtype, device=like.device).expand(batch, heads, length)
    weights = real.to(dtype)
    if mean:
        weights = weights / (weights.sum(-1, keepdim=True).clamp(min=1) * (heads * batch))
    return weights.unsqueeze(1).expand(batch, heads, length)


def _checked(tensors, heads: int, attention_mask, lengths, reduction: str) -> Tensor | None:
    """Which tokens are real, once everything fits."""
    one_of("reduction", reduction, REDUCTIONS)
    student_a, student_b, teacher_a, teacher_b = tensors
    for name, x in zip(("student_a", "student_b", "teacher_a", "teacher_b"), tensors, strict=True):
        if x.dim() != 3 or x.dtype not in DTYPES:
            raise UserError(
                f"{name} is {x.dtype} of shape {list(x.shape)}: "
                "relations need floating point [batch, length, width]"
            )
        if x.shape[:2] != student_a.shape[:2]:
            raise UserError(
                f"{name} has shape {list(x.shape)} beside student_a's {list(student_a.shape)}: "
                "batch and length must agree"
            )
        if x.device != student_a.device:
            raise UserError(
                f"{name} is on {x.device} and student_a on {student_a.device}; move one"
            )
    for model, a, b in (("student", student_a, student_b), ("teacher", teacher_a, teacher_b)):
        if a.shape != b.shape:
            raise UserError(
                f"{model}_a is {a.shape[-1]} wide and {model}_b {b.shape[-1]}: "
                "a relation needs equal widths"
            )
    check_teacher(teacher_a, teacher_b)
    widths = {student_a.shape[-1], teacher_a.shape[-1]}
    if heads < 1 or 0 in widths or any(width % heads for width in widths):
        raise _heads_error(heads, widths)
    return real_tokens(student_a.shape[:2], student_a.device, attention_mask, lengths)


def check_temperature(temperature: float) -> None:
    """
    Raises:
        UserError: it is not a positive number.
    """
    if not isinstance(temperature, (int, float, torch.SymFloat, torch.SymInt)) or not (
        0 < temperature < math.inf
    ):
        raise UserError(f"temperature {temperature!r} is not a positive number")


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name} {value!r} is unknown: choose one of {', '.join(known)}")


def _heads_error(heads: int, widths: set[int]) -> UserError:
    common = math.gcd(*widths)
    fitting = [n for n in range(1, common + 1) if common % n == 0]
    return UserError(
        f"{heads} relation heads do not divide the width{'s' if len(widths) > 1 else ''} "
        f"{' and '.join(map(str, sorted(widths)))}: choose one of {fitting}"
    )
