"""The whole pipeline on a tiny teacher: what it reports, keeps, refuses, and how it resumes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_teacher import save_teacher, write_text
from transformers import AutoModel, AutoTokenizer

from fastffn import rundir
from fastffn.compress import baselines, phases, pipeline, schedule, student
from fastffn.compress.options import Options
from fastffn.errors import UserError
from fastffn.models import EfficientBertModel

PLAN = {
    "sentences": 200,
    "warmup_steps": 6,
    "candidates": 6,
    "candidate_steps": 2,
    "distil_steps": 8,
    "baseline_steps": 3,
}
BUDGET = 8000
RESULT = "student/model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "teacher": str(save_teacher(folder / "teacher")),
        "text": (write_text(folder / "text.txt"),),
        "budget_params": BUDGET,
        "minutes": 0.1,
        "plan": PLAN,
    }


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """An uninterrupted run: (its directory, its report, what progress was told)."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    told = []
    report = pipeline.run(Options(**inputs, out=out), lambda *args: told.append(args))
    return out, report, told


@pytest.fixture
def often(monkeypatch):
    """A checkpoint after every step."""
    monkeypatch.setattr(phases, "CHECKPOINT_SECONDS", 0.0)


def stop_at(where, number):
    """Progress that interrupts the run when a phase has done so much."""

    def progress(phase, done, total, text):
        if phase == where and done == number:
            raise KeyboardInterrupt

    return progress


# -- a whole run ---------------------------------------------------------------------------------


def test_the_report_is_complete(finished):
    _, report, _ = finished
    json.dumps(report, allow_nan=False)
    sizes = {"params", "params_without_word_embeddings", "macs"}
    sizes |= {"latency_ms_b1", "latency_ms_b32"}
    assert sizes | {"name", "origin"} == set(report["teacher"])
    assert sizes | {"name", "genes", "layers", "embedding_size", "path"} == set(report["student"])
    retained = {"spearman", "top1", "top10"}
    assert set(report["retention"]) == retained | {"sentences", "pairs"}
    assert set(report["start"]) == retained
    compared = report["baselines"]
    assert compared["budget"]["what"] == "short" and compared["budget"]["steps"] == 3
    for name in ("searched", "no_search", "no_relations", "vectors_only"):
        assert retained <= set(compared[name])
    assert compared["no_search"]["gene"].endswith("down(gelu(up(x)))")
    trials = report["search"]["trials"]
    assert report["search"]["candidates"] == len(trials) == PLAN["candidates"]
    assert {trial["stage"] for trial in trials} == {"coarse", "fine"}
    assert report["search"]["best_gene"] == report["student"]["genes"]
    assert report["curves"]["distil"][-1][0] == PLAN["distil_steps"]
    assert set(report["phases"]) == set(pipeline._PHASES)
    assert report["seconds"] == pytest.approx(sum(report["phases"].values()), abs=0.2)
    assert report["data"]["train_sentences"] == PLAN["sentences"]
    assert report["data"]["train_tokens"] > 5 * PLAN["sentences"]
    assert set(report["machine"]) == {"cpu", "cores", "threads", "torch", "isa"}
    assert report["plan"] == PLAN
    assert "embedding_effect" not in report


def test_the_figures_agree_with_each_other(finished):
    _, report, _ = finished
    teacher, ours = report["teacher"], report["student"]
    assert ours["params_without_word_embeddings"] <= BUDGET
    for ratio, name in (
        ("size_ratio", "params_without_word_embeddings"),
        ("size_ratio_total", "params"),
        ("speedup_b1", "latency_ms_b1"),
        ("speedup_b32", "latency_ms_b32"),
    ):
        assert report[ratio] == pytest.approx(teacher[name] / ours[name])
    best = max(trial["quality"] for trial in report["search"]["trials"])
    chosen = [t for t in report["search"]["trials"] if t["genes"] == ours["genes"]]
    assert chosen[0]["quality"] == best
    assert chosen[0]["params"] == ours["params_without_word_embeddings"]
    assert report["retention"]["spearman"] > report["start"]["spearman"]


