"""How candidates are judged: as the distillation engine would train, on rows of nobody."""

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("optuna")

from tiny_recipes import Files
from tiny_searches import ROWS, coarse, fine, search

from fastffn.distill import engine as distillation
from fastffn.distill.preparation import prepare
from fastffn.distill.recipe_parts import ModelSpec
from fastffn.models import extract
from fastffn.search import scoring
from fastffn.search.evaluation import distillation as alone
from fastffn.search.evaluation import evaluation
from fastffn.search.scoring import nothing

SHARED = {"stage": "shared", "rows": ROWS}
GENES = ["2x1 down(tanh(up(x)))", "1x1/2 tanh(down(gelu(up(x))))"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("tiny") / "files")


@pytest.fixture(scope="module")
def recipe(files):
    return search(files, [coarse(rungs=[1]), fine(score=SHARED)])


@pytest.fixture(scope="module")
def supernet(recipe, tmp_path_factory):
    """The folder of a supernet that the recipe's first stage trains, as a search would."""
    out = tmp_path_factory.mktemp("supernet") / "run"
    distillation.run(alone(recipe, ["warmup"]), out)
    return out / "student"


def genes(judge):
    from fastffn.expr import Gene

    return tuple(Gene.parse(text, 1) for text in GENES)


def test_nobody_trains_on_rows_that_judge(recipe):
    """Those of the supernet's stages and those of candidates are apart from the same rows."""
    whole = prepare(dataclasses.replace(alone(recipe, ["warmup"]), data=recipe.distil.data))
    every = {tuple(row) for row in _rows(whole.data["general"].train)}
    for names in (["warmup"], ["proxy"], ["shared"]):
        data = prepare(alone(recipe, names)).data["general"]
        held, trained = _rows(data.held_out), _rows(data.train)
        assert len(held) == ROWS and len(trained) == 40 - ROWS
        assert {tuple(row) for row in (*held, *trained)} == every
        assert not {tuple(row) for row in held} & {tuple(row) for row in trained}


def _rows(encoded):
    return [[*encoded.batch([k])["input_ids"][0].tolist()] for k in range(len(encoded))]


def test_a_candidate_is_trained_as_the_engine_trains(recipe, supernet, tmp_path):
    judge = evaluation(recipe, recipe.search[0], supernet, tmp_path / "work", CPU)
    cut = []
    own = judge.cut
    judge.cut = lambda given: cut.append(own(given)) or cut[-1]
    (quality,) = judge(genes(judge))
    distil = alone(recipe, ["proxy"], supernet)
    models = distil.models | {
        "candidate": ModelSpec(efficientbert={"from": "supernet", "genes": GENES})
    }
    out = tmp_path / "run"
    distillation.run(dataclasses.replace(distil, models=models), out)
    from safetensors.torch import load_file

    theirs, ours = load_file(out / "student" / "model.safetensors"), cut[0].state_dict()
    before = own(genes(judge)).state_dict()
    assert theirs.keys() <= ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(before[name], ours[name]) for name in ours)
    assert torch.isfinite(torch.tensor(quality))


def test_all_candidates_see_the_same_batches_and_give_the_same_again(recipe, supernet, tmp_path):
    judge = evaluation(recipe, recipe.search[0], supernet, tmp_path / "work", CPU)
    seen = []
    data = judge.made.data["general"].train
    own = type(data).batch

    def batch(self, numbers):
        if self is data:
            seen.append(list(map(int, numbers)))
        return own(self, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(data), "batch", batch)
        before = torch.random.get_rng_state()
        (first,) = judge(genes(judge))
        batches, seen = seen, []
        (other,) = judge(judge.supernet.config.parsed_genes())
        assert seen == batches and len(batches) == 3
        (again,) = judge(genes(judge))
        assert again == first != other
        assert torch.equal(torch.random.get_rng_state(), before)


def test_one_shot_is_the_quality_of_the_extracted_model(recipe, supernet, tmp_path):
    judge = evaluation(recipe, recipe.search[1], supernet, tmp_path / "work", CPU)
    for given in (genes(judge), genes(judge)[::-1], genes(judge)):
        quality = judge(given)
        model = extract(judge.supernet, given).eval()
        module = judge.module(judge.stages["shared"][1], model)
        assert quality == pytest.approx(judge._loss(module, nothing), rel=1e-6)


def test_the_loss_is_the_mean_over_rows_whatever_the_batches(
    recipe, supernet, tmp_path, monkeypatch
):
    found = []
    for size in (64, 3, 1):
        monkeypatch.setattr(scoring, "_BATCH", size)
        judge = evaluation(recipe, recipe.search[1], supernet, tmp_path / f"{size}", CPU)
        found.append(judge(genes(judge)))
    assert found == pytest.approx([found[0]] * 3, rel=1e-5) and found[0] < 0
