"""Runs of recipes in this process: resuming, losses that break, what is trained and kept."""

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_recipes import (
    ALL_LOSSES,
    HALF,
    NO_DROPOUT,
    Files,
    Stopped,
    on_task,
    recipe,
    same,
    shortened,
    stop_at,
    student,
    task_values,
    two_stages,
)

from fastffn.distill import resumable, run, stage_trainer, stages, teaching
from fastffn.distill.checkpoints import damage
from fastffn.distill.preparation import prepare
from fastffn.distill.recipe import read
from fastffn.distill.stage_trainer import NotFinite
from fastffn.distill.terms import _HardLabels
from fastffn.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("tiny") / "files")


def curve(report, stage="task"):
    """The loss and its parts in the order of their names, of each step."""
    points = report["stages"][stage]["curve"]
    return [[loss, *(parts[name] for name in sorted(parts))] for _, loss, parts in points]


# -- resuming ------------------------------------------------------------------------------------


def ernie_tiny(files):
    values = {
        "models.pretrained": files.teacher,
        "models.finetuned": files.classifier,
        "student.config.num_hidden_layers": 2,
        "student.config.hidden_size": 16,
        "student.config.intermediate_size": 32,
        "data.general.text": files.text,
        "data.general.max_length": 24,
    }
    values |= task_values(files)
    return read("ernie-tiny", shortened(values, "gd", "ged", "tad", "tsd", steps=3))


def warmed_supernet(files):
    """The shipped recipe's first two stages: a supernet and the student that is cut out of it."""
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_stack": 2}
    size |= {"max_width": 16, "embedding_size": 8, "genes": ["2x1 down(gelu(up(x)))"] * 2}
    values = {f"models.supernet.supernet.{key}": value for key, value in size.items()}
    values |= {
        "models.pretrained": files.teacher,
        "models.finetuned": files.teacher,
        "student.efficientbert.genes": [
            "2x1/2 tanh(down(gelu(up(x))))",
            "1x1/2 down(relu(mul(up(x), x)))",
        ],
        "data.general.text": files.text,
        "data.general.max_length": 24,
        "stages.warmup.subnetworks": 3,
        "stages.task.enabled": "false",
    }
    return read("efficientbert", shortened(values, "warmup", "general", steps=3))


@pytest.mark.parametrize(
    ("made", "moments"),
    [
        (ernie_tiny, [("gd", 3), ("ged", 1), ("tad", 2), ("tsd", 3)]),
        (warmed_supernet, [("warmup", 2), ("general", 1), ("general", 3)]),
        (two_stages, [("general", 2), ("task", 6)]),
    ],
)
def test_interrupted_stages_end_with_the_same_bits(made, moments, files, tmp_path):
    recipe = made(files)
    whole = run(recipe, tmp_path / "whole")
    for moment in moments:
        with pytest.raises(Stopped):
            run(recipe, tmp_path / "run", progress=stop_at(*moment))
    resumed = run(recipe, tmp_path / "run")
    assert same(student(tmp_path / "run"), student(tmp_path / "whole"))
    for stage in whole["stages"]:
        assert resumed["stages"][stage]["curve"] == whole["stages"][stage]["curve"]
        assert resumed["stages"][stage]["metrics"] == whole["stages"][stage]["metrics"]


def test_resuming_goes_on_at_the_checkpoint(files, tmp_path):
    recipe = two_stages(files)
    with pytest.raises(Stopped):
        run(recipe, tmp_path / "run", progress=stop_at("task", 4))
    steps = []
    run(recipe, tmp_path / "run", progress=lambda phase, done, *_: steps.append((phase, done)))
    taken = [entry for entry in steps if entry[0] in ("general", "task")]
    assert taken == [("general", 1), ("task", 4), ("task", 5), ("task", 6)]
    assert not (tmp_path / "run" / "work").exists()


def test_a_finished_run_is_not_run_again(files, tmp_path):
    recipe = on_task(files, {"hard_labels": {}})
    report = run(recipe, tmp_path / "run")
    stamp = (tmp_path / "run" / "student" / "model.safetensors").stat().st_mtime_ns
    assert run(recipe, tmp_path / "run") == report
    assert (tmp_path / "run" / "student" / "model.safetensors").stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report


# -- losses that break ---------------------------------------------------------------------------


def test_a_loss_of_nan_stops_the_run_before_a_checkpoint_holds_it(files, tmp_path, monkeypatch):
    """One example has the label NaN; it is named, and what was saved before is whole."""
    recipe = on_task(
        files, {"hard_labels": {}, "hidden": {}}, kind="regression", batch_size=2, steps=15
    )
    encoded = type(prepare(recipe).data["task"].train)
    batch = encoded.batch

    def spoiled(self, numbers):
        made = batch(self, numbers)
        if "labels" in made:
            made["labels"][torch.as_tensor(list(numbers)) == spoil] = float("nan")
        return made

    for spoil in range(3, 30):  # one that does not come in the first two steps
        with monkeypatch.context() as patch, pytest.raises(NotFinite) as caught:
            patch.setattr(encoded, "batch", spoiled)
            out = tmp_path / f"run{spoil}"
            run(recipe, out)
        message = str(caught.value)
        step = int(message.split("step ")[1].split(":")[0])
        if step > 2:
            break
    assert message.startswith(f"stage task, step {step}: loss hard_labels is nan")
    examples = message.split("examples ")[1].split(";")[0].split(", ")
    assert str(spoil) in examples and len(examples) == 2
    last = out / "work" / "01-task" / f"checkpoint-{step}"
    assert str(last) in message and not damage(last)
    assert "\n" not in message
    for tensor in load_file(last / "model.safetensors").values():
        assert tensor.isfinite().all()
    moments = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    assert all(t.isfinite().all() for state in moments.values() for t in state.values())
    run(recipe, out)  # the labels are mended