def test_the_student_loads_again(finished):
    out, report, _ = finished
    loaded = EfficientBertModel.from_pretrained(out / "student")
    again = AutoModel.from_pretrained(out / "student")
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    batch = tokenizer(["Bara kiti.", "Luvo bara doti."], padding=True, return_tensors="pt")
    with torch.inference_mode():
        vectors = loaded(**batch).pooler_output
        assert torch.equal(vectors, again(**batch).pooler_output)
    assert vectors.shape == (2, 24)
    assert sum(p.numel() for p in loaded.parameters()) == report["student"]["params"]
    assert loaded.config.hidden_dropout_prob == 0.1  # the teacher's, for fine-tuning


def test_working_files_are_removed(finished):
    out, _, _ = finished
    assert {path.name for path in out.iterdir()} == {"state.json", "student"}


def test_progress_names_every_phase_to_its_end(finished):
    _, _, told = finished
    last = {phase: (done, total) for phase, done, total, _ in told}
    assert set(last) == set(pipeline._PHASES)
    assert all(done == total for done, total in last.values())


def test_a_finished_run_is_reported_again_without_work(finished, inputs, monkeypatch):
    out, report, _ = finished
    monkeypatch.setattr(pipeline, "load_teacher", None)
    assert pipeline.run(Options(**inputs, out=out)) == json.loads(json.dumps(report))


def test_embedding_size_and_its_effect(inputs, tmp_path):
    options = Options(**inputs, out=tmp_path / "run", embedding_size=6, keep_cache=True)
    report = pipeline.run(options)
    loaded = EfficientBertModel.from_pretrained(tmp_path / "run/student")
    assert loaded.embeddings.word_embeddings.weight.shape == (30, 6)
    effect = report["embedding_effect"]
    own, factorised = effect["the teacher's own, 24"], effect["factorised to 6"]
    assert own["params"] - factorised["params"] == 30 * 18 - (6 * 24 + 24)
    assert factorised["spearman"] == report["baselines"]["searched"]["spearman"]
    assert (tmp_path / "run/work/teacher/index.json").is_file()  # keep_cache


def test_ablate_trains_the_baselines_as_long_as_the_student(inputs, tmp_path):
    report = pipeline.run(Options(**inputs, out=tmp_path / "run", ablate=True))
    compared = report["baselines"]
    assert compared["budget"]["what"] == "full"
    assert compared["budget"]["steps"] == PLAN["warmup_steps"] + PLAN["distil_steps"]
    assert compared["searched"]["spearman"] == report["retention"]["spearman"]
    effect = report["embedding_effect"]
    assert effect["factorised to 8"]["params"] < effect["the teacher's own, 24"]["params"]
    assert effect["the teacher's own, 24"]["params"] == report["student"]["params"]


# -- the baselines -------------------------------------------------------------------------------


def test_each_baseline_differs_only_in_what_it_says(finished, inputs, monkeypatch, tmp_path):
    seen = []
    original = baselines.contenders
    monkeypatch.setattr(
        baselines,
        "contenders",
        lambda run, genes: seen.append((run, genes)) or original(run, genes),
    )
    pipeline.run(Options(**inputs, out=tmp_path / "run"))
    ((run, genes),) = seen
    field = original(run, genes)
    full = field["searched"]
    assert full.genes == genes and full.objective == run.objective
    assert field["no_search"].objective == full.objective
    assert len(set(field["no_search"].genes)) == 1
    space = run.shape.space
    plain = phases.new_student(run, field["no_search"].genes, None)
    size = sum(p.numel() for n, p in plain.named_parameters() if "word_embeddings" not in n)
    winner = space.candidate(genes).params
    one_column = len(genes) * (2 * space.hidden_size + 1)
    assert winner - one_column < size <= winner
    assert field["no_relations"].genes == field["vectors_only"].genes == genes
    assert field["no_relations"].objective == phases.without(run, "relations")
    only = field["vectors_only"].objective
    assert only.vector == full.objective.vector
    assert only.hidden == only.relations == 0


# -- interruption --------------------------------------------------------------------------------

