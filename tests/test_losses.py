"""The loss modules: what each computes, what it holds, and which mistakes it names."""

import pytest
import torch

from fastffn import UserError, functional, losses
from fastffn.distill.capture import Scores

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


def test_relation_loss_is_the_sum_of_its_relations():
    pairs = {a + b: (STUDENT[a], STUDENT[b], TEACHER[a], TEACHER[b]) for a in "qkv" for b in "qkv"}
    kl = lambda names, **kw: sum(  # noqa: E731
        functional.relation_kl(*pairs[name], 3, MASK, **kw) for name in names
    )
    loss = losses.RelationLoss(num_heads=3)
    torch.testing.assert_close(loss(STUDENT, TEACHER, MASK), kl(("qq", "kk", "vv")))
    assert loss(STUDENT, TEACHER, lengths=MASK.sum(-1)) == loss(STUDENT, TEACHER, MASK)
    minilm = losses.RelationLoss(("qk", "vv"), num_heads=3, temperature=2.0)
    torch.testing.assert_close(minilm(STUDENT, TEACHER, MASK), kl(("qk", "vv"), temperature=2.0))
    weighed = losses.RelationLoss(("qq", "vk"), [1.0, 0.5], 3, divergence="reverse_kl")
    want = kl(["qq"], divergence="reverse_kl") + 0.5 * kl(["vk"], divergence="reverse_kl")
    torch.testing.assert_close(weighed(STUDENT, TEACHER, MASK), want)
    assert "'reverse_kl'" in repr(weighed) and not list(loss.parameters())


@pytest.mark.parametrize("masked", ["zero", "exclude"])
def test_score_mse(masked):
    q, k = (x.clone().requires_grad_() for x in (STUDENT["q"], STUDENT["k"]))
    loss = losses.ScoreMSE(3, masked)
    got = loss({"q": q, "k": k}, TEACHER, MASK)
    real = (MASK[:, None, :, None] * MASK[:, None, None, :]).bool().expand(2, 3, 4, 4)

    def scores(q, k):
        q, k = functional.split_relation_heads(q, 3), functional.split_relation_heads(k, 3)
        return q @ k.mT / q.shape[-1] ** 0.5

    ours, theirs = scores(q, k), scores(TEACHER["q"], TEACHER["k"])
    square = (ours - theirs).square() * real
    want = square.mean() if masked == "zero" else square.sum() / real.sum()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (q, k)), torch.autograd.grad(want, (q, k)), atol=1e-6, rtol=1e-5
    )
    assert loss({"q": q, "k": k}, TEACHER, lengths=MASK.sum(-1)) == got
    captured = [{"scores": Scores(x["q"], x["k"], 3)} for x in ({"q": q, "k": k}, TEACHER)]
    assert losses.ScoreMSE(masked=masked)(*captured, MASK) == got


def test_mistakes_are_named():
    with pytest.raises(UserError, match="1 weights for 2 relations"):
        losses.RelationLoss(("qq", "kk"), [1.0])
    with pytest.raises(UserError, match="'qh' is unknown"):
        losses.RelationLoss(("qh",))
    with pytest.raises(UserError, match="masked 'mask' is unknown: choose one of zero, exclude"):
        losses.ScoreMSE(3, "mask")
    with pytest.raises(UserError, match="student's states have no scores: capture what"):
        losses.ScoreMSE(3)({"q": STUDENT["q"]}, TEACHER)
    with pytest.raises(UserError, match="teacher's states have no scores"):
        losses.ScoreMSE(3)(STUDENT, {})
    scores = Scores(STUDENT["q"], STUDENT["k"], 3), Scores(TEACHER["q"], TEACHER["k"], 6)
    with pytest.raises(UserError, match="student has 3 attention heads and the teacher 6"):
        losses.ScoreMSE()(*({"scores": x} for x in scores))
    with pytest.raises(UserError, match="temperature -1 is not"):
        losses.RelationLoss(temperature=-1)
    with pytest.raises(UserError, match="divergence 'js' is unknown"):
        losses.RelationLoss(divergence="js")
    with pytest.raises(UserError, match="at least one relation"):
        losses.RelationLoss(())