def test_a_gradient_of_nan_stops_the_run(files, tmp_path, monkeypatch):
    forward = _HardLabels.forward

    def broken(self, ours, theirs, batch):
        return forward(self, ours, theirs, batch) + (ours["logits"] * 0).sqrt().sum()

    monkeypatch.setattr(_HardLabels, "forward", broken)
    with pytest.raises(NotFinite, match=r"step 0: the gradient's norm is nan; there is no checkp"):
        run(on_task(files, {"hard_labels": {}}), tmp_path / "run")


def test_a_gradient_of_nan_is_found_before_it_is_saved(files, tmp_path, monkeypatch):
    """On a GPU losses and gradients are looked at now and then, and before every checkpoint."""
    forward = _HardLabels.forward
    steps = []

    def broken(self, ours, theirs, batch):
        steps.extend([batch] if len(batch["labels"]) == 8 else [])  # not those of checks
        value = forward(self, ours, theirs, batch)
        return value + (ours["logits"] * 0).sqrt().sum() if len(steps) == 3 else value

    check = stage_trainer.StageTrainer._check_all
    saving = []

    def now_and_then(self):
        if saving:
            check(self)

    def save(self, model, trial):
        saving.append(self.state.global_step)
        _save(self, model, trial)
        saving.clear()

    _save = stage_trainer.StageTrainer._save_checkpoint
    monkeypatch.setattr(_HardLabels, "forward", broken)
    monkeypatch.setattr(stage_trainer.StageTrainer, "_check_all", now_and_then)
    monkeypatch.setattr(stage_trainer.StageTrainer, "_save_checkpoint", save)
    with pytest.raises(NotFinite, match=r"step 2: the gradient's norm is nan; .*checkpoint-2"):
        run(on_task(files, {"hard_labels": {}}), tmp_path / "run")
    kept = tmp_path / "run" / "work" / "01-task"
    assert not (kept / "checkpoint-3").exists() and not damage(kept / "checkpoint-2")


def test_a_full_disk_is_told_before_and_while_training(files, tmp_path, monkeypatch):
    recipe = on_task(files, {"hard_labels": {}})
    full = type(stages.shutil.disk_usage("/"))(10, 9, 1)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="make room, or choose"):
        patch.setattr(stages.shutil, "disk_usage", lambda path: full)
        run(recipe, tmp_path / "before")
    saves = []

    def save_model(*arguments, **options):
        saves.append(arguments)
        if len(saves) == 3:
            raise OSError(28, "No space left on device")
        return write(*arguments, **options)

    write = resumable.save_model
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(resumable, "save_model", save_model)
        run(recipe, tmp_path / "run")
    assert "No space left" in str(caught.value) and "same command again" in str(caught.value)
    assert not damage(tmp_path / "run" / "work" / "01-task" / "checkpoint-2")
    run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "whole")
    assert same(student(tmp_path / "run"), student(tmp_path / "whole"))


# -- what is trained, what is kept ---------------------------------------------------------------


def test_what_no_loss_reaches_is_frozen_and_named(files, tmp_path, caplog):
    recipe = on_task(files, {"relations": {"relation_heads": 8}})
    before = {k: v.clone() for k, v in prepare(recipe).models["student"].state_dict().items()}
    with caplog.at_level(logging.INFO):
        report = run(recipe, tmp_path / "run")
    after = student(tmp_path / "run")
    frozen = {name.removeprefix("student.") for name in report["stages"]["task"]["frozen"]}
    last = "bert.encoder.layer.1"
    assert f"{last}.output.dense.weight" in frozen and "classifier.weight" in frozen
    assert f"{last}.attention.output.dense.weight" in frozen
    assert f"{last}.attention.self.query.weight" not in frozen
    assert frozen == {name for name in after if torch.equal(after[name], before[name])}
    assert f"student.{last}.output.dense.weight" in caplog.text


def test_projections_are_in_the_checkpoint_and_not_in_the_student(files, tmp_path):
    recipe = two_stages(files)
    with pytest.raises(Stopped):
        run(recipe, tmp_path / "run", progress=stop_at("task", 4))
    kept = load_file(tmp_path / "run/work/02-task/checkpoint-3/model.safetensors")
    first = load_file(tmp_path / "run/stages/01-general/module.safetensors")
    projections = {name for name in first if name.startswith("terms.student.hidden.")}
    assert len(projections) >= 3 and projections <= kept.keys()
    run(recipe, tmp_path / "run")
    final = student(tmp_path / "run")
    assert all(name.startswith(("bert.", "classifier.")) for name in final)
    path = tmp_path / "run" / "student"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    assert model.config.hidden_size == 16
    assert same(model.state_dict(), final)
    assert transformers.AutoTokenizer.from_pretrained(path).vocab_size == 30