_KILLED = """
import json, os, signal, sys
from fastffn.compress import phases, pipeline
from fastffn.compress.options import Options

options, phase, number = json.loads(sys.argv[1])
phases.CHECKPOINT_SECONDS = 0.0

def progress(where, done, total, text):
    if where == phase and done == number:
        os.kill(os.getpid(), signal.SIGKILL)

pipeline.run(Options(**options), progress)
"""


def test_a_killed_run_ends_with_the_same_student(finished, inputs, tmp_path):
    """SIGKILL in the middle of the distillation, from another process."""
    whole, report, _ = finished
    options = {**inputs, "text": [str(path) for path in inputs["text"]]}
    call = json.dumps([{**options, "out": str(tmp_path / "run")}, "distil", 5])
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, call], capture_output=True, env=environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "run/student").exists()
    told = []
    again = pipeline.run(Options(**inputs, out=tmp_path / "run"), lambda *args: told.append(args))
    assert (tmp_path / "run" / RESULT).read_bytes() == (whole / RESULT).read_bytes()
    assert min(done for phase, done, *_ in told if phase == "distil") == 5  # from checkpoint 4
    assert not {"warmup", "search"} & {phase for phase, *_ in told}
    for key in ("retention", "curves", "start"):
        assert again[key] == report[key]


@pytest.mark.parametrize(
    "phase, number", [("teacher", None), ("warmup", 4), ("search", 3), ("search", 5)]
)
def test_an_interrupted_run_resumes(finished, inputs, tmp_path, often, phase, number):
    whole, report, _ = finished
    options = Options(**inputs, out=tmp_path / "run")
    if number is None:  # the moment before the last batch counts
        number = report["data"]["train_tokens"]
        number = next(done for where, done, *_ in finished[2] if where == phase)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(options, stop_at(phase, number))
    assert not (options.out / "student").exists()
    pipeline.run(options)
    assert (options.out / RESULT).read_bytes() == (whole / RESULT).read_bytes()
    again = json.loads((options.out / "state.json").read_text(encoding="utf-8"))["report"]
    assert again["search"]["trials"] == report["search"]["trials"]


