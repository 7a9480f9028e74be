"""The shipped recipes: what they need, that they say what papers say, that they are installed."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from fastffn import UserError
from fastffn.distill.recipe import Recipe, read, shipped

GIVEN = {
    "models": ["models.pretrained=P", "models.finetuned=F"],
    "teacher": ["teacher=T"],
    "student": ["student=S"],
    "general": ["data.general.text=a.txt"],
    "task": ["data.task.task=sst2"],
}
NEEDS = {
    "efficientbert": ("models", "general", "task"),
    "ernie-tiny": ("models", "general", "task"),
    "finetune": ("student", "task"),
    "minilm": ("teacher", "general"),
    "minilmv2": ("teacher", "general"),
    "soft-label": ("teacher", "task"),
    "theseus": ("teacher", "task"),
    "tinybert": ("models", "general", "task"),
}


def ready(name: str, *overrides: str) -> Recipe:
    return read(name, [*(text for part in NEEDS[name] for text in GIVEN[part]), *overrides])


def test_every_shipped_recipe_is_known_here():
    assert list(shipped()) == list(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_a_shipped_recipe_needs_what_it_says_and_nothing_else(name):
    found = ready(name)
    assert found.name == name and len(found.description) > 100
    assert Recipe.from_mapping(found.to_mapping()) == found
    with pytest.raises(UserError) as error:
        read(name)
    message = str(error.value)
    assert message.startswith(f"{shipped()[name]}:")
    words = message.partition(": give ")[2].split()
    assert read(name, [word.replace("=TASK", "=sst2") for word in words]).name == name


@pytest.mark.parametrize("name", NEEDS)
def test_a_shipped_recipe_can_be_made_small(name):
    names = [stage.name for stage in ready(name).stages]
    small = ready(name, *(f"stages.{stage}.steps=2" for stage in names))
    assert [(stage.steps, stage.epochs) for stage in small.stages] == [(2, None)] * len(names)


def test_minilm_with_and_without_its_assistant():
    assistant, general = ready("minilm").stages
    assert (assistant.teacher, assistant.student) == ("teacher", ("assistant",))
    assert (general.teacher, general.student) == ("assistant", ("student",))
    models = ready("minilm").models
    assert "num_hidden_layers" not in models["assistant"].config  # as deep as the teacher
    assert models["student"].parent == "assistant"  # and so as wide
    for stage in (assistant, general):
        options = stage.losses["relations"].options
        assert (options.relations, options.relation_heads) == (("qk", "vv"), 0)
        assert (stage.steps, stage.batch_size, stage.warmup) == (400_000, 256, 0.01)
    off = ["stages.assistant.enabled=false"]
    with pytest.raises(UserError, match="enable stage assistant"):
        ready("minilm", *off)
    off += ["stages.general.teacher=teacher", "student={layers_of: teacher, layers: 3}"]
    alone = ready("minilm", *off)
    assert [stage.teacher for stage in alone.enabled] == ["teacher"]


def test_minilmv2_has_the_papers_relations():
    (stage,) = ready("minilmv2").stages
    options = stage.losses["relations"].options
    assert (options.relations, options.relation_heads) == (("qq", "kk", "vv"), 48)
    assert options.teacher_layer == "auto" and stage.eps == 1e-6


def test_theseus_trains_layers_alone_and_then_the_successor():
    first, second = ready("theseus").stages
    assert first.replacing.schedule == "linear" and first.replacing.base == 0.3
    assert first.replacing.probability(first.replacing.steps or 50, 50) == 1
    assert second.replacing is None and (first.teacher, second.teacher) == ("teacher", None)
    assert first.train == second.train == ("layers",)


def test_ernie_tiny_changes_one_thing_at_a_time():
    stages = ready("ernie-tiny").stages
    assert [stage.name for stage in stages] == ["gd", "ged", "tad", "tsd"]
    for before, after in itertools.pairwise(stages):
        changed = [
            name
            for name in ("teacher", "data", "losses")
            if vars(before)[name] != vars(after)[name]
        ]
        assert len(changed) == 1
        assert after.projections == "keep"
    added = set(stages[3].losses) - set(stages[2].losses)
    assert added == {"soft_labels", "hard_labels"}
    for stage in stages:  # the ablation
        others = [other.name for other in stages if other is not stage]
        kept = ready("ernie-tiny", f"stages.{stage.name}.enabled=false").enabled
        assert [other.name for other in kept] == others
    alone = [f"stages.{name}.enabled=false" for name in ("gd", "ged")]
    fine = read("ernie-tiny", ["models.finetuned=F", *GIVEN["task"], *alone])
    assert [stage.name for stage in fine.enabled] == ["tad", "tsd"]


def test_tinybert_has_the_papers_phases():
    general, intermediate, prediction = ready("tinybert").stages
    assert general.losses == intermediate.losses and list(prediction.losses) == ["soft_labels"]
    assert (general.batch_size, general.epochs) == (256, 3)
    assert (intermediate.learning_rate, prediction.learning_rate) == (5e-5, 3e-5)


def test_efficientbert_builds_its_supernet_and_the_published_student():
    pytest.importorskip("transformers")
    from fastffn.distill.heads import Head
    from fastffn.distill.students import build_student
    from fastffn.expr.genes import PUBLISHED

    found = ready("efficientbert")
    assert [stage.student for stage in found.stages] == [("supernet",), ("student",), ("student",)]
    assert found.models["student"].parent == "supernet"
    supernet = build_student(found.models["supernet"], {}, Head("none"))
    assert {str(gene) for gene in supernet.config.parsed_genes()} == {"4x1 down(gelu(up(x)))"}
    student = build_student(found.models["student"], {"supernet": supernet}, Head("none"))
    assert student.config.genes == [str(gene) for gene in PUBLISHED]
    assert student.config.supernet is None


def test_shipped_recipes_are_installed(tmp_path):
    pytest.importorskip("setuptools")
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installed = (tmp_path / "fastffn" / "distill" / "recipes").glob("*.yaml")
    assert {path.stem for path in installed} == set(shipped())
