"""Losses that recipes name: their formulas, and pieces of a batch that add up to the whole."""

import pytest
import torch
import torch.nn.functional as F

from fastffn.distill.capture import Scores
from fastffn.distill.reading import read
from fastffn.distill.stage_module import sizes
from fastffn.distill.terms import IGNORED, TERMS, Sizes, counts
from fastffn.errors import UserError

TEACHER, STUDENT = Sizes(4, 24, 4, None), Sizes(2, 12, 4, None)
LENGTHS = (7, 3, 1, 5)
RELATIONS = {"relations": ("qk", "vv"), "relation_heads": 4, "teacher_layer": -1}


def batch_of(lengths=LENGTHS, **labels):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"attention_mask": mask.long(), **labels}


def states_of(sizes: Sizes, seed: int):
    """What could be read of a model, all of it."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = len(LENGTHS), max(LENGTHS)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states: dict[str, object] = {"embeddings": tensor(batch, length, sizes.width)}
    for layer in range(sizes.layers):
        for name in ("q", "k", "v", "hidden"):
            states[f"{name}.{layer}"] = tensor(batch, length, sizes.width)
        q, k = states[f"q.{layer}"], states[f"k.{layer}"]
        states[f"scores.{layer}"] = Scores(q, k, sizes.heads)
    states["logits"] = tensor(batch, 3)
    return states


def piece(states: dict, rows: slice, length: int) -> dict:
    """Some rows of a batch, padded to their own longest."""

    def cut(x):
        return x[rows] if x.dim() == 2 else x[rows, :length]

    return {
        name: Scores(cut(x.q), cut(x.k), x.num_heads) if isinstance(x, Scores) else cut(x)
        for name, x in states.items()
    }


EVERY = {
    "relations": ("relations", RELATIONS),
    "relations-reverse": ("relations", {**RELATIONS, "divergence": "reverse_kl"}),
    "scores": ("scores", {}),
    "hidden": ("hidden", {"embeddings": True}),
    "hidden-shared": ("hidden", {"projection": "shared"}),
    "soft_labels": ("soft_labels", {"temperature": 2.0}),
    "hard_labels": ("hard_labels", {}),
}


@pytest.mark.parametrize("name", EVERY)
def test_pieces_in_proportion_to_what_they_count_are_the_whole(name):
    kind, options = EVERY[name]
    torch.manual_seed(0)
    term = TERMS[kind](**options).build(STUDENT, TEACHER).double()
    ours, theirs = states_of(STUDENT, 1), states_of(TEACHER, 2)
    labels = torch.tensor([2, 0, 1, 1])
    batch = batch_of(labels=labels)
    whole = term(ours, theirs, batch)
    total = counts(batch)[term.counted]
    summed = 0.0
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        part = batch_of(LENGTHS[rows], labels=labels[rows])
        length = part["attention_mask"].shape[1]
        value = term(piece(ours, rows, length), piece(theirs, rows, length), part)
        summed = summed + value * counts(part)[term.counted] / total
    torch.testing.assert_close(summed, whole, rtol=1e-6, atol=1e-9)


def test_padding_counts_as_equal_where_it_is_asked_to():
    """EfficientBERT's mean over all of a padded batch."""
    term = TERMS["scores"](masked="zero").build(STUDENT, TEACHER)
    ours, theirs = states_of(STUDENT, 1), states_of(TEACHER, 2)
    batch = batch_of()
    real = batch["attention_mask"].bool()
    both = real[:, None, :, None] & real[:, None, None, :]

    def scores(states, layer):
        q, k, heads = states[f"scores.{layer}"]
        q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~both, 0)

    expected = sum(F.mse_loss(scores(ours, a), scores(theirs, b)) for a, b in ((0, 1), (1, 3)))
    torch.testing.assert_close(term(ours, theirs, batch), expected)
    assert term.counted == "squares"
    assert counts(batch)["squares"] == len(LENGTHS) * max(LENGTHS) ** 2


def test_relations_are_means_over_heads_tokens_and_examples():
    term = TERMS["relations"](**RELATIONS).build(STUDENT, TEACHER)
    ours, theirs = states_of(STUDENT, 1), states_of(TEACHER, 2)
    expected = 0.0
    for first, second in (("q", "k"), ("v", "v")):
        for row, length in enumerate(LENGTHS):
            log = []
            for states, last in ((theirs, 3), (ours, 1)):
                a, b = (states[f"{n}.{last}"][row, :length] for n in (first, second))
                a, b = (x.unflatten(-1, (4, -1)).transpose(0, 1) for x in (a, b))
                log.append((a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5).log_softmax(-1))
            divergence = (log[0].exp() * (log[0] - log[1])).sum(-1).mean()
            expected = expected + divergence / len(LENGTHS)
    torch.testing.assert_close(term(ours, theirs, batch_of()), expected)


def test_hidden_states_are_projected_by_one_map_or_by_one_each():
    each = TERMS["hidden"](embeddings=True).build(STUDENT, TEACHER)
    shared = TERMS["hidden"](embeddings=True, projection="shared").build(STUDENT, TEACHER)
    assert len(each.losses) == 3 and len(shared.losses) == 1
    assert each.teacher_reads == ("embeddings", "hidden.1", "hidden.3")
    none = TERMS["hidden"]().build(TEACHER, TEACHER)
    assert not list(none.parameters())
    ours, theirs, batch = states_of(STUDENT, 1), states_of(TEACHER, 2), batch_of()
    real = batch["attention_mask"].bool()
    weight, bias = shared.double().losses[0].projection.parameters()
    expected = sum(
        F.mse_loss(F.linear(ours[a][real], weight, bias), theirs[b][real])
        for a, b in zip(shared.student_reads, shared.teacher_reads, strict=True)
    )
    torch.testing.assert_close(shared(ours, theirs, batch), expected)