def test_finished_baselines_are_not_trained_again(finished, inputs, tmp_path):
    options = Options(**inputs, out=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(options, stop_at("baselines", 2 * PLAN["baseline_steps"] + 1))
    told = []
    report = pipeline.run(options, lambda *args: told.append(args))
    steps = [done for phase, done, *_ in told if phase == "baselines"]
    assert min(steps) == 2 * PLAN["baseline_steps"] + 1
    expected = finished[1]["baselines"]
    for name in ("searched", "no_search", "no_relations", "vectors_only"):
        assert report["baselines"][name] == expected[name]


def test_other_options_are_refused_and_fresh_starts_over(inputs, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(Options(**inputs, out=out), stop_at("warmup", 2))
    with pytest.raises(UserError, match=r"other options \(seed was 0, is 1\).*--fresh"):
        pipeline.run(Options(**inputs, out=out, seed=1))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(Options(**inputs, out=out, seed=1, fresh=True), stop_at("warmup", 2))
    state = json.loads((out / "state.json").read_text(encoding="utf-8"))
    assert state["options"]["seed"] == 1


def test_text_that_changed_is_refused(inputs, tmp_path):
    text = write_text(tmp_path / "text.txt")
    options = Options(**{**inputs, "text": (text,)}, out=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(options, stop_at("warmup", 2))
    write_text(text, sentences=310)
    with pytest.raises(UserError, match="text changed"):
        pipeline.run(options)


def test_a_teacher_that_changed_is_refused(inputs, tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    options = Options(**{**inputs, "teacher": str(teacher)}, out=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(options, stop_at("warmup", 2))
    shutil.rmtree(teacher)
    save_teacher(teacher, layer_norm_eps=1e-3)
    with pytest.raises(UserError, match="teacher changed"):
        pipeline.run(options)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher": "./nowhere"}, r"nowhere does not exist"),
        ({"budget_params": 100}, r"no student meets the budget of 100 .* nearest has [\d,]+"),
        ({"layers": (0, 4)}, r"the teacher has layers 0 to 3, not 4"),
        ({"embedding_size": 24}, r"embedding_size: expected from 1 to 23"),
        ({"text": (Path("missing.txt"),)}, r"missing.txt does not exist"),
        ({"plan": {"steps": 3}}, r"plan: steps is unknown"),
        ({"plan": {"warmup_steps": 0}}, r"plan: warmup_steps must be a positive integer"),
    ],
)
def test_bad_input_is_refused_before_any_work(inputs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        pipeline.run(Options(**{**inputs, **changes}, out=tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run/work/teacher").exists()


def test_too_little_to_judge_by(inputs, tmp_path):
    text = tmp_path / "text.txt"
    lines = [f"Bara {a} kiti {b} luvo." for a in ("doti", "lura", "meno") for b in range(70)]
    text.write_text("\n\n".join([" ".join(lines[:-2]), *lines[-2:]]), encoding="utf-8")
    with pytest.raises(UserError, match="left to judge by: 1, at least 5"):
        pipeline.run(Options(**{**inputs, "text": (text,)}, out=tmp_path / "run"))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"minutes": 0}, "minutes 0 is not a positive number"),
        ({"minutes": float("nan")}, "minutes nan"),
        ({"budget_params": 0}, "budget_params 0 is not positive"),
        ({"layers": (2, 0)}, "rising order"),
        ({"layers": ()}, "rising order"),
        ({"text": ()}, "no text files"),
    ],
)
def test_options_that_make_no_sense(values, message):
    with pytest.raises(UserError, match=message):
        Options(**values)


def test_a_mistake_leaves_a_directory_that_can_be_used(inputs, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError):
        pipeline.run(Options(**{**inputs, "teacher": "./nowhere"}, out=out))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(Options(**inputs, out=out), stop_at("warmup", 1))


def test_directories_that_cannot_be_used(inputs, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="holds no run of fastffn"):
        pipeline.run(Options(**inputs, out=tmp_path, fresh=True))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    with pytest.raises(UserError, match="cannot be written"):
        pipeline.run(Options(**inputs, out=tmp_path / "file"))


def test_directories_of_weights_are_whole_or_absent(tmp_path):
    target = tmp_path / "weights"
    with pytest.raises(RuntimeError), rundir.atomic_directory(target) as folder:
        (folder / "a").write_text("half", encoding="utf-8")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("old", "new"):
        with rundir.atomic_directory(target) as folder:
            (folder / text).write_text(text, encoding="utf-8")
    assert [path.name for path in target.iterdir()] == ["new"]


@pytest.mark.parametrize(
    "number, layers",
    [(1, (0,)), (3, (2,)), (4, (1, 3)), (6, (1, 3, 5)), (7, (1, 3, 6)), (12, (1, 3, 5, 7, 9, 11))],
)
def test_half_of_the_layers_with_the_last(number, layers):
    assert student.default_layers(number) == layers


# -- the schedule --------------------------------------------------------------------------------


def test_steps_follow_from_time_and_speed():
    assert schedule.steps("distil_steps", 240, 0.2) == 1200
    assert schedule.steps("distil_steps", 0.1, 10) == schedule.LEAST["distil_steps"]
    count, steps = schedule.candidates(60, 0.2)
    assert count == 24 and 0.9 * 60 < count * (steps + 3) * 0.2 <= 60
    more, longer = schedule.candidates(240, 0.2)
    assert more > count and longer > steps
    fewer, shortest = schedule.candidates(10, 0.2)
    assert fewer < count and shortest >= schedule.LEAST["candidate_steps"]


def test_tokens_of_a_step_count_padding():
    lengths = np.array([3, 9, 5, 4])
    assert schedule.tokens_per_step(lengths, 2) == (2 * 4 + 2 * 9) / 2
    assert schedule.tokens_per_step(lengths, 4) == 4 * 9


def test_a_run_without_a_plan_makes_one(inputs, tmp_path):
    values = {**inputs, "plan": None, "minutes": 0.06}
    report = pipeline.run(Options(**values, out=tmp_path / "run"))
    assert set(report["plan"]) == set(schedule.NAMES)
    assert all(report["plan"][name] >= schedule.LEAST[name] for name in schedule.NAMES)