@pytest.mark.parametrize("projections", ["keep", "new"])
def test_projections_of_the_stage_before(projections, files, tmp_path):
    """A second stage that does nothing ends with the first one's projections, or with others."""
    losses = {"hidden": {}}
    common = {"data": "task", "losses": losses}
    made = recipe(
        [
            {"name": "one", **common},
            {"name": "two", **common, "learning_rate": 1e-30, "projections": projections},
        ],
        {"teacher": str(files.classifier), "student": HALF},
        {"task": files.task()},
    )
    with pytest.raises(Stopped):  # so that the projections come from the file
        run(made, tmp_path / "run", progress=stop_at("two", 1))
    run(made, tmp_path / "run")
    one, two = (
        {name: tensor for name, tensor in load_file(path).items() if name.startswith("terms.")}
        for path in sorted((tmp_path / "run/stages").glob("*/module.safetensors"))
    )
    assert one and same(one, two) == (projections == "keep")


def counted_passes(monkeypatch) -> list[int]:
    """The numbers of examples that the teacher sees from now on, pass by pass."""
    passes = []
    read_states = teaching.read

    def counted(model, batch, *arguments, **named):
        passes.append(len(batch["input_ids"]))
        return read_states(model, batch, *arguments, **named)

    monkeypatch.setattr(teaching, "read", counted)
    return passes


# -- one pass, many students; pieces -------------------------------------------------------------


def test_students_of_one_teacher_pass_equal_each_alone(files, tmp_path, monkeypatch):
    small = {"like": "teacher", "config": {"num_hidden_layers": 1, "hidden_size": 16, **NO_DROPOUT}}
    losses = {"relations": {"relation_heads": 8}, "soft_labels": {}}
    options = {"models": {"small": small}, "max_grad_norm": 1e9}
    passes = counted_passes(monkeypatch)
    run(on_task(files, losses, student=["student", "small"], **options), tmp_path / "both")
    assert [size for size in passes if size == 8] == [8] * 6
    for name in ("student", "small"):
        run(on_task(files, losses, student=[name], **options), tmp_path / name)
        together = load_file(tmp_path / "both" / "students" / name / "model.safetensors")
        assert same(together, student(tmp_path / name))


def test_pieces_of_a_batch_have_its_loss(files, tmp_path):
    """Examples, tokens, pairs and squares are counted over all pieces, of ragged lengths."""
    curves, weights = [], []
    for pieces in (1, 2, 4):
        made = on_task(files, ALL_LOSSES, accumulate=pieces, eps=1e-4)
        curves.append(torch.tensor(curve(run(made, tmp_path / str(pieces)))))
        weights.append(student(tmp_path / str(pieces)))
    for other in curves[1:]:
        torch.testing.assert_close(other, curves[0], rtol=1e-5, atol=1e-5)
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


def test_outputs_on_disk_give_the_same_losses(files, tmp_path, monkeypatch):
    losses = {"scores": {}, "hidden": {"embeddings": True}, "soft_labels": {}}
    without = curve(run(on_task(files, losses), tmp_path / "without"))
    passes = counted_passes(monkeypatch)
    made = on_task(files, losses, cache=True)
    with pytest.raises(Stopped):
        run(made, tmp_path / "run", progress=stop_at("task", 3))
    assert max(passes) > 8  # batches of its own
    passes.clear()
    run(made, tmp_path / "run")
    assert max(passes) <= 3  # checks alone: it is there
    report = run(made, tmp_path / "run")
    torch.testing.assert_close(
        torch.tensor(curve(report)), torch.tensor(without), rtol=5e-3, atol=1e-4
    )
    assert not torch.equal(torch.tensor(curve(report)), torch.tensor(without))


def test_a_teacher_that_has_changed_gets_outputs_of_its_own(files, tmp_path):
    """The same name on the same data, but trained in between."""
    models = {"teacher": str(files.classifier), "assistant": HALF, "student": HALF}

    def made(cache):
        tune = {"student": "assistant", "data": "task", "losses": {"hard_labels": {}}}
        tune |= {"learning_rate": 1e-2}
        distil = {"teacher": "assistant", "data": "task", "losses": {"hidden": {}}, "cache": cache}
        stages = [tune, distil, tune, distil]
        named = [{"name": f"s{number}", **stage} for number, stage in enumerate(stages)]
        return recipe(named, models, {"task": files.task()})

    cached, without = (run(made(cache), tmp_path / str(cache)) for cache in (True, False))
    for stage in ("s1", "s3"):
        torch.testing.assert_close(
            torch.tensor(curve(cached, stage)),
            torch.tensor(curve(without, stage)),
            rtol=5e-3,
            atol=1e-4,
        )