def test_labels_of_each_kind_of_task():
    hard = TERMS["hard_labels"]().build(STUDENT, None)
    soft = TERMS["soft_labels"](temperature=1.0).build(STUDENT, TEACHER)
    logits, theirs = torch.randn(4, 3), torch.randn(4, 3)
    labels = torch.tensor([2, 0, 1, 1])
    found = hard({"logits": logits}, {}, batch_of(labels=labels))
    torch.testing.assert_close(found, F.cross_entropy(logits, labels))
    found = soft({"logits": logits}, {"logits": theirs}, batch_of(labels=labels))
    torch.testing.assert_close(found, F.cross_entropy(logits, theirs.softmax(-1)))

    score, taught, gold = torch.randn(4, 1), torch.randn(4, 1), torch.rand(4)
    batch = batch_of(labels=gold)
    torch.testing.assert_close(hard({"logits": score}, {}, batch), F.mse_loss(score[:, 0], gold))
    found = soft({"logits": score}, {"logits": taught}, batch)
    torch.testing.assert_close(found, F.mse_loss(score, taught))

    tokens = torch.full((4, 7), IGNORED)
    tokens[0, 2], tokens[3, 1] = 1, 2
    by_token = torch.randn(4, 7, 3)
    found = hard({"logits": by_token}, {}, batch_of(labels=tokens))
    expected = F.cross_entropy(by_token[[0, 3], [2, 1]], torch.tensor([1, 2]))
    torch.testing.assert_close(found, expected)
    assert counts(batch_of(labels=tokens))["labels"] == 2


def test_answers_never_lie_in_padding():
    """A question's loss is finite and the same whatever logits padding has."""
    spans = {"start_positions": torch.tensor([3, 1, 0, 4])}
    spans["end_positions"] = torch.tensor([5, 2, 0, 4])
    batch = batch_of(**spans)
    padding = batch["attention_mask"] == 0
    logits, theirs = torch.randn(4, 7, 2), torch.randn(4, 7, 2)
    hard = TERMS["hard_labels"]().build(STUDENT, None)
    soft = TERMS["soft_labels"]().build(STUDENT, TEACHER)
    expected = []
    for row, length in enumerate(LENGTHS):
        pairs = ((0, "start_positions"), (1, "end_positions"))
        for side, name in pairs:
            cut = logits[row, :length, side]
            taught = theirs[row, :length, side].softmax(-1)
            expected.append((F.cross_entropy(cut, spans[name][row]), F.cross_entropy(cut, taught)))
    hard_expected, soft_expected = (sum(x) / len(x) for x in zip(*expected, strict=True))
    for value in (0.0, 50.0):
        logits[padding], theirs[padding] = value, -value
        found = hard({"logits": logits}, {}, batch)
        torch.testing.assert_close(found, hard_expected)
        found = soft({"logits": logits}, {"logits": theirs}, batch)
        torch.testing.assert_close(found, soft_expected)


def test_sentence_vectors():
    term = TERMS["vector"](pooling="cls").build(TEACHER, TEACHER)
    ours, theirs = states_of(TEACHER, 1), states_of(TEACHER, 2)
    expected = 1 - F.cosine_similarity(ours["hidden.3"][:, 0], theirs["hidden.3"][:, 0]).mean()
    torch.testing.assert_close(term(ours, theirs, batch_of()), expected)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("relations", {"relation_heads": 5}, "relation_heads 5 does not divide"),
        ("relations", {"relations": ("qx",)}, "qx"),
        ("relations", {"teacher_layer": 4, "relation_heads": 4}, "teacher_layer 4 does not exist"),
        ("relations", {"student_layer": 2, **RELATIONS}, "student_layer 2 does not exist"),
        ("relations", {"teacher_layer": "first"}, "teacher_layer 'first'"),
        ("scores", {"layer_map": "middle"}, "middle"),
        ("scores", {"layer_map": ((0, 9),)}, "teacher_layer 9"),
        ("scores", {"masked": "some"}, "some"),
        ("hidden", {"projection": "none"}, "projection"),
        ("hidden", {"projection": "both"}, "'both' is unknown"),
        ("vector", {}, "cannot be compared"),
        ("soft_labels", {"temperature": 0.0}, "temperature"),
    ],
)
def test_what_does_not_fit_is_one_line(kind, options, message):
    with pytest.raises(UserError, match=message) as caught:
        TERMS[kind](**options).build(STUDENT, TEACHER)
    assert "\n" not in str(caught.value)


def test_scores_need_as_many_heads():
    with pytest.raises(UserError, match="4 attention heads and the teacher 6"):
        TERMS["scores"]().build(STUDENT, Sizes(4, 24, 6, None))


def test_a_model_gives_what_is_asked_and_runs_no_further():
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = BertForSequenceClassification(config).eval()
    ran = []
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    batch = {"input_ids": torch.randint(30, (2, 5)), **batch_of((5, 3))}
    wanted = ["hidden.0", "q.2", "scores.1", "embeddings"]
    found = read(model, batch, wanted, stop=True)
    assert set(found) == set(wanted) and ran == [0, 1, 2]
    whole = model.bert(**batch, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found["embeddings"], whole[0])
    torch.testing.assert_close(found["hidden.0"], whole[1])
    ran.clear()
    found = read(model, batch, ["logits", "hidden.0"], stop=True)
    assert ran == [0, 1, 2, 3]
    torch.testing.assert_close(found["logits"], model(**batch).logits)
    assert sizes(model)[:3] == (4, 24, 4)
    with pytest.raises(UserError, match="has no head"):
        read(BertModel(config), batch, ["logits"])
