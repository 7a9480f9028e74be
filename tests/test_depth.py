"""Elastic depth: a supernet that runs some of its layers, its files, extraction and training."""

import pytest
import torch
from tiny_recipes import Files, recipe

from fastffn.errors import UserError

pytest.importorskip("transformers")

from fastffn.distill import run
from fastffn.distill.recipe_parts import Loss, Stage
from fastffn.distill.terms import HardLabels
from fastffn.models import (
    EfficientBertConfig,
    EfficientBertForMaskedLM,
    EfficientBertModel,
    extract,
)

GENES = ["1x1/2 tanh(down(gelu(up(x))))", "2x1 down(relu(mul(up(x), x)))", "1x1 down(gelu(up(x)))"]


def supernet(kind=EfficientBertModel, **changes):
    values = {
        "vocab_size": 40,
        "hidden_size": 18,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "genes": GENES,
        "embedding_size": 8,
        "max_position_embeddings": 16,
        "supernet": {"max_stack": 2, "max_width": 18},
    }
    torch.manual_seed(0)
    return kind(EfficientBertConfig(**(values | changes))).eval()


@pytest.fixture
def tokens():
    return torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(1))


def test_layers_that_do_not_run_hand_on_what_they_get(tokens):
    model = supernet()
    whole = model(tokens).last_hidden_state
    model.set_genes([GENES[2], GENES[0]], [0, 2])
    assert model.config.kept_layers == [0, 2]
    assert model.config.genes == [GENES[2], GENES[1], GENES[0]]
    states = model.embeddings(tokens)
    for index in (0, 2):
        states = model.encoder.layer[index](states)
    got = model(tokens, output_hidden_states=True)
    assert torch.equal(got.last_hidden_state, states)
    assert len(got.hidden_states) == 3
    model.set_genes(GENES)
    assert model.config.kept_layers is None
    assert torch.equal(model(tokens).last_hidden_state, whole)
    model.set_genes(GENES, [0, 1, 2])
    assert model.config.kept_layers is None


def test_files_keep_the_depth(tokens, tmp_path):
    model = supernet()
    model.set_genes(GENES[:2], [1, 2])
    model.save_pretrained(tmp_path)
    loaded = EfficientBertModel.from_pretrained(tmp_path)
    assert loaded.config.kept_layers == [1, 2]
    assert torch.equal(loaded(tokens).last_hidden_state, model(tokens).last_hidden_state)


@pytest.mark.parametrize("kind", [EfficientBertModel, EfficientBertForMaskedLM])
def test_extraction_takes_the_kept_layers(tokens, kind, tmp_path):
    model = supernet(kind)
    given = extract(model, GENES[:2], [0, 2])
    assert model.config.kept_layers is None, "extract changed the supernet"
    model.set_genes(GENES[:2], [0, 2])
    current = extract(model)
    for student in (given, current):
        assert student.config.num_hidden_layers == 2 and student.config.genes == GENES[:2]
        assert student.config.supernet is None and student.config.kept_layers is None
        assert torch.equal(student(tokens)[0], model(tokens)[0])
    current.save_pretrained(tmp_path)
    assert torch.equal(kind.from_pretrained(tmp_path)(tokens)[0], model(tokens)[0])
    whole = extract(model, GENES)
    assert whole.config.num_hidden_layers == 3
    second = extract(model, layers=[1])
    assert second.config.genes == [GENES[1]]


@pytest.mark.parametrize(
    "genes, layers, message",
    [
        (GENES, [0, 2], "3 given for 2 layers"),
        (GENES[:2], [2, 0], "rising order"),
        (GENES[:2], [1, 1], "rising order"),
        (GENES[:2], [1, 3], "from 0 to 2"),
        (GENES[:2], [-1, 0], "from 0 to 2"),
        ([], [], "from 0 to 2"),
        ([GENES[0], "9x1 down(gelu(up(x)))"], [0, 2], "max_stack"),
    ],
)
def test_wrong_layers(genes, layers, message):
    model = supernet()
    for refuse in (model.set_genes, lambda *a: extract(model, *a)):
        with pytest.raises(UserError, match=message):
            refuse(genes, layers)
    assert model.config.genes == GENES and model.encoder.kept is None


def test_only_a_supernet_leaves_layers_out():
    with pytest.raises(UserError, match="only a supernet"):
        supernet(supernet=None, kept_layers=[0, 1])


def test_depths_of_a_stage():
    values = {"name": "s", "data": "d", "losses": {"l": Loss("hard_labels", HardLabels())}}
    values |= {"learning_rate": 1e-3, "steps": 1}
    assert Stage(**values, subnetworks=2, depths=(1, 3)).depths == (1, 3)
    with pytest.raises(UserError, match="give subnetworks too"):
        Stage(**values, depths=(1,))
    for depths in ((0, 2), (2, 2)):
        with pytest.raises(UserError, match="different numbers of layers"):
            Stage(**values, subnetworks=2, depths=depths)


def test_a_recipe_trains_several_depths(tmp_path):
    files = Files(tmp_path / "files")
    genes = ["2x1 down(gelu(up(x)))"] * 3
    size = {"max_stack": 2, "max_width": 24, "genes": genes, "layers": 3}
    models = {"teacher": str(files.teacher), "student": {"supernet": {"from": "teacher", **size}}}
    losses = {"relations": {"relation_heads": 3}, "hidden": {"embeddings": True}, "scores": {}}
    stage = {"name": "warmup", "data": "text", "losses": losses, "subnetworks": 3, "steps": 3}
    data = {"text": {"text": str(files.text), "max_length": 24}}

    def trained(name, **changes):
        out = tmp_path / name
        return run(recipe([stage | changes], models, data), out)["stages"]["warmup"], out

    deep, _ = trained("deep")
    elastic, out = trained("elastic", depths=[1, 2])
    assert deep["frozen"] == elastic["frozen"]
    assert deep["curve"][0][1] != elastic["curve"][0][1]
    student = EfficientBertModel.from_pretrained(out / "student")
    assert student.config.kept_layers is None and student.config.num_hidden_layers == 3
    with pytest.raises(UserError, match="4 of the supernet's 3 layers"):
        trained("deeper", depths=[4])
