"""The shipped search recipes, made tiny, from the command line to the student's recipe."""

import json

import pytest
from tiny_recipes import Files

from fastffn.cli import main
from fastffn.distill import recipe as distillation
from fastffn.search import recipe
from fastffn.search.export import read_genes

pytestmark = pytest.mark.usefixtures("loud_again")

STAGES = ("coarse", "middle", "fine")
SMALL_STAGES = ("warmup", "proxy", "shared")  # of distillation, in the small recipes
SUPERNET = "models.supernet.supernet"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return Files(tmp_path_factory.mktemp("tiny") / "files")


def given(files: Files, name: str) -> dict[str, object]:
    """What a recipe asks for, and a supernet of the tiny teacher's size."""
    task = files.task() | {"limit": None}
    general = {"text": str(files.text), "max_length": 24, "limit": 40}
    heads = {f"stages.{stage}.losses.relations.relation_heads": 8 for stage in SMALL_STAGES}
    layers = {f"{SUPERNET}.layers": 2, f"{SUPERNET}.max_width": 48}
    published = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "embedding_size": 8,
        "max_width": 24,
        "vocab_size": 200,
        "genes": ["4x1 down(gelu(up(x)))"] * 2,
    }
    return {
        "small": {"teacher": files.teacher, **of("data.general", general), **layers, **heads},
        "small-task": {"teacher": files.classifier, **of("data.task", task), **layers},
        "efficientbert-search": {
            "models.pretrained": files.teacher,
            "models.finetuned": files.classifier,
            **of("data.general", general),
            **of("data.tenth", task),
            **of("data.task", task),
            **of(SUPERNET, published),
        },
    }[name]


def of(path: str, values: dict) -> dict[str, object]:
    return {f"{path}.{key}": value for key, value in values.items()}


def words(values: dict[str, object]) -> list[str]:
    return [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]


@pytest.mark.parametrize("name", recipe.shipped())
def test_a_shipped_recipe_ends_with_a_student_to_distil(name, files, tmp_path, capsys):
    values = given(files, name) | {"space.params": None}
    for stage in recipe.read(name, words(values)).distil.stages:
        values |= of(f"stages.{stage.name}", {"steps": 2, "batch_size": 8})
    for stage in STAGES:
        values |= of(f"search.{stage}", {"trials": 4, "random": 2, "score.rows": 8})
    assert main(["search", name, *words(values), "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert all(f"stage {stage}: 4 candidates in " in printed for stage in STAGES)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    genes = [str(gene) for gene in read_genes(tmp_path / "run" / "genes.yaml")]
    assert genes == report["genes"] and len(genes) == 2
    for layer, gene in enumerate(genes):
        assert f"  layer {layer}: {gene}\n" in printed
    student = distillation.read(tmp_path / "run" / "student.yaml").models["student"]
    assert student.efficientbert["genes"] == genes
    if name == "efficientbert-search":  # the share of rows that are right, of eight
        assert {8 * record["quality"] % 1 for record in report["candidates"]} == {0}


def test_what_is_loaded_must_be_a_supernet(files, tmp_path, capsys):
    values = given(files, "small")
    values = {key: value for key, value in values.items() if not key.startswith(SUPERNET)}
    values |= {"models.supernet": {"load": files.teacher}}
    values |= {f"stages.{stage}.subnetworks": None for stage in ("warmup", "shared")}
    assert main(["search", "small", *words(values), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: models.supernet.load: {files.teacher} is no supernet: give")
    assert not (tmp_path / "run").exists()
