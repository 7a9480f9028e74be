"""docs: examples run, keys of recipes are named, commands are understood, links lead somewhere."""

import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from fastffn.cli import _parser
from fastffn.commands import bench, search
from fastffn.data.tasks import load_task
from fastffn.distill import read
from fastffn.distill.recipe import DataSpec, ModelSpec, Recipe, Schedule, Stage
from fastffn.distill.recipe import shipped as shipped_recipes
from fastffn.distill.terms import TERMS, Sizes
from fastffn.search import METHODS, Space
from fastffn.search.latency_table import LatencyTable, Target
from fastffn.search.merit import OBJECTIVES
from fastffn.search.recipe import Score, SearchRecipe, SearchStage
from fastffn.search.recipe import read as read_search
from fastffn.search.recipe import shipped as shipped_searches

DOCS = Path(__file__).parents[1] / "docs"
PAGE, SEARCH = DOCS / "distillation.md", DOCS / "search.md"
EMBED, CLASSIFIER = "compress-an-embedding-model.md", "compress-a-classifier.md"
MADE = ("recipe.yaml", "runs/search/student.yaml")  # files of the reader's
ADDED = "squared_relu"  # the primitive that a page adds


def blocks(language: str, page: Path = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def block(language: str, with_: str, page: Path = PAGE) -> str:
    (found,) = (text for text in blocks(language, page) if with_ in text)
    return found


def in_code(text: str) -> set[str]:
    """Names that stand between backticks."""
    return set(re.findall(r"[`:{,([] ?([a-z_]+[0-9]?)", "".join(re.findall("`.*?`", text))))


def section(title: str) -> str:
    """The part of the page on searches under this heading."""
    return re.split(
        r"^#+ ", SEARCH.read_text(encoding="utf-8").split(f"# {title}\n")[1], flags=re.M
    )[0]


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
    named = in_code(PAGE.read_text(encoding="utf-8"))
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


# -- docs/search.md ------------------------------------------------------------------------------


def test_the_example_is_a_search(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(block("yaml", "search:", SEARCH), encoding="utf-8")
    recipe = read_search(path)
    assert [stage.name for stage in recipe.search] == ["coarse", "fine"]
    assert recipe.search[0].score.metric == "accuracy"


@pytest.mark.parametrize(
    "title, cls, apart",
    [
        ("Top level", SearchRecipe, {"distil"}),  # its keys stand beside the search's
        ("Top level", Recipe, set()),
        ("The space", Space, set()),
        ("The space", Target, set()),
        ("Stages of the search", SearchStage, set()),
        ("Stages of the search", Score, set()),
    ],
)
def test_every_key_of_a_search_is_in_its_table(title, cls, apart):
    rows = [line.split("|")[1] for line in section(title).splitlines() if line.startswith("|")]
    keys = {field.name for field in dataclasses.fields(cls)} - apart
    assert not keys - in_code("".join(rows))


def test_every_method_is_there_with_its_options_and_their_defaults():
    text = section("Proposals")
    for name, method in METHODS.items():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        for option in inspect.signature(method).parameters.values():
            assert option.name == "space" or f"`{option.name}: {option.default}`" in row


def test_every_objective_and_every_shipped_search_is_there():
    page = SEARCH.read_text(encoding="utf-8")
    assert not OBJECTIVES.keys() - in_code(section("Several objectives"))
    assert all(f"| `{name}` |" in page for name in shipped_searches())


def test_the_defaults_of_a_search_are_those_on_the_page():
    text = section("Stages of the search")
    for cls in (SearchStage, Score):
        for field in dataclasses.fields(cls):
            if isinstance(field.default, int | str):
                row = next(
                    line for line in text.splitlines() if line.startswith(f"| `{field.name}` |")
                )
                assert row.split("|")[2].strip(" `") == str(field.default)


def test_the_functions_of_ones_own_are_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(compile(block("python", "def evaluate", SEARCH), "docs", "exec"), found)
    assert found["result"].best["quality"] > 0
    assert (tmp_path / "runs" / "mine" / "search.sqlite3").exists()


def test_the_table_of_latencies_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block("python", "measure(", SEARCH), "docs", "exec"), {})
    assert LatencyTable.load("table.json").target == Target("cpu", length=32, threads=1)


# -- docs/tasks ----------------------------------------------------------------------------------

TASKS = sorted((DOCS / "tasks").glob("*.md"))


def commands(page: Path) -> list[list[str]]:
    """The words of every `fastffn ...` of a page, as the shell gives them."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ").replace(ADDED, "relu")
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    found = []
    for words in (shlex.split(line, comments=True) for line in lines if "fastffn " in line):
        for last, word in enumerate(words):
            if word == "fastffn" and words[:1] not in (["pip"], ["python"]):
                found.append(words[last + 1 :])
                break
    return found


@pytest.mark.parametrize("page", TASKS, ids=lambda page: page.stem)
def test_the_commands_of_a_task_are_understood(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("embed.yaml").write_text(block("yaml", "stages:", page.parent / EMBED), encoding="utf-8")
    reviews = block("yaml", "validation:", page.parent / CLASSIFIER)
    Path("reviews.yaml").write_text(reviews, encoding="utf-8")
    found = commands(page)
    assert found
    for words in found:
        if " ".join(words[:2]) in (*bench.TWO_WORDS, *search.TWO_WORDS):
            words = [" ".join(words[:2]), *words[2:]]
        given, rest = _parser().parse_known_args(words)
        overrides = [word for word in rest if "=" in word]
        assert rest == overrides, words
        recipe = getattr(given, "recipe", None)
        overrides = [*getattr(given, "overrides", []), *overrides]
        if words[0] == "finetune":
            read("finetune", [f"student={given.model}", f"data.task.task={given.task}", *overrides])
        elif words[0] == "distill" and recipe not in (None, *MADE):
            read(recipe, overrides)
        elif words[0] == "search" and recipe is not None:
            read_search(recipe, overrides)


@pytest.mark.parametrize("page", [*TASKS, DOCS.parent / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, link


def test_all_tasks_are_in_the_readme():
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert len(TASKS) == 6 and all(f"docs/tasks/{page.name}" in text for page in TASKS)
