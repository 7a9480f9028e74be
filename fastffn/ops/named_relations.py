"""`attention_relations`: relations of tensors that carry names, as `fastffn.capture` gives them."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import UserError
from .relation_losses import relation_loss


def attention_relations(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    relations: Sequence[str] = ("qq", "kk", "vv"),
    weights: Sequence[float] | None = None,
    num_heads: int = 48,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    **settings,
) -> Tensor:
    """`relation_loss` between named tensors.

    Args:
        student, teacher: "q", "k", "v" -> [batch, length, width].
        relations: two letters each; ("qq", "kk", "vv") is MiniLMv2's (arXiv 2012.15828), ("qk",
            "vv") with the attention heads MiniLM's (arXiv 2002.10957).
        weights: one for each relation; None: 1 each.
        num_heads, attention_mask, temperature, **settings: as `relation_loss`.

    Raises:
        UserError: a relation of something that was not given, or as `relation_loss`.
    """
    check_relations(relations, set(student) & set(teacher))
    pairs = [(student[a], student[b], teacher[a], teacher[b]) for a, b in relations]
    return relation_loss(pairs, weights, num_heads, attention_mask, temperature, **settings)


def check_relations(relations: Sequence[str], names: set[str]) -> None:
    """
    Raises:
        UserError: a relation is not two of `names`, each a letter.
    """
    for relation in relations:
        if len(relation) != 2 or not set(relation) <= names:
            raise UserError(f"relation {relation!r} is unknown: use two letters of {sorted(names)}")
