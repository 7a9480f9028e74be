"""What a recipe's run checks before its first step, and what it takes from an earlier run."""

import gc
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_recipes import TRAIN, Files, recipe, same, student, two_stages
from tiny_teacher import WORDS

from fastffn.data.encode import encode_text
from fastffn.data.text import read_documents
from fastffn.distill import run
from fastffn.distill.preparation import HELD_OUT, prepare
from fastffn.distill.stages import StageRun
from fastffn.errors import UserError
from fastffn.rundir import RunDirectory


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("preparation") / "files")


def on_task(files, **stage):
    stage = {"name": "task", "data": "task", "losses": {"hard_labels": {}}} | stage
    models = {"teacher": str(files.classifier), "student": {"layers_of": "teacher", "layers": 2}}
    return recipe([stage], models, {"task": files.task()})


def no_training(monkeypatch):
    def train(*_):
        raise AssertionError("training has begun")

    monkeypatch.setattr(StageRun, "train", train)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 7, "accumulate": 2}, "batch_size 7 does not divide"),
        ({"batch_size": 64, "accumulate": 2}, r"more than the \d+ rows"),
        ({"freeze": ["encoder.layers"]}, "starts with 'encoder.layers': use layers, embeddings"),
        ({"freeze": ["layers", "embeddings", "head", "bert.pooler"]}, "nothing is left to train"),
        ({"losses": {"half": {"kind": "hard_labels"}}}, "cannot be called half"),
    ],
)
def test_mistakes_of_the_last_stage_are_told_before_the_first(
    files, tmp_path, monkeypatch, changes, message
):
    no_training(monkeypatch)
    stages = [
        {"name": "first", "data": "task", "losses": {"hard_labels": {}}},
        {"name": "second", "data": "task", "losses": {"hard_labels": {}}} | changes,
    ]
    models = {"teacher": str(files.classifier), "student": {"layers_of": "teacher", "layers": 2}}
    with pytest.raises(UserError, match=message) as caught:
        run(recipe(stages, models, {"task": files.task()}), tmp_path / "run")
    assert "\n" not in str(caught.value) and "second" in str(caught.value)


def test_scores_that_are_not_products_are_refused_before_training(files, tmp_path, monkeypatch):
    no_training(monkeypatch)
    config = transformers.MPNetConfig(
        vocab_size=len(WORDS) + 6,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        pad_token_id=0,
    )
    teacher = tmp_path / "mpnet"
    transformers.MPNetModel(config).save_pretrained(teacher)
    transformers.AutoTokenizer.from_pretrained(files.teacher).save_pretrained(teacher)
    stages = [{"name": "general", "data": "general", "losses": {"scores": {}}}]
    models = {"teacher": str(teacher), "student": {"layers_of": "teacher", "layers": 1}}
    data = {"general": {"text": str(files.text), "max_length": 24}}
    with pytest.raises(UserError, match="bias for relative positions"):
        run(recipe(stages, models, data), tmp_path / "run")


def test_a_limit_takes_some_sequences_of_text(files):
    stages = [{"name": "general", "data": "general", "losses": {"hidden": {}}}]
    models = {"teacher": str(files.teacher), "student": {"layers_of": "teacher", "layers": 2}}

    def sequences(limit):
        data = {"general": {"text": str(files.text), "max_length": 24, "limit": limit}}
        return prepare(recipe(stages, models, data)).data["general"].train

    assert len(sequences(10)) == 10
    assert sequences(10).fingerprint == sequences(10).fingerprint != sequences(11).fingerprint
    tokenizer = transformers.AutoTokenizer.from_pretrained(files.teacher)
    every = encode_text(tokenizer, read_documents([files.text]), 24)
    rows = {tuple(row) for row in np.split(every.tokens, every.offsets[1:-1])}
    few = sequences(10)
    assert {tuple(row) for row in np.split(few.tokens, few.offsets[1:-1])} <= rows


