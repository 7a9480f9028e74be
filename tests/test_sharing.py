"""Sub-networks of one step: computed together with the values and gradients of each alone."""

from fractions import Fraction

import pytest
import torch

from fastffn.errors import UserError

pytest.importorskip("transformers")

from transformers import BertConfig, BertForSequenceClassification

from fastffn.distill.reading import read
from fastffn.distill.sharing import read_each
from fastffn.distill.stage_module import StageModule, sizes
from fastffn.distill.subnetworks import Sandwich, SubNetwork, kept_layers
from fastffn.distill.terms import TERMS
from fastffn.models import EfficientBertConfig, EfficientBertForSequenceClassification

FUNCTIONS = [
    "1x1 tanh(down(gelu(up(x))))",
    "1x1 down(mul(swish(gate(x)), up(x)))",
    "1x1 mul(down(relu(up(x))), x)",
]
SIZE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "genes": FUNCTIONS,
    "embedding_size": 8,
    "max_position_embeddings": 16,
    "supernet": {"max_stack": 2, "max_width": 24, "gated": True},
    "num_labels": 2,
}
NAMES = ["embeddings", "scores.0", "hidden.0", "q.2", "k.2", "v.2", "hidden.2", "logits"]


def supernet(dropout=0.0, **changes):
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = EfficientBertConfig(**(SIZE | rates | changes))
    return EfficientBertForSequenceClassification(config).double().train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[2, 7:] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}


def apart(model, networks, batch, names):
    """What `read_each` stands for."""
    found = []
    for genes, layers in networks:
        model.set_genes(genes, layers)
        runs = range(3) if layers is None else layers
        numbers = [0 if n == "embeddings" else int(n.partition(".")[2] or 2) for n in names]
        wanted = [name for name, k in zip(names, numbers, strict=True) if k in runs]
        found.append(read(model, batch, wanted))
    return found


def teacher():
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=40,
        hidden_size=36,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=48,
        num_labels=2,
    )
    return BertForSequenceClassification(config).double().eval()


def stage(model, depths=(), count=4):
    losses = {
        "relations": TERMS["relations"](),
        "scores": TERMS["scores"](),
        "hidden": TERMS["hidden"](embeddings=True, projection="shared"),
        "hard_labels": TERMS["hard_labels"](),
    }
    theirs = teacher()
    built = {n: option.build(sizes(model), sizes(theirs)) for n, option in losses.items()}
    sandwich = Sandwich(model, count, seed=5, depths=depths)
    module = StageModule({"supernet": model}, {"supernet": built}, None, sandwich).double()
    return module, theirs


@pytest.mark.parametrize("depths", [(), (1, 2), (2, 3)])
def test_values_and_gradients_are_those_of_separate_forwards(batch, depths, monkeypatch):
    module, theirs = stage(supernet(), depths)
    with torch.no_grad():
        known = read(theirs, batch, module.teacher_reads)

    def step():
        values = module(batch, known, 3)
        trained = list(module.parameters())
        return values, torch.autograd.grad(sum(values.values()), trained, allow_unused=True)

    together, shared = step()
    monkeypatch.setattr("fastffn.distill.stage_module.read_each", apart)
    separate, each = step()
    assert list(together) == list(separate) == ["relations", "scores", "hidden", "hard_labels"]
    for name, value in separate.items():
        torch.testing.assert_close(together[name], value, rtol=1e-11, atol=0)
    for a, b in zip(shared, each, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * b.abs().max().item())


def calls(monkeypatch, model):
    counted = {"embeddings": 0, "attention": [0, 0, 0], "product": 0}
    base = model.base_model

    def count(module, add):
        whole = type(module).forward
        monkeypatch.setattr(
            module, "forward", lambda *args, **kw: (add(), whole(module, *args, **kw))[1]
        )

    for k, layer in enumerate(base.encoder.layer):

        def add(k=k):
            counted["attention"][k] += 1

        count(layer.attention, add)

    def words():
        counted["embeddings"] += 1

    count(base.embeddings.word_embeddings, words)
    return counted


def test_the_common_part_runs_once(batch, monkeypatch):
    model = supernet()
    counted = calls(monkeypatch, model)
    networks = Sandwich(model, 4, seed=5).at(0)
    found = read_each(model, networks, batch, NAMES)
    assert counted["embeddings"] == 1 and counted["attention"] == [1, 4, 4]
    for name in ("embeddings", "scores.0"):
        assert all(ours[name] is found[0][name] for ours in found)
    for name in ("hidden.0", "q.2", "logits"):
        assert not torch.equal(found[0][name], found[1][name])
    assert "forward" not in model.base_model.encoder.layer[0].__dict__
    assert "forward" not in model.base_model.embeddings.__dict__
    want = [str(gene) for gene in networks[-1].genes]
    assert model.config.genes == want  # the last stays set


