"""Search recipes: reading with lines, overrides, every kind of mistake, and writing."""

import pytest

from fastffn import UserError
from fastffn.search.recipe import Score, SearchRecipe, SearchStage, read

TEXT = """\
teacher: ???
models:
  supernet:
    supernet: {from: teacher, layers: 3, max_stack: 2, max_width: 64}
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
