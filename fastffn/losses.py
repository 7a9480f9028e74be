"""Distillation objectives over padded batches, each a scalar mean over what is real.

`attention_relations` compares token-to-token maps (MiniLMv2), `hidden_mse` hidden states,
`vector_cosine` sentence vectors. A mask is [batch, length], bool or integer, non-zero at real
tokens. What padding holds, NaN included, changes neither losses nor gradients. No gradient reaches
a teacher, and one that asks for it is refused: it would train towards the student.

Half precision is summed in float32, float64 stays.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastffn.errors import UserError
from fastffn.ops.relation import relation_kl, relation_loss, split_relation_heads

__all__ = [
    "attention_relations",
    "hidden_mse",
    "relation_kl",
    "relation_loss",
    "split_relation_heads",
    "vector_cosine",
]


def attention_relations(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    relations: Sequence[str] = ("qq", "kk", "vv"),
    weights: Sequence[float] | None = None,
    num_heads: int = 48,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`relation_loss` between tensors that carry names, such as `fastffn.capture` gives.

    Args:
        student, teacher: "q", "k", "v" -> [batch, length, width].
        relations: two letters each; ("qq", "kk", "vv") is MiniLMv2's, ("qk", "vv") MiniLM's.

    Raises:
        UserError: a relation of something that was not given, or as `relation_kl`.
    """
    for relation in relations:
        if len(relation) != 2 or not set(relation) <= set(student) & set(teacher):
            raise UserError(
                f"relation {relation!r} is unknown: use two letters of "
                f"{sorted(set(student) & set(teacher))}"
            )
    pairs = [(student[a], student[b], teacher[a], teacher[b]) for a, b in relations]
    return relation_loss(pairs, weights, num_heads, attention_mask, temperature)


def hidden_mse(student: Tensor, teacher: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of hidden states over all real tokens and the width.

    A long sentence weighs more than a short one: each token counts the same.

    Args:
        student: [batch, length, width], already projected to the teacher's width.
        teacher: the same shape.

    Raises:
        UserError: unequal shapes, a mask that does not fit, or a teacher that requires a gradient.
    """
    student, teacher = _matched(student, teacher)
    if attention_mask is None:
        return ((student - teacher) ** 2).mean()
    if attention_mask.shape != student.shape[:-1] or attention_mask.is_floating_point():
        raise UserError(
            f"attention_mask is {attention_mask.dtype} of shape {tuple(attention_mask.shape)}: "
            f"expected bool or integers of shape {list(student.shape[:-1])}"
        )
    real = (attention_mask != 0).unsqueeze(-1)
    difference = torch.where(real, student, 0) - torch.where(real, teacher, 0)
    return (difference**2).sum() / (real.sum() * student.shape[-1]).clamp(min=1)


def vector_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine similarity between sentence vectors, [batch, width] each.

    Raises:
        UserError: unequal shapes, or a teacher that requires a gradient.
    """
    return (1 - torch.cosine_similarity(*_matched(student, teacher), dim=-1)).mean()


def _matched(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise UserError(
            f"the student's {list(student.shape)} and the teacher's {list(teacher.shape)} differ "
            "in shape: project the student to the teacher's width"
        )
    if teacher.requires_grad:
        raise UserError(
            "the teacher requires a gradient: run it under torch.inference_mode() or detach it"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.to(dtype)
