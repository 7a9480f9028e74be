"""Runs that are killed, at any moment and at borders, end with the same bits as others."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_recipes
from patience import PATIENCE
from safetensors.torch import load_file
from tiny_recipes import Files, said, same, spawn, student, touched

RECIPES = {
    "two_stages": tiny_recipes.two_stages,
    "theseus": lambda files: tiny_recipes.theseus(files, "stages.replacing.accumulate=2"),
}
_KILLED = -9


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("tiny") / "files")


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """Of each recipe a run that nobody interrupts."""
    runs = {}
    for name, made in RECIPES.items():
        runs[name] = tmp_path_factory.mktemp("whole") / name
        assert spawn(made(files), runs[name]) == 0, said(runs[name])
    return runs


def killed_then_resumed(recipe, out, die_at, processes=1):
    assert spawn(recipe, out, die_at, processes) == _KILLED
    assert not (out / "report.json").exists()
    assert spawn(recipe, out, processes=processes) == 0, said(out)
    assert not (out / "work").exists()


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("seed", range(3))
def test_a_kill_at_a_random_moment_changes_no_bit(name, seed, files, whole, tmp_path):
    """Moments are counted by touches of files: between two of them a kill leaves the same files."""
    moments = len(touched(whole[name]))
    die_at = moments // 20 + random.Random(f"{name} {seed}").randrange(moments * 9 // 10)
    killed_then_resumed(RECIPES[name](files), tmp_path / "run", die_at)
    assert same(student(tmp_path / "run"), student(whole[name]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_kill_at_a_random_time_changes_no_bit(name, files, whole, tmp_path):
    """As the file systems of checkpoints and torch's own writers see it."""
    killed_then_resumed(RECIPES[name](files), tmp_path / "run", random.Random(name).uniform(0, 0.2))
    assert same(student(tmp_path / "run"), student(whole[name]))


@pytest.mark.parametrize(
    ("event", "path", "then"),
    [
        ("os.rename", "stages/01-general", 0),  # the stage is trained, nothing says so
        ("os.rename", "stages/01-general", 1),  # its weights are there, state.json lacks it
        ("os.mkdir", "work/02-task", 0),  # between the stages
        ("os.mkdir", "work/02-task/checkpoint-1", 0),  # before the next one's first checkpoint
        ("os.rename", "stages/02-task", 1),
        ("os.rename", "student", 0),
        ("os.rename", "report.json", 0),
        ("os.rename", "report.json", 1),  # complete but for the word of it
    ],
)
def test_a_kill_at_a_border_changes_no_bit(event, path, then, files, whole, tmp_path):
    moment = touched(whole["two_stages"]).index((event, path)) + then
    recipe = RECIPES["two_stages"](files)
    assert spawn(recipe, tmp_path / "run", moment) == _KILLED
    assert spawn(recipe, tmp_path / "run") == 0, said(tmp_path / "run")
    assert same(student(tmp_path / "run"), student(whole["two_stages"]))
    module = "stages/02-task/module.safetensors"  # with the projections
    ours, theirs = (load_file(out / module) for out in (tmp_path / "run", whole["two_stages"]))
    assert same(ours, theirs)


def test_kills_leave_no_rubbish(files, whole, tmp_path):
    recipe, out = RECIPES["two_stages"](files), tmp_path / "run"
    for path in ("stages/01-general", "student"):
        moment = [path for _, path in touched(whole["two_stages"])].index(path)
        spawn(recipe, out, moment)
    assert spawn(recipe, out) == 0
    there, theirs = (
        {str(path.relative_to(run)) for path in run.rglob("*") if "tfevents" not in path.name}
        for run in (out, whole["two_stages"])
    )
    assert there == theirs


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(files, whole, tmp_path):
    recipe, out = RECIPES["theseus"](files), tmp_path / "run"
    rng = random.Random(0)
    for _ in range(3):
        assert spawn(recipe, out, rng.randint(40, 90)) == _KILLED
    assert spawn(recipe, out) == 0
    assert same(student(out), student(whole["theseus"]))


