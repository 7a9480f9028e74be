"""Searches that cannot be: refused in one line before anything is trained; and candidates that
diverge."""

import re
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("optuna")

from tiny_recipes import Files
from tiny_searches import ROWS, changed, coarse, fine, report, search, undisturbed

from fastffn.commands.search import summary
from fastffn.errors import UserError
from fastffn.search import engine, evaluation
from fastffn.search.recipe import SearchRecipe

SHARED = {"stage": "shared", "rows": ROWS}


@pytest.fixture(autouse=True)
def alone():
    with undisturbed():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("tiny") / "files")


def refused(recipe, out, **more) -> str:
    """The one line that a search is refused with; nothing is left."""
    with pytest.raises(UserError) as caught:
        engine.run(recipe, out, **more)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert not out.exists()
    return said


def test_what_has_no_members_is_refused(files, tmp_path):
    out = tmp_path / "run"
    said = refused(search(files, [coarse()], space={"params": 5}), out)
    assert said.startswith("no candidate meets the budget params <= 5: the nearest has params")
    said = refused(search(files, [coarse()], space={"primitives": []}), out)
    assert said.startswith("space: layer 0 can have no gene")


def test_seeds_that_are_none_are_refused(files, tmp_path):
    plain = "1x1 down(gelu(up(x)))"
    for gene, reason in (
        ("7x1 down(gelu(up(x)))", "layer 1.*7x1 is not among the allowed"),
        ("1x1 down(swish(up(x)))", "layer 1.*swish"),
        ("1x1 down(", "layer 1"),
    ):
        recipe = search(files, [coarse()], seeds=[[plain, plain], [plain, gene]])
        said = refused(recipe, tmp_path / "run")
        assert re.search(rf"^seeds.*{reason}", said), said


def test_a_score_by_projections_that_nothing_trains_is_refused(files, tmp_path):
    losses = {"hidden": {"projection": "shared"}}
    relations = {"losses": {"relations": {"relation_heads": 4}}}
    distil = [
        {"name": "warmup", "student": "supernet"} | relations,
        {"name": "proxy", "student": "candidate"} | relations,
        {"name": "shared", "student": "supernet", "losses": losses},
    ]
    stages = [coarse(), fine(score=SHARED)]
    half = {"hidden_size": 12, "num_attention_heads": 4}
    own = {"max_width": 24, "num_hidden_layers": 2, "vocab_size": 99}
    recipe = search(files, stages, distil)
    values = recipe.to_mapping()
    genes = ["2x2 down(gelu(up(x)))"] * 2
    values["models"]["supernet"]["supernet"] = {"max_stack": 2, **own, **half, "genes": genes}
    recipe = SearchRecipe.from_mapping(values)
    said = refused(recipe, tmp_path / "run")
    assert said.startswith("search.fine: the losses of shared project hidden states")


def test_what_cannot_be_trained_is_refused(files, tmp_path):
    out = tmp_path / "run"
    freeze = {"name": "proxy", "student": "candidate", "freeze": ["nothing"]}
    warmup = {"name": "warmup", "student": "supernet"}
    said = refused(search(files, [coarse()], [warmup, freeze]), out)
    assert said.startswith("stages.proxy: no parameter's name starts with 'nothing'")
    many = {"stage": "proxy", "rows": 4000}
    assert "hold_out 4000 leaves none of the 40 rows" in refused(
        search(files, [coarse(score=many)]), out
    )


def test_a_task_without_a_trained_head_is_refused(files, tmp_path):
    values = search(files, [coarse()]).to_mapping()
    values["data"]["task"] = files.task()
    values["search"][0]["score"] = {"data": "task", "rows": 4}
    said = refused(SearchRecipe.from_mapping(values), tmp_path / "run")
    assert said.startswith("search.coarse.score: nothing that the stage trains")


def test_a_database_that_is_not_there(files, tmp_path):
    recipe = search(files, [coarse()])
    url = f"sqlite:////{tmp_path}/nowhere/x.db"
    with pytest.raises(UserError, match="cannot open the search's database sqlite") as caught:
        engine.run(recipe, tmp_path / "run", storage=url)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run" / "supernets").exists()


def test_a_study_judged_with_other_weights_is_refused(files, tmp_path):
    url = f"sqlite:///{tmp_path}/x.db"
    teacher = shutil.copytree(files.teacher, tmp_path / "teacher")
    own = {"teacher": str(teacher)}
    engine.run(search(files, [coarse(trials=1, random=1)], **own), tmp_path / "one", storage=url)
    changed(teacher)
    with pytest.raises(UserError, match="was judged with other models or data"):
        engine.run(
            search(files, [coarse(trials=2, random=1)], **own), tmp_path / "two", storage=url
        )


# -- candidates that diverge


def test_candidates_that_diverge_are_counted(files, tmp_path, monkeypatch):
    own, calls = evaluation._Evaluation.score, []

    def score(self, model, *rest):
        calls.append(1)
        if len(calls) % 2:
            next(model.parameters()).data.fill_(torch.nan)
        return own(self, model, *rest)

    monkeypatch.setattr(evaluation._Evaluation, "score", score)
    found = engine.run(search(files, [coarse(rungs=[1])]), tmp_path / "run")
    assert (found["stages"][0]["finished"], found["stages"][0]["diverged"]) == (2, 2)


def test_a_search_all_of_whose_candidates_diverge_says_so(files, tmp_path):
    proxy = {"name": "proxy", "student": "candidate", "learning_rate": 1e30, "max_grad_norm": 1e30}
    warmup = {"name": "warmup", "student": "supernet"}
    with pytest.raises(UserError, match=r"^no candidate .*: all of them diverged$"):
        engine.run(search(files, [coarse()], [warmup, proxy]), tmp_path / "run")


def test_outputs_that_are_not_finite_are_those_of_a_candidate_that_diverged(files, tmp_path):
    """Weights may be finite where outputs are not: of a task's metric too."""
    stage = coarse(score={"data": "task", "rows": ROWS}, train=[], rungs=[1], trials=2)
    recipe = search(files, [stage], [{"name": "warmup", "student": "supernet"}], task=True)
    own = evaluation.OneShot.__call__
    with pytest.MonkeyPatch.context() as patch:

        def call(self, genes):
            head = self.supernet.classifier
            head = getattr(head, "weight", head)
            head.data.fill_(torch.inf)
            return own(self, genes)

        patch.setattr(evaluation.OneShot, "__call__", call)
        with pytest.raises(UserError, match="all of them diverged"):
            engine.run(recipe, tmp_path / "run")


def test_what_was_given_up_is_tried_when_the_finished_search_is_run_again(
    files, tmp_path, monkeypatch
):
    own, failures = evaluation._Evaluation.score, []

    def score(self, *rest):
        if len(failures) < 3:
            failures.append(1)
            raise OSError(28, "No space left on device")
        return own(self, *rest)

    monkeypatch.setattr(evaluation._Evaluation, "score", score)
    recipe, out = search(files, [coarse(rungs=[1], trials=2)]), tmp_path / "run"
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            engine.run(recipe, out)
    (stage,) = engine.run(recipe, out)["stages"]
    assert (stage["finished"], stage["given_up"], stage["diverged"]) == (1, 1, 0)
    assert stage["reasons"] == ["OSError(28, 'No space left on device')"]
    said, *_ = summary(report(out), out)
    assert f"1 given up ({stage['reasons'][0]}); the same command tries these again" in said
    again = engine.run(recipe, out)
    (stage,) = again["stages"]
    assert (stage["finished"], stage["given_up"], stage["reasons"]) == (2, 0, [])
    assert engine.run(recipe, out) == again
