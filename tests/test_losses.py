"""The loss modules: what each computes, what it holds, and which mistakes it names."""

import pytest
import torch

from fastffn import UserError, functional, losses

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def states(width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 4, width, generator=generator) for name in "qkv"}


STUDENT, TEACHER = states(12, 0), states(24, 1)


def test_hidden_mse_projects_exactly_if_the_widths_differ():
    loss = losses.HiddenMSE(12, 24)
    assert loss.projection.weight.shape == (24, 12)
    got = loss(STUDENT["q"], TEACHER["q"], MASK)
    want = functional.hidden_mse(loss.projection(STUDENT["q"]), TEACHER["q"], MASK)
    torch.testing.assert_close(got, want)
    got.backward()
    assert all(p.grad.ne(0).any() for p in loss.parameters())
    assert loss(STUDENT["q"], TEACHER["q"], lengths=MASK.sum(-1)) == got

    equal = losses.HiddenMSE(12)
    assert equal.projection is None and not list(equal.parameters())
    want = (STUDENT["q"] - STUDENT["k"])[MASK.bool()].square().mean()
    torch.testing.assert_close(equal(STUDENT["q"], STUDENT["k"], MASK), want)
    asked = losses.HiddenMSE(12, project=True, bias=False)
    assert asked.projection.weight.shape == (12, 12) and asked.projection.bias is None
    assert asked(STUDENT["q"], STUDENT["k"]) > 0
    with pytest.raises(UserError, match="12 and 24 wide"):
        losses.HiddenMSE(12, 24, project=False)


def test_soft_cross_entropy_has_a_temperature():
    logits = STUDENT["q"], STUDENT["k"]
    loss = losses.SoftCrossEntropy(2.0)
    assert loss(*logits, MASK) == functional.soft_cross_entropy(*logits, 2.0, MASK)
    assert loss(*logits, lengths=MASK.sum(-1)) == loss(*logits, MASK)
    assert "temperature=2.0" in repr(loss)
    with pytest.raises(UserError, match="temperature"):
        losses.SoftCrossEntropy(-1.0)


def test_vector_cosine():
    vectors = STUDENT["q"][:, 0], STUDENT["k"][:, 0]
    assert losses.VectorCosine()(*vectors) == functional.vector_cosine(*vectors)


def test_attention_relations_by_name():
    (q, k), (tq, tk) = ((x["q"], x["k"]) for x in (STUDENT, TEACHER))
    one = functional.relation_kl(q, q, tq, tq, 3, MASK)
    two = functional.relation_kl(q, k, tq, tk, 3, MASK)
    got = functional.attention_relations(STUDENT, TEACHER, ("qq", "qk"), [0.5, 2.0], 3, MASK)
    torch.testing.assert_close(got, 0.5 * one + 2 * two)
    for relation in ("qh", "q", "qqq"):
        with pytest.raises(UserError, match=f"'{relation}' is unknown"):
            functional.attention_relations(STUDENT, TEACHER, (relation,))
