"""How much of a teacher's sense of similarity a student retains, on sentences that neither saw.

Labels are not needed: the teacher's sentence vectors are the truth. Three questions are asked:

    spearman  do cosine similarities of random sentence pairs come in the same order?
    top1      does a sentence have the same nearest neighbour?
    top10     which part of its ten nearest neighbours is the same?

Why rank correlation: ranking is what sentence vectors are used for, and a student may compress the
scale of similarities without harm. Why also neighbours: most random pairs are unrelated, and only
retrieval looks at the close ones.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastffn.errors import UserError

_ROWS = 1024  # sentences compared with all others at a time


def retention(
    teacher_vectors: Tensor, student_vectors: Tensor, pairs: int = 20_000, seed: int = 0
) -> dict[str, float]:
    """Compares two models' vectors of the same sentences.

    Args:
        teacher_vectors: [sentences, width], of any length each.
        student_vectors: [sentences, another width].
        pairs: random pairs for the correlation, the same ones for the same seed; all pairs where
            there are no more.

    Returns:
        "spearman" in [-1, 1] (0 for a student whose vectors are all alike, which orders nothing),
        "top1" and "top10" in [0, 1]. With ten sentences or fewer, "top10" compares all that
        there are.

    Raises:
        UserError: unequal numbers of sentences, fewer than three, or vectors that are not finite.
    """
    count = len(teacher_vectors)
    if len(student_vectors) != count:
        raise UserError(
            f"{count} teacher vectors and {len(student_vectors)} student vectors: "
            "give both for the same sentences"
        )
    if count < 3:
        raise UserError(f"retention needs at least three sentences, not {count}")
    for name, vectors in (("teacher", teacher_vectors), ("student", student_vectors)):
        if not vectors.isfinite().all():
            raise UserError(f"the {name}'s sentence vectors are not finite: its weights are broken")
    teacher, student = (
        normalize(vectors.detach().float(), dim=-1)
        for vectors in (teacher_vectors, student_vectors)
    )
    return {"spearman": _spearman(teacher, student, pairs, seed), **_neighbours(teacher, student)}


def _spearman(teacher: Tensor, student: Tensor, pairs: int, seed: int) -> float:
    from scipy.stats import rankdata

    count = len(teacher)
    if count * (count - 1) // 2 <= pairs:
        first, second = torch.triu_indices(count, count, offset=1)
    else:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(count, (pairs,), generator=generator)
        other = torch.randint(count - 1, (pairs,), generator=generator)
        second = other + (other >= first)  # any sentence but the first
    ranks = [
        rankdata((vectors[first] * vectors[second]).sum(-1).cpu()) for vectors in (teacher, student)
    ]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _neighbours(teacher: Tensor, student: Tensor) -> dict[str, float]:
    count = len(teacher)
    nearest = min(10, count - 1)
    top1 = shared = 0
    for start in range(0, count, _ROWS):
        rows = torch.arange(start, min(start + _ROWS, count))
        ours, theirs = (_nearest(vectors, rows, nearest) for vectors in (student, teacher))
        top1 += (ours[:, 0] == theirs[:, 0]).sum().item()
        shared += (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).sum().item()
    return {"top1": top1 / count, "top10": shared / (count * nearest)}


def _nearest(vectors: Tensor, rows: Tensor, number: int) -> Tensor:
    similarity = vectors[rows] @ vectors.mT
    similarity[torch.arange(len(rows)), rows] = -torch.inf  # not itself
    return similarity.topk(number).indices
