"""Shipped recipes from its first to its last stage, on tiny models: what each leaves behind."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_recipes import Files, Stopped, same, stop_at, student
from tiny_teacher import WORDS

import fastffn.models  # noqa: F401 - registers its models
from fastffn.distill import read, run
from fastffn.distill.recipe import shipped
from fastffn.distill.recipe_yaml import parse_file

SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}
SMALL_STUDENT = f"student.config={json.dumps(SMALL)}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("recipes") / "files")


def small(files, name: str, *given: str) -> list[str]:
    """Overrides that make any recipe run in a second."""
    recipe = parse_file(shipped()[name])[0]
    values = [*given]
    for stage in recipe["stages"]:
        key = f"stages.{stage['name']}"
        values += [f"{key}.steps=3", f"{key}.batch_size=8", f"{key}.warmup=0.1"]
    if "general" in recipe["data"]:
        values += [f"data.general.text={files.text}", "data.general.max_length=24"]
    if "task" in recipe["data"]:
        values += [f"data.task.task={json.dumps(files.task()['task'])}"]
        values += ["data.task.max_length=24"]
    return values


def student_of(out, auto: str = "AutoModelForSequenceClassification"):
    """The student as anybody would load it, with its tokenizer."""
    model = getattr(transformers, auto).from_pretrained(out / "student")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "student")
    outputs = model(**tokenizer(WORDS[0], return_tensors="pt"))
    assert all(torch.isfinite(x).all() for x in outputs.values() if torch.is_tensor(x))
    return model


def models_of(files) -> list[str]:
    return [f"models.pretrained={files.teacher}", f"models.finetuned={files.classifier}"]


ELASTIC = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_stack": 2,
    "max_width": 16,
    "embedding_size": 8,
    "max_position_embeddings": 32,
    "genes": ["2x1 down(gelu(up(x)))"] * 2,
}


def given_to(name: str, files) -> list[str]:
    """What a recipe needs beside its data."""
    teacher = [f"teacher={files.classifier}", "student.layers=2"]
    width = f"models.assistant.config={json.dumps({'hidden_size': 16, 'intermediate_size': 32})}"
    genes = json.dumps(["2x1/2 down(gelu(up(x)))", "1x1 tanh(down(gelu(up(x))))"])
    return {
        "finetune": [f"student={files.teacher}"],
        "soft-label": teacher,
        "theseus": teacher,
        "minilm": [f"teacher={files.teacher}", width, 'student.config={"num_hidden_layers": 2}'],
        "minilmv2": [
            f"teacher={files.teacher}",
            SMALL_STUDENT,
            "stages.general.losses.relations.relation_heads=8",
        ],
        "tinybert": [*models_of(files), SMALL_STUDENT],
        "ernie-tiny": [*models_of(files), SMALL_STUDENT],
        "efficientbert": [
            *models_of(files),
            f"models.supernet.supernet={json.dumps(ELASTIC)}",
            f"student.efficientbert={{from: supernet, genes: {genes}}}",
            "stages.warmup.subnetworks=3",
        ],
    }[name]


def test_finetune(files, tmp_path):
    report = run("finetune", tmp_path, small(files, "finetune", *given_to("finetune", files)))
    assert 0 <= report["metrics"]["student"]["accuracy"] <= 1
    assert student_of(tmp_path).config.id2label == {0: "low", 1: "high"}
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert read(tmp_path / "recipe.yaml").stages[0].steps == 3
    log = json.loads((tmp_path / "stages" / "01-task" / "log.json").read_text())
    assert [entry["step"] for entry in log] == [1, 2, 3] and "part/hard_labels" in log[0]
    assert list((tmp_path / "tensorboard" / "01-task").iterdir())
    assert not (tmp_path / "work").exists()


def test_soft_label(files, tmp_path):
    given = given_to("soft-label", files)
    report = run("soft-label", tmp_path, small(files, "soft-label", *given))
    parts = report["stages"]["task"]["curve"][0][2]
    assert set(parts) == {"soft_labels", "hard_labels"}
    assert student_of(tmp_path).config.num_hidden_layers == 2


def test_minilm_learns_from_its_assistant(files, tmp_path):
    report = run("minilm", tmp_path, small(files, "minilm", *given_to("minilm", files)))
    assert list(report["stages"]) == ["assistant", "general"]
    student = student_of(tmp_path, "AutoModel")
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (16, 2)
    # Of the last layer's attention and of nothing behind it.
    frozen = report["stages"]["general"]["frozen"]
    assert all(".layer.1." in name or ".pooler." in name or "student.pooler" in name
               for name in frozen)  # fmt: skip
    assert any(".layer.1.output." in name for name in frozen)
    assert not any("query" in name or "value" in name for name in frozen)


def test_minilmv2_with_a_multilingual_teacher(files, tmp_path):
    """A small random XLM-R: positions count from 2 there, and there are no segments."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", ".", *(f"▁{word}" for word in WORDS), *WORDS]
    vocabulary = [(piece, -float(k)) for k, piece in enumerate([*pieces, "<mask>"])]
    tokenizer = transformers.XLMRobertaTokenizer(vocab=vocabulary)
    config = transformers.XLMRobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=26,
        type_vocab_size=1,
        **(SMALL | {"num_hidden_layers": 4, "num_attention_heads": 4}),
    )
    teacher = tmp_path / "xlm-r"
    torch.manual_seed(2)
    transformers.XLMRobertaModel(config).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    given = [
        f"teacher={teacher}",
        SMALL_STUDENT,
        "stages.general.losses.relations.relation_heads=8",
    ]
    report = run("minilmv2", tmp_path / "run", small(files, "minilmv2", *given))
    assert type(student_of(tmp_path / "run", "AutoModel")).__name__ == "XLMRobertaModel"
    curve = report["stages"]["general"]["curve"]
    assert curve[-1][1] < curve[0][1] or curve[-1][1] < 1


