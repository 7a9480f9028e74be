"""`fastffn evaluate` and `fastffn export`: from the command line to a table."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny_models import classifier, tokenizer
from tiny_teacher import WORDS, save_teacher, write_text

import fastffn
from fastffn import cli, serve

pytestmark = pytest.mark.usefixtures("loud_again")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier with a tokenizer, its task, and a BERT."""
    folder = tmp_path_factory.mktemp("models")
    words = tokenizer(folder / "words")
    fastffn.export(classifier(), folder / "model", tokenizer=words)
    texts = [f"{a} {b} ." for a in WORDS[:6] for b in WORDS[6:12]]
    said = serve.load(folder / "model").encode(texts).argmax(-1).tolist()
    said[:9] = [1 - label for label in said[:9]]  # a quarter is wrong
    rows = [f"{text}\t{('bad', 'good')[label]}" for text, label in zip(texts, said, strict=True)]
    (folder / "own.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    task = "kind: classification\ntexts: [text]\nlabel: label\nlabels: [bad, good]\n"
    (folder / "mine.yaml").write_text(task + "validation: own.tsv\n")
    (folder / "turned.yaml").write_text(
        task.replace("[bad, good]", "[good, bad]") + "validation: own.tsv\n"
    )
    save_teacher(folder / "teacher")
    return folder


def run(*words):
    return cli.main([str(word) for word in words])


def test_a_task_of_ones_own(folder, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert run("evaluate", folder / "model", "--task", folder / "mine.yaml", "--json", out) == 0
    said, head, row = capsys.readouterr().out.splitlines()
    assert said.startswith("mine, validation: 36 examples of ")
    assert head.split() == ["model", "format", "accuracy", "MB", "seconds"]
    assert row.split()[:3] == [str(folder / "model"), "safetensors", "0.7500"]
    found = json.loads(out.read_text())
    assert (found["task"], found["split"], found["examples"]) == ("mine", "validation", 36)
    (model,) = found["models"]
    assert model["metrics"] == {"accuracy": 0.75} and model["quantize"] is None
    assert model["bytes"] == sum(p.stat().st_size for p in (folder / "model").iterdir())


def test_exports_score_the_same(folder, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "int8"
    assert run("export", folder / "model", "--out", out, "--int8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{out}: onnx, opset ") and lines[0].endswith(" MB")
    assert lines[1] == "  input_ids, attention_mask, token_type_ids -> logits"
    assert lines[2].startswith("  checked: its outputs differ from the model's by ")
    assert "then int8 against float32, on random tokens: cosine 0.9" in lines[3]
    words = ["--task", folder / "mine.yaml", "--limit", 20, "--batch-size", 3, "--threads", 1]
    assert run("evaluate", folder / "model", out, *words) == 0
    _, _, plain, rounded = capsys.readouterr().out.splitlines()
    assert rounded.split()[1:3] == ["onnx", "int8"]
    assert abs(float(plain.split()[2]) - float(rounded.split()[3])) <= 0.05


def test_retention_of_a_teacher(folder, tmp_path, capsys):
    text = write_text(tmp_path / "text.txt", sentences=60)
    out = folder / "vectors"
    words = ["--format", "sentence-transformers", "--pooling", "mean", "--normalize"]
    assert run("export", folder / "teacher", "--out", out, *words) == 0
    assert "input_ids, attention_mask, token_type_ids -> last_hidden_state, sentence" in (
        capsys.readouterr().out
    )
    given = ["--teacher", folder / "teacher", "--text", text, "--limit", 40]
    assert run("evaluate", out, *given) == 0
    said, head, row = capsys.readouterr().out.splitlines()
    assert said == f"40 sentences, against {folder / 'teacher'}"
    assert head.split()[2:5] == ["spearman", "top1", "top10"]
    assert row.split()[1:5] == ["sentence-transformers", "1.0000", "1.0000", "1.0000"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model", "--task", "turned.yaml"], "has the classes of turned in another order: bad, go"),
        (["teacher", "--task", "mine.yaml"], "is a model for embedding, mine is a task of classif"),
        (["model", "--task", "sst3"], "task 'sst3' is unknown: choose from"),
        (["model", "--task", "mine.yaml", "--limit", "0"], "--limit: 0 is no positive number"),
        (["model", "--task", "mine.yaml", "--max-length", "99"], "99 tokens, "),
        (["model", "--task", "mine.yaml", "--text", "a"], "--text is of --teacher: leave it out"),
        (["model", "--teacher", "teacher"], "--teacher: give --text FILE"),
        (["teacher", "--teacher", "model", "--text", "own.tsv"], "is a model for sequence-classif"),
        (["model"], "one of the arguments --task --teacher is required"),
        (["nowhere/", "--task", "mine.yaml"], "model nowhere/ is no directory"),
    ],
)
def test_bad_requests_are_one_line(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("fastffn.distill.teacher._snapshot", lambda *_, **__: None)
    try:
        status = run("evaluate", *words)
    except SystemExit as left:  # by argparse
        status = left.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and len(error.splitlines()) == 1


def test_export_is_refused_in_one_line(folder, capsys, tmp_path):
    words = ["--out", tmp_path / "out", "--format", "torch-export", "--int8"]
    assert run("export", folder / "model", *words) == 2
    assert capsys.readouterr().err == "error: --int8 is of --format onnx\n"


@pytest.mark.data
@pytest.mark.slow
def test_int8_is_within_a_point_on_sst2(tmp_path):
    """A head on the vectors of all-MiniLM-L6-v2 in float32 scores as well on those of int8."""
    pytest.importorskip("onnxscript")
    from sklearn.linear_model import LogisticRegression

    from fastffn.data.tasks import load_task

    name = "sentence-transformers/all-MiniLM-L6-v2"
    data = load_task("sst2", limit={"train": 2000}).splits
    exact = serve.load(fastffn.export(name, tmp_path / "exact", "onnx"))
    rounded = serve.load(fastffn.export(name, tmp_path / "int8", "onnx", quantize="int8"))
    train, held = data["train"], data["validation"]
    head = LogisticRegression(max_iter=1000).fit(exact.encode(train.first).numpy(), train.labels)
    scores = [head.score(s.encode(held.first).numpy(), held.labels) for s in (exact, rounded)]
    assert scores[0] > 0.75 and abs(scores[0] - scores[1]) <= 0.01, scores


def test_commands_of_the_page_exist():
    page = (Path(__file__).parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    fastffn ((?:export|evaluate) [^#\n]*)", page, re.M)
    assert len(commands) >= 7
    for command in commands:
        cli._parser().parse_args(shlex.split(command))  # leaves if one is wrong


def test_a_regression_is_told_by_its_one_output(tmp_path):
    model = classifier(labels=("score",))
    served = serve.load(fastffn.export(model, tmp_path / "model"))
    assert served.task == "regression"
    assert served(input_ids=torch.full((3, 4), 7))["logits"].shape == (3, 1)