def test_held_out_rows_are_not_trained_on(files):
    def made_with(**data):
        stages = [{"name": "task", "data": "task", "losses": {"hard_labels": {}}}]
        models = {
            "teacher": str(files.classifier),
            "student": {"layers_of": "teacher", "layers": 2},
        }
        return prepare(recipe(stages, models, {"task": files.task() | data})).data["task"]

    def rows(encoded):
        return sorted(
            tuple(encoded.batch([k])["input_ids"][0].tolist()) for k in range(len(encoded))
        )

    whole, data = made_with(), made_with(hold_out=9)
    assert (len(data.train), len(data.held_out)) == (TRAIN - 9, 9)
    assert sorted(rows(data.train) + rows(data.held_out)) == rows(whole.train)
    for split, encoded in (("train", data.train), (HELD_OUT, data.held_out)):
        examples = data.task.splits[split]
        assert encoded.batch(range(len(encoded)))["labels"].tolist() == list(examples.labels)
    assert data.fingerprint != whole.fingerprint
    with pytest.raises(UserError, match=f"hold_out {TRAIN} leaves none of the {TRAIN} rows"):
        made_with(hold_out=TRAIN)


def test_data_of_one_name_are_in_one_vocabulary(files, tmp_path):
    """Stages whose models number the same words otherwise would train on each other's ids."""
    other = tmp_path / "other"
    shutil.copytree(files.teacher, other)
    for name in ("tokenizer.json", "vocab.txt"):
        (other / name).unlink(missing_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *reversed(WORDS)]
    (other / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizer(str(other / "vocab.txt")).save_pretrained(other)
    stages = [
        {"name": name, "student": name, "data": "task", "losses": {"hard_labels": {}}}
        for name in ("one", "two")
    ]
    models = {"one": str(files.teacher), "two": str(other)}
    with pytest.raises(UserError, match="another tokenizer a name of their own"):
        prepare(recipe(stages, models, {"task": files.task()}))


def test_a_model_of_one_segment_is_judged_with_a_tokenizer_that_marks_two(files, tmp_path):
    model = transformers.BertModel.from_pretrained(files.teacher)
    model.config.type_vocab_size = 1
    table = model.embeddings.token_type_embeddings
    table.weight = torch.nn.Parameter(table.weight[:1].detach().clone())
    model.save_pretrained(tmp_path / "teacher")
    transformers.AutoTokenizer.from_pretrained(files.teacher).save_pretrained(tmp_path / "teacher")
    lines = (files.folder / "train.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t")[0] + f"\tbara\t{k % 2}" for k, line in enumerate(lines)]
    table = tmp_path / "pairs.tsv"
    table.write_text("\n".join(["a\tb\tlabel", *rows]) + "\n")
    task = {"name": "pairs", "kind": "classification", "texts": ["a", "b"], "label": "label"}
    task |= {"train": str(table), "validation": str(table)}
    stages = [{"name": "task", "data": "task", "losses": {"hard_labels": {}}}]
    data = {"task": {"task": task, "max_length": 24}}
    report = run(recipe(stages, {"student": str(tmp_path / "teacher")}, data), tmp_path / "run")
    assert 0 <= report["metrics"]["student"]["accuracy"] <= 1


# -- what a run takes over -----------------------------------------------------------------------


def interrupted(what, out, monkeypatch, stage="task"):
    """Runs until the stage's students are judged."""

    class Stop(Exception):
        pass

    def stop(*_, **__):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("fastffn.distill.stages.evaluate", stop)
        with pytest.raises(Stop):
            run(what, out)


def test_judging_that_fails_costs_no_training(files, tmp_path, monkeypatch):
    what = on_task(files)
    run(what, tmp_path / "whole")
    interrupted(what, tmp_path / "run", monkeypatch)
    assert list((tmp_path / "run" / "work" / "01-task").glob("checkpoint-*"))
    steps = []
    run(what, tmp_path / "run", progress=lambda phase, done, *_: steps.append((phase, done)))
    assert [done for phase, done in steps if phase == "task"] == [6]
    assert same(student(tmp_path / "whole"), student(tmp_path / "run"))


