"""Retention against hand-made cases and scipy, latency's shape and fairness, size by formula."""

import pytest
import torch
from torch import nn

from fastffn.errors import UserError
from fastffn.evaluate.latency import measure
from fastffn.evaluate.retention import retention
from fastffn.evaluate.size import count

transformers = pytest.importorskip("transformers")
stats = pytest.importorskip("scipy.stats")


def vectors(count=200, width=16, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_same_vectors_retain_everything_whatever_scale_and_rotation():
    x = vectors()
    rotation = torch.linalg.qr(vectors(16, 16, 1)).Q
    scaled = 3 * (x @ rotation) * torch.rand(200, 1).add(0.5)
    for y in (x, scaled, torch.cat([x, torch.zeros(200, 4)], 1), x.double()):
        result = retention(x, y)
        assert result["spearman"] > 0.99999
        assert result["top1"] == 1
        assert result["top10"] > 0.999


def test_unrelated_vectors_retain_nothing():
    result = retention(vectors(500), vectors(500, 12, seed=1))
    assert abs(result["spearman"]) < 0.05
    assert result["top1"] < 0.03
    assert result["top10"] < 0.05


def test_spearman_is_scipys_on_all_pairs():
    x, y = vectors(30), vectors(30) + vectors(30, seed=1)
    unit_x, unit_y = (v / v.norm(dim=-1, keepdim=True) for v in (x, y))
    first, second = torch.triu_indices(30, 30, 1)
    expected = stats.spearmanr(
        (unit_x[first] * unit_x[second]).sum(-1), (unit_y[first] * unit_y[second]).sum(-1)
    ).statistic
    assert retention(x, y)["spearman"] == pytest.approx(expected, abs=1e-4)


def test_pairs_are_random_but_the_same_for_a_seed():
    x, y = vectors(400), vectors(400) + vectors(400, seed=1)
    assert retention(x, y, pairs=5000) == retention(x, y, pairs=5000)
    sampled, other = (retention(x, y, pairs=5000, seed=s)["spearman"] for s in (0, 1))
    everything = retention(x, y, pairs=10**6)["spearman"]
    assert sampled != other
    assert sampled == pytest.approx(everything, abs=0.03)


def test_neighbours_by_hand():
    # On a circle: 0 and 1 are close, 2 and 3 are close; the student moves 3 next to 0.
    def circle(*degrees):
        angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
        return torch.stack([angles.cos(), angles.sin()], 1)

    teacher = circle(0, 10, 90, 102)
    student = circle(0, 10, 90, -8)
    result = retention(teacher, student)
    assert result["top1"] == 0.25  # of 1 alone: 0 -> 3, 2 -> 1, 3 -> 0 changed
    assert result["top10"] == 1  # all three others, on both sides


def test_chunks_do_not_matter(monkeypatch):
    x, y = vectors(), vectors() + vectors(seed=1)
    expected = retention(x, y)
    monkeypatch.setattr("fastffn.evaluate.retention._ROWS", 7)
    assert retention(x, y) == expected


def test_collapsed_student_scores_zero():
    assert retention(vectors(), torch.ones(200, 8))["spearman"] == 0


def test_bad_vectors_are_named():
    with pytest.raises(UserError, match="3 teacher vectors and 4"):
        retention(vectors(3), vectors(4))
    with pytest.raises(UserError, match="at least three"):
        retention(vectors(2), vectors(2))
    with pytest.raises(UserError, match="student's sentence vectors are not finite"):
        retention(vectors(), vectors() * float("nan"))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("length", [16, 32])
def test_size_by_formula(length, head):
    width, inner, layers, words, heads = 24, 40, 3, 50, 4
    config = transformers.BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=64,
    )
    model = transformers.BertModel(config, add_pooling_layer=head)
    layer_params = 4 * (width + 1) * width + (width + 1) * inner + (inner + 1) * width + 4 * width
    others = (64 + 2 + 2) * width + head * (width + 1) * width
    layer_macs = length * (4 * width**2 + 2 * width * inner) + 2 * length**2 * width
    assert count(model, length) == {
        "params": layers * layer_params + others + words * width,
        "params_without_word_embeddings": layers * layer_params + others,
        "macs": layers * layer_macs + head * width**2,
    }
    assert model.training


class Clocked(nn.Module):
    """Moves a clock instead of working; remembers when it was called."""

    def __init__(self, clock, cost):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = transformers.BertConfig(vocab_size=10)
        self.clock, self.cost = clock, cost

    def forward(self, input_ids, attention_mask):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        assert input_ids.max() < 10
        assert attention_mask.eq(1).all()
        self.clock["now"] += self.cost * len(input_ids)
        self.clock["calls"].append(self.cost)


def test_latency_interleaves_and_reports_medians(monkeypatch):
    clock = {"now": 0.0, "calls": []}
    monkeypatch.setattr("time.perf_counter", lambda: clock["now"])
    fast, slow = Clocked(clock, 0.001).train(), Clocked(clock, 0.01)
    result = measure({"slow": slow, "fast": fast}, batch_sizes=(1, 4), length=8, rounds=6)
    assert result["slow"][1]["ms"] == pytest.approx(10)
    assert result["fast"][4]["ms"] == pytest.approx(4)
    assert result["fast"][4]["low"] == pytest.approx(result["fast"][4]["high"])
    assert result["slow"][4]["rounds"] == 6
    measured = clock["calls"][4:16]  # after two warm-up rounds of two
    assert measured == [0.01, 0.001, 0.001, 0.01] * 3
    assert fast.training


def test_latency_ends_in_time_but_not_before_five_rounds(monkeypatch):
    clock = {"now": 0.0, "calls": []}
    monkeypatch.setattr("time.perf_counter", lambda: clock["now"])
    result = measure({"a": Clocked(clock, 1.0)}, batch_sizes=(1,), rounds=100, seconds=2.0)
    assert result["a"][1]["rounds"] == 5
    result = measure({"a": Clocked(clock, 1.0)}, batch_sizes=(1,), rounds=100, seconds=9.5)
    assert result["a"][1]["rounds"] == 10
