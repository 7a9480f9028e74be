"""What a search leaves: gene file, configuration, a recipe that reads; the genes in the package."""

import json
import subprocess
import sys

import pytest
from search_report_example import example

from fastffn.distill import recipe as distillation
from fastffn.errors import UserError
from fastffn.expr import found_genes
from fastffn.expr.found import FoundGenes
from fastffn.search import export
from fastffn.search.recipe import SearchRecipe

LOSSES = {"hidden": {"layer_map": "uniform"}}


def _search_recipe(train: bool = True) -> SearchRecipe:
    stage = {"data": "general", "losses": LOSSES, "steps": 20, "learning_rate": 1e-3}
    stages = [{"name": "warmup", "student": "supernet", "subnetworks": 4, **stage}]
    if train:
        stages.append({"name": "proxy", "student": "candidate", **stage})
    named = {"train": ["proxy"]} if train else {}
    scored = {"metric": "loss", "stage": "proxy" if train else "warmup", "rows": 10}
    search = {"name": "coarse", "trials": 4, "supernet": ["warmup"], "score": scored, **named}
    shape = {"from": "teacher", "layers": 3, "max_stack": 4, "max_width": 384}
    return SearchRecipe.from_mapping(
        {
            "name": "tiny",
            "teacher": "TEACHER",
            "models": {"supernet": {"supernet": shape}, "unused": {"load": "NOWHERE"}},
            "data": {"general": {"text": ["a.txt"]}, "other": {"text": ["b.txt"]}},
            "stages": stages,
            "space": {"params": 9_000_000},
            "search": [search],
        }
    )


def _config(**changes) -> dict:
    from fastffn.models import EfficientBertConfig

    genes = ["4x1 down(gelu(up(x)))"] * 3
    size = {"max_stack": 4, "max_width": 384}
    values = {"hidden_size": 384, "num_hidden_layers": 3, "genes": genes, "supernet": size}
    return EfficientBertConfig(**values, **changes).to_dict()


def test_the_gene_file_is_read_back_with_its_conditions(tmp_path):
    report = example(latency=True)
    (path,) = export.export(report, tmp_path / "new")
    assert path.name == "genes.yaml"
    assert [str(gene) for gene in export.read_genes(path)] == report["genes"]
    found = export.read_found(path)
    assert found.name == "example" and found.hidden_size == 384 and found.base == 1
    best = report["best"]
    for key in ("quality", "params", "macs", "latency", "stage"):
        assert found.conditions[key] == best[key], key
    assert found.conditions["space"] == report["space"]
    assert found.conditions["versions"] == report["versions"]
    assert found.conditions["candidates"] == 48


def test_the_configuration_is_a_plain_model_of_the_genes(tmp_path):
    from fastffn.models import EfficientBertConfig, EfficientBertModel

    report = example(layers=3)
    export.export(report, tmp_path, _config(vocab_size=99, embedding_size=16))
    config = EfficientBertConfig.from_pretrained(tmp_path)
    assert config.supernet is None and config.vocab_size == 99
    assert config.genes == report["genes"]
    model = EfficientBertModel(config)
    assert str(model.encoder.layer[0].ffn.gene) == report["genes"][0]


def test_the_student_is_cut_out_of_the_trained_supernet(tmp_path):
    report = {**example(), "supernet": "runs/tiny/supernets/coarse/student"}
    export.export(report, tmp_path, distil=_search_recipe().distil)
    recipe = distillation.read(tmp_path / "student.yaml")
    assert recipe.name == "tiny-student" and "raise" in recipe.description
    assert {"teacher", "student", "supernet"} == set(recipe.models)
    assert recipe.models["supernet"].load == report["supernet"]
    assert recipe.models["student"].efficientbert == {"from": "supernet", "genes": report["genes"]}
    assert [(s.name, s.student, s.steps) for s in recipe.stages] == [("proxy", ("student",), 20)]
    assert set(recipe.data) == {"general"}


def test_a_winner_of_fewer_layers_names_those_of_the_supernet(tmp_path):
    report = {**example(layers=2), "supernet": "DIR"}
    export.export(report, tmp_path, _config(), _search_recipe().distil)
    recipe = distillation.read(tmp_path / "student.yaml")
    assert recipe.models["student"].efficientbert["layers"] == [0, 2]
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 2


def test_without_a_supernet_the_recipe_trains_one():
    recipe = export.student_recipe(example(), _search_recipe().distil)
    assert recipe.models["supernet"].supernet["max_stack"] == 4
    named = [(stage.name, stage.student[0], stage.subnetworks) for stage in recipe.stages]
    assert named == [("warmup", "supernet", 4), ("proxy", "student", None)]


def test_a_one_shot_search_trains_the_student_like_its_supernet(tmp_path):
    distil = _search_recipe(train=False).distil
    recipe = export.student_recipe({**example(), "supernet": "DIR"}, distil)
    assert [(s.name, s.student[0], s.subnetworks) for s in recipe.stages] == [
        ("warmup", "student", None)
    ]
    recipe = export.student_recipe(example(), distil)
    assert [s.name for s in recipe.stages] == ["warmup", "student-warmup"]
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert distillation.read(tmp_path / "again.yaml") == recipe


def test_a_search_without_a_winner_has_nothing_to_export(tmp_path):
    report = {**example(), "genes": [], "best": None}
    with pytest.raises(UserError, match="search example: no candidate is finished"):
        export.export(report, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, message",
    [
        ("- a\n", "no mapping"),
        ("name: a\ngenes: []\nbase: 1\n", "hidden_size is missing"),
        ("name: a\nhidden_size: 8\nbase: 1\ngenes: []\n", "there are none"),
        ("name: a\nhidden_size: 8\nbase: 1\ngenes: [3]\n", "a list of texts"),
        ("name: a\nhidden_size: x\nbase: 1\ngenes: [a]\n", "positive integers"),
        ("name: a\nhidden_size: 8\nbase: 1\ngenes: ['1x1 up(x)']\n", "down"),
    ],
)
def test_a_wrong_gene_file_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "genes.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        export.read_genes(path)


def test_a_missing_gene_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read"):
        export.read_genes(tmp_path / "nowhere.yaml")


# -- the genes in the package --------------------------------------------------------------------


def test_every_file_of_the_package_reads_and_fits_its_width():
    for name, found in found_genes().items():
        assert found.genes and "quality" in found.conditions, name
        assert FoundGenes.from_mapping(json.loads(found.to_json()), name) == found


def test_an_exported_file_becomes_one_of_the_package(tmp_path, monkeypatch):
    from fastffn.expr import found as package

    export.export(example(), tmp_path)
    text = export.read_found(tmp_path / "genes.yaml").to_json()
    (tmp_path / "small.json").write_text(text)
    monkeypatch.setattr(package, "_FOLDER", tmp_path)
    known = package.found_genes.__wrapped__()
    assert list(known) == ["small"]
    assert known["small"].texts == example()["genes"]
    with pytest.raises(TypeError):
        known["small"].conditions["quality"] = 2


def test_found_genes_need_neither_torch_nor_yaml():
    code = (
        "import sys\n"
        "for name in ('yaml', 'transformers'): sys.modules[name] = None\n"
        "from fastffn.expr import found_genes\n"
        "found_genes()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