@pytest.mark.parametrize("how", ["cut", "altered", "missing"])
def test_a_damaged_stage_is_trained_again(files, tmp_path, monkeypatch, caplog, how):
    what = two_stages(files)
    run(what, tmp_path / "whole")
    interrupted(what, tmp_path / "run", monkeypatch)
    weights = tmp_path / "run" / "stages" / "01-general" / "module.safetensors"
    content = bytearray(weights.read_bytes())
    if how == "cut":
        weights.write_bytes(content[: len(content) // 2])
    elif how == "altered":
        content[-1] ^= 1
        weights.write_bytes(content)
    else:
        weights.unlink()
    run(what, tmp_path / "run")
    assert "the stage is trained again" in caplog.text
    assert same(student(tmp_path / "whole"), student(tmp_path / "run"))


def test_another_teacher_under_the_same_name_is_refused(files, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher"
    shutil.copytree(files.classifier, teacher)
    stage = {"name": "task", "data": "task", "losses": {"soft_labels": {}}}
    models = {"teacher": str(teacher), "student": {"layers_of": "teacher", "layers": 2}}
    what = recipe([stage], models, {"task": files.task()})
    interrupted(what, tmp_path / "run", monkeypatch)
    weights = load_file(teacher / "model.safetensors")
    weights = {name: x * 1.5 for name, x in weights.items()}
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^teacher is not what the run in .* began with"):
        run(what, tmp_path / "run")


def test_one_process_at_a_time_works_in_a_directory(files, tmp_path, monkeypatch):
    held = tmp_path / "run"
    what = on_task(files)
    interrupted(what, held, monkeypatch)
    code = (
        "import fcntl, sys, time\n"
        f"file = open({str(held / '.lock')!r}, 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process works in"):
            run(what, held)
        other.stdin.close()
    run(what, held)


def test_seconds_and_curve_cover_what_an_interrupted_run_did(files, tmp_path, monkeypatch):
    what = on_task(files, steps=12)
    whole = run(what, tmp_path / "whole")["stages"]["task"]
    interrupted(what, tmp_path / "run", monkeypatch)
    resumed = run(what, tmp_path / "run")["stages"]["task"]
    assert [point[0] for point in resumed["curve"]] == [point[0] for point in whole["curve"]]
    assert resumed["curve"][-1][0] == 12
    # One step was left to do; the time of the others came from the checkpoint.
    assert resumed["seconds_by_part"]["student"] > 0
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["phases"]["01-task"]["seconds"] >= resumed["seconds_by_part"]["student"]


def test_checking_a_later_stage_leaves_a_supernet_as_it_was(files, tmp_path):
    """Sub-networks of the check must not be what an earlier stage trains."""
    genes = ["2x1 down(gelu(up(x)))"] * 2
    size = {"max_stack": 2, "max_width": 24, "genes": genes, "layers": 2}
    models = {"teacher": str(files.teacher), "student": {"supernet": {"from": "teacher", **size}}}
    plain = {"name": "plain", "data": "general", "losses": {"hidden": {}}}
    data = {"general": {"text": str(files.text), "max_length": 24}}
    alone = run(recipe([plain], models, data), tmp_path / "alone")
    both = [plain, plain | {"name": "sand", "subnetworks": 3}]
    together = run(recipe(both, models, data), tmp_path / "both")
    first = together["stages"]["plain"]
    assert first["curve"] == alone["stages"]["plain"]["curve"]
    assert first["frozen"] == alone["stages"]["plain"]["frozen"]


def test_a_stages_optimiser_does_not_outlive_it(files, tmp_path):
    stages = [
        {"name": f"s{k}", "data": "task", "losses": {"hard_labels": {}}, "steps": 2}
        for k in range(3)
    ]
    models = {"student": str(files.classifier)}
    alive = []

    def count(phase, done, total, text):
        if phase.startswith("s") and done == total:
            alive.append(sum(isinstance(x, torch.optim.AdamW) for x in gc.get_objects()))

    run(recipe(stages, models, {"task": files.task()}), tmp_path, progress=count)
    assert alive[0] == alive[1] == alive[2]


def test_a_run_that_another_process_finished_meanwhile_is_not_overwritten(tmp_path):
    early, late = (RunDirectory(tmp_path, {"a": 1}) for _ in range(2))
    early.phase("data", lambda: {})
    early.finish({"found": 1})
    with pytest.raises(UserError, match="has worked in"):
        late.phase("data", lambda: {})
    assert RunDirectory(tmp_path, {"a": 1}).report == {"found": 1}


def test_time_for_cached_outputs_is_told(files, tmp_path):
    stage = {"name": "task", "data": "task", "losses": {"soft_labels": {}}, "cache": True}
    models = {"teacher": str(files.classifier), "student": {"layers_of": "teacher", "layers": 2}}
    report = run(recipe([stage], models, {"task": files.task()}), tmp_path)["stages"]["task"]
    assert 0 < report["seconds_by_part"]["cached outputs"] < report["seconds"]
