"""Search recipes: reading with lines, overrides, every kind of mistake, and writing."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from fastffn import UserError
from fastffn.distill import recipe_yaml
from fastffn.expr import PUBLISHED, gene_cost
from fastffn.search.proposals import METHODS
from fastffn.search.recipe import Score, SearchRecipe, SearchStage, read, shipped
from fastffn.search.recipe_checks import check_fits
from fastffn.search.space import Space

TEXT = """\
teacher: ???
models:
  supernet:
    supernet: {from: teacher, layers: 3, max_stack: 2, max_width: 64}
  spare: a_dir
data:
  general:
    text: [a.txt]
  task:
    task: mrpc
stages:
  - name: warmup
    student: supernet
    data: general
    losses:
      relations: {relation_heads: 4}
    steps: 10
    learning_rate: 1e-3
  - name: proxy
    student: candidate
    data: task
    losses: {soft_labels: {}}
    steps: 8
    learning_rate: 1e-3
space:
  stacks: [1, 2]
  ratios: [1, 1/2]
  params: 15M
search:
  - name: coarse
    trials: 10
    random: 4
    supernet: warmup
    train: proxy
    rungs: [0.5, 1]
    score: {data: task, rows: 100}
  - name: fine
    trials: 5
    freeze: functions
    proposals: {method: evolution, population: 4}
    objectives: [quality, params]
    score: {stage: warmup}