def _altered(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("file", "spoil"),
    [("optimizer.pt", _cut), ("model.safetensors", _altered), ("trainer_state.json", os.remove)],
)
def test_a_damaged_checkpoint_is_not_used(file, spoil, files, whole, tmp_path):
    recipe, out = RECIPES["theseus"](files), tmp_path / "run"
    moment = touched(whole["theseus"]).index(("os.mkdir", "work/01-replacing/checkpoint-5"))
    assert spawn(recipe, out, moment) == _KILLED
    spoil(out / "work/01-replacing/checkpoint-4" / file)
    assert spawn(recipe, out) == 0
    assert f"checkpoint-4 is not used ({file} " in said(out)
    assert same(student(out), student(whole["theseus"]))


def test_without_a_whole_checkpoint_the_stage_starts_over(files, whole, tmp_path):
    recipe, out = RECIPES["theseus"](files), tmp_path / "run"
    moment = touched(whole["theseus"]).index(("os.mkdir", "work/01-replacing/checkpoint-3"))
    assert spawn(recipe, out, moment) == _KILLED
    for checkpoint in (out / "work/01-replacing").glob("checkpoint-*"):
        (checkpoint / "sealed.json").unlink()
    assert spawn(recipe, out) == 0
    assert "it was not finished" in said(tmp_path / "run")
    assert same(student(out), student(whole["theseus"]))


def test_a_finished_stage_that_is_damaged_is_trained_again(files, whole, tmp_path):
    recipe, out = RECIPES["two_stages"](files), tmp_path / "run"
    moment = touched(whole["two_stages"]).index(("os.mkdir", "work/02-task"))
    assert spawn(recipe, out, moment) == _KILLED
    _altered(out / "stages/01-general/module.safetensors")
    assert spawn(recipe, out) == 0
    assert "01-general is not used (module.safetensors was altered" in said(out)
    assert same(student(out), student(whole["two_stages"]))


def test_two_processes_that_are_killed_end_with_the_same_bits(files, tmp_path):
    recipe = RECIPES["two_stages"](files)
    assert spawn(recipe, tmp_path / "whole", processes=2) == 0, said(tmp_path / "whole")
    moments = touched(tmp_path / "whole")
    for number, at in enumerate(("work/01-general/checkpoint-4", "work/02-task/checkpoint-3")):
        out = tmp_path / f"run{number}"
        killed_then_resumed(recipe, out, moments.index(("os.mkdir", at)) + 5, processes=2)
        assert same(student(out), student(tmp_path / "whole"))


@pytest.mark.slow
def test_the_command_is_killed_and_resumed(files, whole, tmp_path):
    """A process that was started as users start it; the other tests fork it."""
    (tmp_path / "recipe.yaml").write_text(RECIPES["theseus"](files).to_yaml(), encoding="utf-8")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastffn.cli", "distill", tmp_path / "recipe.yaml"]
    command += ["--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    checkpoints = out / "work" / "01-replacing"
    while not (checkpoints / "checkpoint-2" / "sealed.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == _KILLED
    newest = max(
        (path.parent for path in checkpoints.glob("*/sealed.json")),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    _altered(newest / "model.safetensors")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{newest.name} is not used" in done.stderr
    assert "Traceback" not in done.stderr
    assert same(student(out), student(whole["theseus"]))
    assert not (out / "work").exists()


@pytest.mark.slow
def test_torchrun(files, tmp_path):
    """`torchrun` itself; the other tests start its processes one by one."""
    (tmp_path / "recipe.yaml").write_text(RECIPES["two_stages"](files).to_yaml(), encoding="utf-8")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "fastffn.cli", "distill", str(tmp_path / "recipe.yaml"), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert spawn(RECIPES["two_stages"](files), tmp_path / "two", processes=2) == 0
    assert same(student(out), student(tmp_path / "two"))