def test_theseus_gives_a_plain_model_of_its_class(files, tmp_path):
    run("theseus", tmp_path, small(files, "theseus", *given_to("theseus", files)))
    model = student_of(tmp_path)
    assert type(model) is transformers.BertForSequenceClassification
    assert model.config.num_hidden_layers == 2 == len(model.bert.encoder.layer)


@pytest.mark.parametrize("without", [None, "gd", "ged", "tad", "tsd"])
def test_ernie_tiny_and_its_ablation(files, tmp_path, without):
    given = given_to("ernie-tiny", files)
    if without:
        given.append(f"stages.{without}.enabled=false")
    report = run("ernie-tiny", tmp_path, small(files, "ernie-tiny", *given))
    expected = [name for name in ("gd", "ged", "tad", "tsd") if name != without]
    assert list(report["stages"]) == expected
    assert student_of(tmp_path).config.hidden_size == 16
    names = {name for name in report["stages"][expected[-1]]["curve"][0][2]}
    latent = {"scores", "hidden"}
    assert names == (latent if without == "tsd" else latent | {"soft_labels", "hard_labels"})


def test_tinybert(files, tmp_path):
    report = run("tinybert", tmp_path, small(files, "tinybert", *given_to("tinybert", files)))
    assert list(report["stages"]) == ["general", "intermediate", "prediction"]
    assert "accuracy" in report["metrics"]["student"]


def test_efficientbert_cuts_its_student_from_the_supernet_that_was_trained(files, tmp_path):
    overrides = small(files, "efficientbert", *given_to("efficientbert", files))
    report = run("efficientbert", tmp_path, overrides)
    assert list(report["stages"]) == ["warmup", "general", "task"]
    model = student_of(tmp_path)
    assert type(model).__name__ == "EfficientBertForSequenceClassification"
    assert model.config.supernet is None and len(model.config.genes) == 2
    # Without steps of its own the student is what the warm-up left, not what it began with.
    still = [f"stages.{name}.learning_rate=1e-30" for name in ("general", "task")]
    decay = [f"stages.{name}.weight_decay=0" for name in ("general", "task")]
    run("efficientbert", tmp_path / "still", [*overrides, *still, *decay])
    word = "efficientbert.embeddings.word_embeddings.weight"
    warm = load_file(tmp_path / "still" / "stages" / "01-warmup" / "module.safetensors")
    last = load_file(tmp_path / "still" / "student" / "model.safetensors")
    assert torch.equal(warm[f"students.supernet.{word}"], last[word])


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_interrupted_in_every_stage_ends_with_the_same_bits(name, files, tmp_path):
    overrides = small(files, name, *given_to(name, files), "checkpoint_seconds=0.000001")
    whole = run(name, tmp_path / "whole", overrides)
    for stage in whole["stages"]:
        with pytest.raises(Stopped):
            run(name, tmp_path / "run", overrides, progress=stop_at(stage, 2))
    resumed = run(name, tmp_path / "run", overrides)
    assert same(student(tmp_path / "run"), student(tmp_path / "whole"))
    for stage, expected in whole["stages"].items():
        assert resumed["stages"][stage]["curve"] == expected["curve"]