@pytest.mark.parametrize("why", ["checkpointing", "hook", "depth"])
def test_what_is_not_shared(batch, monkeypatch, why):
    model, seen = supernet(), []
    if why == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif why == "hook":
        model.base_model.encoder.layer[0].ffn.register_forward_hook(lambda *_: seen.append(1))
    networks = Sandwich(model, 3, seed=5, depths=(1,) if why == "depth" else ()).at(0)
    counted = calls(monkeypatch, model)
    found = read_each(model, networks, batch, NAMES)
    assert counted["attention"][0] == (1 if why == "depth" else 3)
    assert len(seen) == (3 if why == "hook" else 0)
    assert ("hidden.0" in found[1]) == (why != "depth")
    for ours, alone in zip(found, apart(model, networks, batch, NAMES), strict=True):
        assert list(ours) == list(alone)
        torch.testing.assert_close(ours["logits"], alone["logits"])


def test_dropout_is_common_where_the_work_is(batch):
    model = supernet(dropout=0.3)
    genes = model.config.parsed_genes()
    one, other = read_each(model, [SubNetwork(genes), SubNetwork(genes)], batch, NAMES)
    assert one["scores.0"] is other["scores.0"]
    assert not torch.equal(one["hidden.0"], other["hidden.0"])


def test_the_model_is_as_it_was_after_an_error(batch):
    model = supernet()
    broken = SubNetwork(["9x1 down(gelu(up(x)))"] * 3)
    with pytest.raises(UserError, match="max_stack"):
        read_each(model, [Sandwich(model, 2, 0).largest, broken], batch, NAMES)
    assert "forward" not in model.base_model.encoder.layer[0].__dict__


def test_which_layers_are_kept():
    assert [kept_layers(depth, 6) for depth in (1, 2, 3, 4, 6)] == [
        [5],
        [0, 5],
        [0, 2, 5],
        [0, 1, 3, 5],
        [0, 1, 2, 3, 4, 5],
    ]
    for count in range(1, 13):
        for depth in range(1, count + 1):
            kept = kept_layers(depth, count)
            assert kept == sorted(set(kept)) and len(kept) == depth and kept[-1] == count - 1


def test_depths_of_the_sandwich():
    model = supernet()
    sandwich = Sandwich(model, 4, seed=5, depths=(2, 3))
    for step in range(20):
        largest, smallest, *drawn = sandwich.at(step)
        assert [str(g) for g in smallest.genes] == [
            str(model.config.parsed_genes()[k].with_(stack=1, ratio=Fraction(1, 4))) for k in (0, 2)
        ]
        assert smallest.layers == [0, 2] and largest == sandwich.largest
        assert largest.layers == [0, 1, 2] and [g.stack for g in largest.genes] == [2, 2, 2]
        assert all(n.layers in ([0, 2], [0, 1, 2]) for n in drawn)
        assert all(len(n.layers) == len(n.genes) for n in drawn)
    assert {len(n.layers) for step in range(20) for n in sandwich.at(step)[2:]} == {2, 3}
    assert sandwich.at(7) == Sandwich(model, 4, seed=5, depths=(2, 3)).at(7)
    without = Sandwich(model, 4, seed=5).at(0)
    assert all(network.layers is None and len(network.genes) == 3 for network in without)
    with pytest.raises(UserError, match="4 of the supernet's 3 layers"):
        Sandwich(model, 2, 0, depths=(4,))


def test_ratios_of_the_sandwich():
    model = supernet()
    sandwich = Sandwich(model, 4, seed=5, ratios=("1/2", "1/3"))
    assert {gene.ratio for gene in sandwich.largest.genes} == {Fraction(1, 2)}
    drawn = [gene.ratio for step in range(20) for n in sandwich.at(step) for gene in n.genes]
    assert {*drawn} == {Fraction(1, 2), Fraction(1, 3)}
    with pytest.raises(UserError, match="ratios: 9 is not between 0 and the supernet's"):
        Sandwich(model, 2, 0, ratios=("9",))


@pytest.mark.parametrize("ratios", [(), ("1/2", "1", "2")])
def test_functions_with_x_inside_are_never_wider_than_x(ratios):
    config = EfficientBertConfig(
        vocab_size=20,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        genes=["1x1 down(mul(up(x), x))", "1x1 down(gelu(up(x)))"],
        supernet={"max_stack": 1, "max_width": 24},
    )
    model = EfficientBertForSequenceClassification(config)
    sandwich = Sandwich(model, 4, seed=0, ratios=ratios)
    for step in range(10):
        for network in sandwich.at(step):
            model.set_genes(*network)
            assert network.genes[0].width(12) <= 12
    assert [gene.width(12) for gene in sandwich.largest.genes] == [12, 24]
