"""Whole searches on a tiny teacher: from the first stage to the student, again, longer."""

import json
import shutil
from functools import partial

import pytest

pytest.importorskip("transformers")
pytest.importorskip("optuna")

from tiny_recipes import Files
from tiny_searches import ROWS, coarse, fine, judged, outcome, report, search, three, undisturbed

from fastffn.distill import engine as distillation
from fastffn.distill.recipe import read as read_distillation
from fastffn.errors import UserError
from fastffn.search import engine, evaluation
from fastffn.search.export import read_genes
from fastffn.search.storage import Storage

SHARED = {"stage": "shared", "rows": ROWS}


@pytest.fixture(autouse=True)
def alone():
    with undisturbed():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("tiny") / "files")


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """A finished search: its run directory. Nobody changes it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with undisturbed():
        engine.run(three(files), out)
    return out


@pytest.fixture
def by_length(monkeypatch):
    """Qualities that cost nothing: candidates of few letters are good."""

    def score(self, model, module=None, around=None):
        return -float(len("".join(str(layer.ffn.gene) for _, layer in walk(model))))

    def walk(model):
        return model.base_model.encoder.walk()

    monkeypatch.setattr(evaluation._Evaluation, "score", score)


# -- from the first stage to the last


def test_a_search_ends_with_all_its_files(whole):
    found = report(whole)
    assert [stage["name"] for stage in found["stages"]] == ["coarse", "middle", "fine"]
    assert [s["finished"] + s["pruned"] + s["diverged"] for s in found["stages"]] == [4, 4, 4]
    assert [str(gene) for gene in read_genes(whole / "genes.yaml")] == found["genes"]
    config = json.loads((whole / "config.json").read_text())
    assert config["genes"] == found["genes"] and not config.get("supernet")
    last = [record for record in found["candidates"] if record["stage"] == "fine"]
    assert found["best"]["quality"] == max(record["quality"] for record in last)
    functions = {gene.partition(" ")[2] for r in last for gene in r["genes"][:1]}
    assert len(functions) == 1  # frozen
    there = {path.name for path in whole.iterdir() if not path.name.startswith("search.sqlite3-")}
    assert there == {
        *("recipe.yaml", "state.json", "search.sqlite3", "supernets", "report.json"),
        *("genes.yaml", "config.json", "student.yaml"),
    }
    assert {path.name for path in (whole / "supernets").iterdir()} == {"coarse", "fine"}


def test_the_supernet_of_a_later_stage_has_the_functions_of_the_winner(whole):
    first, second = (
        json.loads((whole / "supernets" / name / "student" / "config.json").read_text())["genes"]
        for name in ("coarse", "fine")
    )
    fine_ones = [r["genes"] for r in report(whole)["candidates"] if r["stage"] == "fine"]
    assert [g.partition(" ")[2] for g in second] == [g.partition(" ")[2] for g in fine_ones[0]]
    assert [g.partition(" ")[2] for g in first] == ["down(gelu_erf(up(x)))"] * 2  # the teacher's
    assert {g.partition(" ")[0] for g in second} == {"2x2"}  # whatever the winner's shapes


def test_the_student_is_distilled(whole, tmp_path):
    recipe = read_distillation(whole / "student.yaml")
    assert [stage.name for stage in recipe.stages] == ["proxy"]
    distillation.run(recipe, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    assert config["genes"] == report(whole)["genes"]


def test_methods_and_objectives(files, tmp_path, monkeypatch):
    """On a task, in bfloat16; the supernet has learnt one layer alone as well."""
    monkeypatch.setattr(engine, "measure", partial(engine.measure, rounds=5))
    stages = [
        coarse(score={"data": "task", "rows": ROWS}, rungs=[1], objectives=["quality", "params"])
    ]
    for method, freeze in (("tpe", "functions"), ("partition", None), ("random", None)):
        own = {"method": method, "warmup": 2} if method == "partition" else method
        more = {"supernet": [], "random": 1, "objectives": ["quality", "latency"]}
        stages.append(fine(name=method, proposals=own, trials=5, freeze=freeze, **more))
    space = {"num_layers": 1, "latency": 1000.0, "target": {"length": 8, "threads": 1}}
    warmup = {"name": "warmup", "student": "supernet", "subnetworks": 3, "depths": [1, 2]}
    distil = [warmup, {"name": "proxy", "student": "candidate"}]
    recipe = search(files, stages, distil, task=True, space=space, precision="bf16")
    found = engine.run(recipe, tmp_path / "run")
    assert all(len(record["genes"]) == 1 for record in found["candidates"])
    assert all(0 < record["latency"] < 1_000_000 for record in found["candidates"])
    assert {ROWS * record["quality"] % 1 for record in found["candidates"]} == {0}
    assert [stage["finished"] for stage in found["stages"]] == [4, 5, 5, 5]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_hidden_layers"] == 1
    student = read_distillation(tmp_path / "run" / "student.yaml").models["student"]
    assert student.efficientbert["layers"] == [1]


def test_a_supernet_that_is_loaded(files, whole, tmp_path):
    """Scored by a stage that nothing goes through; other options are refused from the first
    candidate on, though no supernet was trained."""
    load = {"load": whole / "supernets" / "coarse" / "student"}
    stage = fine(supernet=[], freeze=None, score={"stage": "proxy", "rows": ROWS})

    def stop(phase, done, total, text):
        if (phase, done) == ("fine", 2):
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        engine.run(search(files, [stage], supernet=load), out, progress=stop)
    before = judged(out)
    with pytest.raises(UserError, match=r"other options \(seed was 0, is 1\)"):
        engine.run(search(files, [stage], supernet=load, seed=1), out)
    found = engine.run(search(files, [stage], supernet=load), out)
    assert len(found["candidates"]) == 4 and before.items() <= judged(out).items()


# -- again, longer, shorter


def test_a_finished_search_is_returned_at_once(files, whole):
    seen = []
    again = engine.run(three(files), whole, progress=lambda *told: seen.append(told))
    assert again == report(whole) and [phase for phase, *_ in seen] == ["report"]
    with pytest.raises(UserError, match=r"other options \(seed was 0, is 1\)"):
        engine.run(three(files, seed=1), whole)


def test_more_trials_bring_another_winner_to_the_later_stages(files, tmp_path, by_length):
    """What was judged around the winner before stays in the database, beside."""
    out, changed = tmp_path / "run", False
    for trials in (1, 12):
        stages = [coarse(trials=trials, random=1), fine(score=SHARED)]
        seeds = [["2x2 tanh(add(down(gelu(up(tanh(x)))), x))"] * 2]
        found = engine.run(search(files, stages, seeds=seeds), out)
        assert [s["finished"] + s["pruned"] for s in found["stages"]] == [trials, 4]
        kept = {r["number"]: r["quality"] for r in found["candidates"] if r["stage"] == "coarse"}
        best = max(
            (r for r in found["candidates"] if r["stage"] == "coarse" and not r["pruned"]),
            key=lambda record: record["quality"],
        )
        winner = [gene.partition(" ")[2] for gene in best["genes"]]
        assert [gene.partition(" ")[2] for gene in found["genes"]] == winner
        folder = tmp_path / found["supernet"]
        config = json.loads((folder / "config.json").read_text())
        assert [gene.partition(" ")[2] for gene in config["genes"]] == winner
        changed = changed or winner
    assert changed != winner and kept[0] == -2 * len("2x2 tanh(add(down(gelu(up(tanh(x)))), x))")
    assert Storage(out).names() == ["tiny", "tiny.coarse", "tiny.fine", "tiny.fine~2"]


def test_minutes_end_stages_early_and_keep_what_was_judged(files, tmp_path, by_length):
    stages = [coarse(trials=500), fine(score=SHARED, trials=500)]
    out = tmp_path / "run"
    found = engine.run(search(files, stages, minutes=0.001), out)
    counts = [s["finished"] + s["pruned"] for s in found["stages"]]
    assert all(0 < count < 500 for count in counts)
    assert engine.run(search(files, stages, minutes=0.001), out) == found
    shorter = [coarse(trials=6), fine(score=SHARED, trials=500)]
    more = engine.run(search(files, shorter, minutes=0.002), out)  # other time: it goes on
    assert more["stages"][0]["finished"] + more["stages"][0]["pruned"] >= min(6, counts[0])


def test_an_interrupted_search_with_minutes_goes_on_where_it_was(files, tmp_path, by_length):
    recipe = search(files, [coarse(trials=500), fine(score=SHARED)], minutes=0.001)
    out = tmp_path / "run"

    def stop(phase, done, total, text):
        if phase == "shared":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(recipe, out, progress=stop)
    before = judged(out)
    engine.run(recipe, out)
    after = judged(out)
    assert before == {key: value for key, value in after.items() if key[0] == "coarse"}


def test_fresh_starts_over(files, tmp_path, by_length):
    out = tmp_path / "run"
    recipe = search(files, [coarse(trials=2)])
    engine.run(recipe, out)
    (out / "compare.json").write_text("{}")
    other = search(files, [coarse(trials=2)], seed=1)
    found = engine.run(other, out, fresh=True)
    assert found["seed"] == 1 and len(found["candidates"]) == 2
    assert not (out / "compare.json").exists()


def test_a_comparison_goes_on_where_it_was(files, tmp_path, monkeypatch):
    own, calls = evaluation._Evaluation.score, []
    monkeypatch.setattr(
        evaluation._Evaluation, "score", lambda *given: calls.append(1) or own(*given)
    )
    recipe = search(files, [coarse(rungs=[1])])

    def compare(out, progress=None):
        return engine.compare(recipe, out, ("random", "evolution"), (0, 1), progress=progress)

    first = compare(tmp_path / "whole")
    needed = len(calls)

    def stop(phase, done, total, text):
        if (phase, done) == ("compare", 6):
            raise KeyboardInterrupt

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "run", stop)
    second = compare(tmp_path / "run")
    assert len(calls) == needed
    assert second["methods"] == first["methods"]


def test_a_comparison_of_a_finished_search_leaves_it_finished(files, tmp_path, by_length):
    out = tmp_path / "run"
    recipe = search(files, [coarse(trials=2)])
    engine.run(recipe, out)
    engine.compare(recipe, out, ("random", "evolution"), (0,))
    assert Storage(out).notes("tiny")["finished"] is True


# -- interrupted


@pytest.mark.parametrize(("phase", "done"), [("middle", 2), ("shared", 1)])
def test_an_interrupted_search_ends_like_others(phase, done, files, whole, tmp_path):
    out = tmp_path / "run"

    def stop(*told):
        if told[:2] == (phase, done):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(three(files), out, progress=stop)
    before = judged(out)
    assert outcome(engine.run(three(files), out)) == outcome(report(whole))
    assert before.items() <= judged(out).items()
    shutil.rmtree(out)
