"""docs/distillation.md: its examples run, and it names every key that a recipe takes."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml

from fastffn.data.tasks import load_task
from fastffn.distill import read
from fastffn.distill.recipe import DataSpec, ModelSpec, Recipe, Schedule, Stage
from fastffn.distill.recipe import shipped as shipped_recipes
from fastffn.distill.terms import TERMS, Sizes

PAGE = Path(__file__).parents[1] / "docs" / "distillation.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def block(language: str, with_: str) -> str:
    (found,) = (text for text in blocks(language) if with_ in text)
    return found


def example(tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "mine.yaml"
    path.write_text(block("yaml", "stages:"), encoding="utf-8")
    return read(path, overrides)


def test_the_example_is_a_recipe(tmp_path):
    recipe = example(tmp_path)
    assert recipe.name == "half"
    assert [stage.name for stage in recipe.enabled] == ["general", "task"]
    assert all(stage.teacher == "teacher" for stage in recipe.stages)
    assert recipe.stages[1].losses["soft_labels"].weight == 0.5


def test_every_key_is_on_the_page():
    named = set(re.findall(r"[`:{,(] ?([a-z_]+)", "".join(re.findall("`.*?`", PAGE.read_text()))))
    classes = [DataSpec, ModelSpec, Recipe, Schedule, Stage, *TERMS.values()]
    keys = {field.name for cls in classes for field in dataclasses.fields(cls)}
    assert not keys - named
    assert not set(TERMS) - named
    assert all(f"| `{name}` |" in PAGE.read_text() for name in shipped_recipes())


def test_the_task_of_ones_own_is_one(tmp_path):
    task = yaml.safe_load(block("yaml", "reviews"))["task"]
    rows = "title,body,stars\nNo,Bad it is.,bad\nYes,Good it is.,good\n"
    for name in (task["train"], task["validation"]):
        (tmp_path / name).write_text(rows)
    found = load_task(task, tmp_path)
    assert found.task.labels == ("bad", "good") and found.task.metrics == ("f1", "accuracy")
    assert found.splits["train"].second == ["Bad it is.", "Good it is."]


@pytest.fixture
def first_token():
    exec(compile(block("python", "FirstToken"), "docs", "exec"), {"__name__": __name__})
    yield TERMS["first_token"]
    del TERMS["first_token"]


def test_the_loss_of_ones_own_works(first_token, tmp_path):
    given = "stages.general.losses={first_token: {how: last, weight: 10}}"
    loss = example(tmp_path, given).stages[0].losses["first_token"]
    assert loss.weight == 10 and loss.options.how == "last"
    term = loss.options.build(Sizes(1, 4, 2, None), Sizes(2, 4, 2, None))
    assert (term.student_reads, term.teacher_reads) == (("hidden.0",), ("hidden.1",))
    with torch.inference_mode():
        theirs = torch.tensor([[[0.0, 0.0, 0.0, 2.0]]])
    ours = torch.tensor([[[3.0, 0.0, 0.0, 0.0]]], requires_grad=True)
    value = term({"hidden.0": ours}, {"hidden.1": theirs}, {})
    value.backward()
    assert value.item() == pytest.approx(0.5) and ours.grad.isfinite().all()
