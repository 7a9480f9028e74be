"""What a student is trained towards: a weighted sum of losses against a teacher's cached outputs.

    hidden      [batch, length, width] of the embeddings and of each mapped layer
    relations   softmax(x x^T) of the last layer's queries, keys and values (MiniLMv2, 2012.15828)
    vector      1 - cosine of the two sentence vectors

Every term is free of units, so that weights near 1 make sense for any teacher: `hidden` is the
squared error divided by the variance of that teacher layer over the batch, the share of variance
that the student does not explain, and layers with large activations weigh no more than others.
Its value is the mean over the mapped layers.

Why no loss on the similarities within a batch, which is what retention measures: the KL divergence
between the two models' softmax over a batch's other sentences was tried. all-MiniLM-L6-v2 to three
layers, 400 steps of 64 sentences, temperature 0.1: rank correlation 0.849 with it and 0.867
without, same nearest neighbour 0.628 and 0.653. It drowns what the hidden states teach.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastffn.distill.capture import capture
from fastffn.distill.teacher import sentence_vectors
from fastffn.errors import UserError
from fastffn.functional import attention_relations, hidden_mse, vector_cosine

RELATED = ("q", "k", "v")
PARTS = ("hidden", "relations", "vector")


@dataclass(frozen=True)
class Objective:
    """Weights of the losses and what is compared with what.

    Attributes:
        layer_map: pairs (student hidden state, teacher hidden state); 0 is the embeddings' output,
            k that of layer k counted from 1.
        hidden, relations, vector: weights; what weighs 0 is not computed.
        relation_heads: relation heads, a divisor of both widths.
        pooling: how sentence vectors are made, "mean" or "cls".

    Raises:
        UserError: a negative weight, none above 0, or hidden states without a layer map.
    """

    layer_map: tuple[tuple[int, int], ...]
    hidden: float = 1.0
    relations: float = 1.0
    vector: float = 1.0
    relation_heads: int = 12
    pooling: str = "mean"

    def __post_init__(self):
        weights = {name: getattr(self, name) for name in PARTS}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise UserError(f"the weights of the losses {weights} must not be negative nor all 0")
        if self.hidden and not self.layer_map:
            raise UserError("hidden states need a layer map: which student layer follows which")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the teacher outputs that a `TeacherCache` batch must hold."""
        hidden = {f"hidden_{layer}": None for _, layer in self.layer_map if self.hidden}
        related = RELATED if self.relations else ()
        vector = ("vector",) if self.vector else ()
        return (*hidden, *related, *vector)

    def losses(self, student: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Runs the student on a batch: {"total": weighted sum, and each part unweighted}.

        Args:
            student: an encoder that returns hidden states; of the teacher's width.
            batch: as `TeacherCache.batch` gives it, with at least `outputs`.

        Returns:
            Scalars that carry gradients to the student's parameters.

        Raises:
            UserError: widths or relation heads that do not fit.
        """
        mask = batch["attention_mask"]
        with capture(student, -1, RELATED if self.relations else ()) as states:
            outputs = student(
                input_ids=batch["input_ids"],
                attention_mask=mask,
                output_hidden_states=bool(self.hidden),
            )
        parts: dict[str, Tensor] = {}
        if self.hidden:
            parts["hidden"] = self._hidden(outputs.hidden_states, batch, mask)
        if self.relations:
            teacher = {name: batch[f"teacher_{name}"] for name in RELATED}
            parts["relations"] = attention_relations(
                states, teacher, num_heads=self.relation_heads, attention_mask=mask
            )
        if self.vector:
            ours = sentence_vectors(outputs.last_hidden_state, mask, self.pooling)
            parts["vector"] = vector_cosine(ours, batch["teacher_vector"])
        total = sum(getattr(self, name) * value for name, value in parts.items())
        return {"total": total, **parts}

    def _hidden(self, ours: Sequence[Tensor], batch: dict[str, Tensor], mask: Tensor) -> Tensor:
        terms = []
        for here, there in self.layer_map:
            theirs = batch[f"teacher_hidden_{there}"]
            terms.append(hidden_mse(ours[here], theirs, mask) / _variance(theirs, mask))
        return torch.stack(terms).mean()


def _variance(teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean over the width of the variance over a batch's tokens: what a constant would miss."""
    tokens = teacher[mask.bool()]
    return (tokens - tokens.mean(0)).square().mean().clamp(min=1e-6)