minutes: 9
"""


@pytest.fixture
def written(tmp_path):
    """Writes a recipe with `old` replaced by `new` and reads it."""

    def read_it(*overrides, old="", new="", text=TEXT):
        assert old in text
        path = tmp_path / "mine.yaml"
        path.write_text(text.replace(old, new, 1) if old else text)
        return read(path, ["teacher=DIR", *overrides])

    return read_it


def said(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def line(part: str, text: str = TEXT) -> int:
    (number,) = [k for k, line in enumerate(text.splitlines(), 1) if part in line]
    return number


# -- what a recipe says --------------------------------------------------------------------------


def test_values_and_defaults(written):
    found = written()
    assert (found.name, found.seed, found.minutes) == ("mine", 0, 9.0)
    assert found.space == {"stacks": [1, 2], "ratios": [1, "1/2"], "params": "15M"}
    assert found.distil.models["candidate"].parent == "supernet"
    assert [stage.student for stage in found.distil.stages] == [("supernet",), ("candidate",)]
    coarse, fine = found.search
    assert coarse == SearchStage(
        name="coarse",
        trials=10,
        random=4,
        supernet=("warmup",),
        train=("proxy",),
        rungs=(0.5, 1.0),
        score=Score("f1", "task", rows=100),  # the task's first metric
    )
    assert (fine.freeze, fine.objectives) == ("functions", ("quality", "params"))
    assert fine.proposals == {"method": "evolution", "population": 4}
    assert fine.score == Score("loss", stage="warmup") and fine.rungs == (1.0,)


def test_what_is_written_is_read_again(written, tmp_path):
    found = written("minutes=null", "data.task.task={name: own, train: a.tsv, validation: b.tsv}")
    assert found.search[0].score.metric == "accuracy"
    assert SearchRecipe.from_mapping(found.to_mapping()) == found
    assert "candidate" not in found.to_mapping()["models"]
    (tmp_path / "again.yaml").write_text(found.to_yaml())
    assert read(tmp_path / "again.yaml") == found


def test_a_space_of_a_file_keeps_its_lines(written, tmp_path):
    own = tmp_path / "space.yaml"
    own.write_text("stacks: [1, 2]\n\nratios: [1]\n")
    assert written(f"space={own}").space == {"stacks": [1, 2], "ratios": [1]}
    assert written(f"space={own}", "space.params=2M").space["params"] == "2M"
    text = TEXT[: TEXT.index("space:")] + f"space: {own}\n" + TEXT[TEXT.index("search:") :]
    assert written(text=text).space["ratios"] == [1]
    own.write_text("stacks: [1, 2]\n\nratio: [1]\n")
    message = said(written, text=text)
    assert message.startswith(f"{own}:3: space.ratio is unknown: did you mean ratios?")
    assert "space absent.yaml cannot be read: No such file" in said(written, "space=absent.yaml")


def test_stages_of_both_kinds_are_overridden_by_name(written):
    given = ["search.coarse.trials=20", "stages.warmup.steps=3", "search.coarse.score.rows=7"]
    found = written(*given, "stages.proxy.losses.soft_labels=2", "teacher.dtype=bfloat16")
    assert found.search[0].trials == 20 and found.search[0].score.rows == 7
    assert found.distil.stages[0].steps == 3
    assert found.distil.stages[1].losses["soft_labels"].weight == 2
    assert found.distil.models["teacher"].dtype == "bfloat16"
    assert [stage.name for stage in written("search.fine=null").search] == ["coarse"]
    assert said(written, "search.corse.trials=2") == (
        "search.corse.trials=2: search.corse is unknown: did you mean coarse? (known: coarse, fine)"
    )
    assert "give search.NAME.KEY=VALUE" in said(written, "search=[]")


def test_a_supernet_of_files_is_searched_in_without_being_trained(written):
    loaded = ["models.supernet={load: DIR}", "search.coarse.supernet=[]"]
    found = written(*loaded, "search.coarse.train=[]", "search.coarse.rungs=1", *DROPPED)
    assert found.search[0].train == found.search[0].supernet == ()
    message = said(written, "search.coarse.supernet=[]", "search.coarse.train=[]", *DROPPED)
    assert "search.coarse.rungs are parts of the last stage of train" in message
    message = said(
        written,
        *("search.coarse.supernet=[]", "search.coarse.train=[]", "search.coarse.rungs=1"),
        *DROPPED,
    )
    assert "search.coarse.train is empty, and nothing has trained the supernet before" in message


DROPPED = ["stages.proxy=null"]  # which no stage of the search uses then


def test_unset_values_are_asked_for_at_once(tmp_path):
    path = tmp_path / "mine.yaml"
    text = TEXT.replace("[a.txt]", "???").replace("task: mrpc", "task: ???")
    path.write_text(text)
    assert said(read, path) == (
        f"{path}:{line('teacher:')}: teacher.load, data.general.text and data.task.task are not "
        "set: give teacher.load=DIR data.general.text=FILE data.task.task=TASK"
    )
    given = ["teacher=DIR", "data.general.text=a.txt", "data.task.task=cola"]
    assert read(path, given).search[0].score.metric == "matthews"
    path.write_text(text.replace("supernet: {from: teacher, layers: 3, ", "load: ???  # {"))
    assert "give teacher.load=DIR models.supernet.load=DIR" in said(read, path)


def test_a_space_must_fit_its_supernet():
    space = Space.from_dict({"hidden_size": 32, "num_layers": 3, "ratios": [1, "3/2"]})
    size = {"max_stack": 4, "max_width": 48}
    check_fits(space, size)
    check_fits(dataclasses.replace(space, gated=True), size | {"gated": True})
    assert said(check_fits, space, size | {"max_width": 47}) == (
        "space.ratios goes to 3/2, 48 columns, and the supernet's max_width is 47: change this, or "
        "that to 48"
    )
    other = dataclasses.replace(space, layers={1: {"stacks": [5]}})
    assert said(check_fits, other, size).startswith("space.layers.1.stacks goes to 5")
    assert said(check_fits, dataclasses.replace(space, gated=True), size) == (
        "space.gated is true, and the supernet's gated is false: change this, or that to true"
    )


def test_widths_are_checked_where_the_recipe_says_how_wide_the_supernet_is(written):
    assert written("space.ratios=[1, 3/2]").space["ratios"] == [1, "3/2"]
    ratios = ["space.hidden_size=64", "space.ratios=[1, 3/2]"]
    assert "space.ratios goes to 3/2, 96 columns" in said(written, *ratios)


def test_seeds_are_lists_of_genes_or_those_of_a_file(written, tmp_path):
    assert written().seeds is None
    genes = ("1x1 down(gelu(up(x)))", "2x1/2 down(relu(up(x)))", "1x1 down(gelu(up(x)))")
    found = written(f"seeds=[[{', '.join(genes)}]]")
    assert found.seeds == (genes,)
    assert SearchRecipe.from_mapping(found.to_mapping()) == found
    own = tmp_path / "genes.yaml"
    winner = {"name": "own", "hidden_size": 32, "base": 1, "genes": list(genes)}
    own.write_text(recipe_yaml.dump(winner))
    assert written(f"seeds={own}").seeds == (genes,)
    assert said(written, "seeds=absent.yaml").startswith("seeds=absent.yaml: seeds: ")


# -- mistakes ------------------------------------------------------------------------------------

MISTAKES = {  # what is wrong: text, its replacement, the line that is named, what is said
    "no supernet": ("  supernet:\n", "  super:\n", "models:", "models has no supernet"),
    "a candidate": ("models:\n", "models:\n  candidate: a\n", "candidate: a", "leave it out"),
    "supernet of another kind": (
        "supernet: {from: teacher, layers: 3, max_stack: 2, max_width: 64}",
        "layers_of: teacher\n    layers: 3",
        "supernet:",
        "models.supernet is no supernet: give it supernet",
    ),
    "no search": ("search:\n", "serch:\n", None, "search is missing: give a list"),
    "no space": ("space:\n", "spaces:\n", "spaces:", "did you mean space?"),
    "empty space": (
        "space:\n  stacks: [1, 2]\n  ratios: [1, 1/2]\n  params: 15M\n",
        "space:\n",
        "space:",
        "space is missing: give a mapping, or the path",
    ),
    "unknown key of the space": ("params: 15M", "param: 15M", "param: 15M", "did you mean params?"),
    "a budget that is none": ("params: 15M", "params: 15Q", "params: 15Q", "not '15Q'"),
    "stacks that do not fit": (
        "stacks: [1, 2]",
        "stacks: [1, 3]",
        "stacks: [1, 3]",
        "space.stacks goes to 3, and the supernet's max_stack is 2: change this, or that to 3",
    ),
    "gates that do not fit": ("params: 15M", "gated: true", "gated: true", "space.gated is true"),
    "unknown key of a stage": ("random: 4", "ramdon: 4", "ramdon", "did you mean random?"),
    "unnamed stage": ("  - name: fine\n    trials: 5", "  - trials: 5", "- trials: 5", "a name"),
    "same name": (
        "name: coarse",
        "name: fine",
        "name: fine\n    trials: 5",
        "the name fine that another",
    ),
    "no trials": ("    trials: 5\n", "", "name: fine", "search.fine.trials is missing"),
    "trials by text": ("trials: 5", "trials: many", "many", "expected a whole number"),
    "too much chance": ("random: 4", "random: 11", "random: 11", "is not from 0 to the 10 trials"),
    "no score": ("    score: {stage: warmup}\n", "", "name: fine", "search.fine.score is missing"),
    "freeze at first": ("random: 4", "freeze: shapes", "freeze: shapes", "the first stage has non"),
    "unknown freeze": ("functions", "function", "freeze: function", "expected functions or shapes"),
    "unknown stage": ("train: proxy", "train: proxi", "proxi", "did you mean proxy?"),
    "train of the supernet": (
        "train: proxy",
        "train: warmup",
        "train: warmup",
        "names warmup, whose student is supernet: it must be candidate",
    ),
    "supernet of the candidate": (
        "supernet: warmup",
        "supernet: proxy",
        "supernet: proxy",
        "it must be supernet",
    ),
    "train twice": ("train: proxy", "train: [proxy, proxy]", "train: [", "names a stage twice"),
    "other students": (
        "student: supernet",
        "student: spare",
        "student: spare",
        "trains supernet or cand",
    ),
    "switched off": (
        "    student: candidate\n",
        "    student: candidate\n    enabled: false\n",
        "enabled",
        "stages.proxy.enabled is false: the stages of the search say which run",
    ),
    "unused": (
        "    train: proxy\n    rungs: [0.5, 1]\n",
        "",
        "name: proxy",
        "stages.proxy is used by no stage of the search",
    ),
    "rungs that fall": ("[0.5, 1]", "[1, 0.5]", "rungs", "do not rise from above 0 to 1"),
    "rungs to a half": ("[0.5, 1]", "[0.25, 0.5]", "rungs", "do not rise from above 0 to 1"),
    "no reduction": ("random: 4", "reduction: 1", "reduction", "the best half go on at most"),
    "no batch": ("random: 4", "batch: 0", "batch: 0", "search.coarse.batch 0 is not positive"),
    "unknown method": ("evolution", "evolutoin", "evolutoin", "did you mean evolution?"),
    "no method": ("method: evolution, ", "", "population", "unknown proposal method None"),
    "unknown option": ("population: 4", "popolation: 4", "popolation", "did you mean population?"),
    "an option by text": ("population: 4", "population: few", "few", "expected a whole number"),
    "unknown objective": ("[quality, params]", "[quality, size]", "quality, size", "objective 'si"),
    "objectives without quality": ("[quality, params]", "params", "objectives: params", "first"),
    "score of nothing": ("{stage: warmup}", "{rows: 5}", "rows: 5", "metric is missing"),
    "score of two": (
        "{data: task, rows: 100}",
        "{data: task, stage: proxy, metric: loss}",
        "metric: loss",
        "give stage, and no data",
    ),
    "metric of a stage": (
        "{stage: warmup}",
        "{stage: warmup, metric: f1}",
        "metric: f1",
        "search.fine.score.metric f1 is of a task: give data, and no stage",
    ),
    "unknown data": ("{data: task, ", "{data: tusk, metric: f1, ", "tusk", "did you mean task?"),
    "data without a task": (
        "{data: task, ",
        "{data: general, metric: f1, ",
        "data: general, m",
        "is general, which is text",
    ),
    "metric of another task": (
        "{data: task, ",
        "{data: task, metric: pearson, ",
        "pearson",
        "is pearson, which the task has not: choose from f1, accuracy",
    ),
    "questions": ("task: mrpc", "task: squad", "{data: task, ", "task of questions"),
    "loss of an unknown stage": ("{stage: warmup}", "{stage: warm}", "{stage: warm}", "did you me"),
    "rows": ("rows: 100", "rows: 0", "rows: 0", "search.coarse.score.rows 0 is not positive"),
    "rows of two numbers": (
        "score: {stage: warmup}",
        "score: {data: task, rows: 99}",
        "score: {data: task, rows: 99}",
        "rows is 99, and another stage holds out 100 of task",
    ),
    "no time": ("minutes: 9", "minutes: 0", "minutes: 0", "minutes 0 is not positive"),
    "unknown key": ("minutes: 9", "minuts: 9", "minuts", "did you mean minutes?"),
    "a mistake of distillation": ("steps: 8", "stops: 8", "stops", "stages.proxy.stops is unknown"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_with_its_place(what, written, tmp_path):
    old, new, at, why = MISTAKES[what]
    message = said(written, old=old, new=new)
    assert why in message
    place = tmp_path / "mine.yaml"
    text = TEXT.replace(old, new, 1)
    if at is not None:
        place = f"{place}:{text[: text.index(at)].count(chr(10)) + 1}"
    assert message.startswith(f"{place}: ")


def test_rows_that_judge_are_not_trained_on_under_another_name(written):
    text = TEXT.replace("    task: mrpc\n", "    task: mrpc\n  again: {task: mrpc, limit: 50}\n")
    text = text.replace("    data: task\n    losses: {soft", "    data: again\n    losses: {soft")
    with pytest.raises(UserError, match="holds out rows of task, which again has too: train on"):
        written(text=text)
    written(text=text.replace("again: {task: mrpc", "again: {task: rte"))
    text = TEXT.replace("text: [a.txt]", "text: [here/../a.txt]\n  again: {text: a.txt}")
    text = text.replace("score: {data: task, rows: 100}", "score: {stage: warmup, rows: 100}")
    text = text.replace("score: {stage: warmup}", "score: {stage: warmup, rows: 100}")
    written(text=text)
    text = text.replace("losses: {soft_labels: {}}", "losses: {relations: {relation_heads: 4}}")
    with pytest.raises(UserError, match="holds out rows of general, which again has too"):
        written(text=text.replace("    data: task\n", "    data: again\n"))


# -- the shipped ones ----------------------------------------------------------------------------

GIVEN = {
    "efficientbert-search": [
        "models.pretrained.load=P",
        "models.finetuned.load=F",
        "data.general.text=a.txt",
    ],
    "small": ["teacher.load=T", "data.general.text=a.txt"],
    "small-task": ["teacher.load=T", "data.task.task=sst2"],
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_shipped_recipe_needs_what_it_says_and_nothing_else(name):
    assert list(shipped()) == list(GIVEN)
    found = read(name, GIVEN[name])
    assert found.name == name and len(found.description) > 100
    assert SearchRecipe.from_mapping(found.to_mapping()) == found
    asked = said(read, name)
    assert asked.startswith(f"{shipped()[name]}:")
    keys = [word.partition("=")[0] for word in asked.partition(": give ")[2].split()]
    assert keys == [text.partition("=")[0] for text in GIVEN[name]]


@pytest.mark.parametrize("name", GIVEN)
def test_a_shipped_recipe_goes_from_everything_to_shapes_alone(name):
    stages = read(name, GIVEN[name]).search
    assert [stage.freeze for stage in stages] == [None, "shapes", "functions"]
    assert [bool(stage.train) for stage in stages] == [True, True, False]  # one-shot in the end
    assert [bool(stage.supernet) for stage in stages] == [True, False, True]
    assert all(stage.proposals in METHODS for stage in stages if isinstance(stage.proposals, str))


def test_the_published_search_has_the_published_settings():
    pytest.importorskip("transformers")
    from fastffn.models import EfficientBertConfig, EfficientBertModel

    found = read("efficientbert-search", GIVEN["efficientbert-search"])
    model = EfficientBertModel(EfficientBertConfig.preset("base"))
    params = sum(parameter.numel() for parameter in model.parameters())
    rest = params - sum(gene_cost(gene, 540).params for gene in PUBLISHED)
    size = {"hidden_size": 540, "num_layers": 6, "rest_params": rest}
    space = Space.from_dict(found.space | size)
    assert space.candidate(PUBLISHED).params == params  # a member, within the budget
    assert [space.params.low, space.params.high] == [
        authors - (540 * 768 + 768) for authors in (15_000_000, 16_000_000)
    ]
    by_name = {stage.name: stage for stage in found.distil.stages}
    task = by_name["candidate_task"]
    assert found.distil.data["tenth"].limit == 39_270 + found.search[0].score.rows
    assert 39_270 * task.epochs // task.batch_size == 920


def test_shipped_recipes_are_installed(tmp_path):
    pytest.importorskip("setuptools")
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installed = (tmp_path / "fastffn" / "search" / "recipes").glob("*.yaml")
    assert {path.stem for path in installed} == set(shipped())
