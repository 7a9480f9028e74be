"""Spaces written by people: rules per layer, budgets in words, YAML whose errors name the line."""

import json
from dataclasses import replace
from fractions import Fraction
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastffn.distill.recipe_yaml import dump
from fastffn.errors import UserError
from fastffn.search.budget import Window
from fastffn.search.space import Space, frozen
from fastffn.search.variation import cross, mutate

TEXT = """\
# what may be searched
hidden_size: 96
num_layers: 3
primitives: [gelu, relu, mul, tanh]
stacks: [1, 2]
ratios: [1/2, 1]
params: [30k, 100k]
layers:
  0:
    primitives: relu
    heights: [3, 4]
    stacks: 1
  2: {ratios: 1/4, gated: true}
"""


def write(tmp_path, text: str):
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def layered(tmp_path) -> Space:
    return Space.read(write(tmp_path, TEXT))


def test_a_file_is_the_space_that_it_says(layered, tmp_path):
    assert layered == Space(
        96,
        3,
        primitives=("gelu", "relu", "mul", "tanh"),
        stacks=(1, 2),
        ratios=(Fraction(1, 2), 1),
        params=(30_000, 100_000),
        layers={
            0: {"primitives": ("relu",), "heights": (3, 4), "stacks": (1,)},
            2: {"ratios": ("1/4",), "gated": True},
        },
    )
    assert layered.rules[0].primitives == ("relu",) and layered.rules[0].ratios == layered.ratios
    assert layered.rules[1].stacks == (1, 2) and layered.rules[2].gated
    assert layered.grammar(0) != layered.grammar(1) == layered.grammar(2)
    assert Space.from_dict(json.loads(json.dumps(layered.to_dict()))) == layered
    assert replace(layered, num_layers=3) == layered
    assert Space.read(write(tmp_path, dump(layered.to_dict()))) == layered


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_every_layer_keeps_its_own_rules(tmp_path_factory, seed):
    space, rng = Space.read(write(tmp_path_factory.mktemp("space"), TEXT)), Random(seed)
    first, second = space.random(rng), space.random(rng)
    for candidate in (first, mutate(space, first, rng), cross(space, first, second, rng)):
        own, middle, last = candidate.genes
        ops = [{node.op for node in gene.expr.walk()} for gene in candidate.genes]
        assert ops[0] <= {"input", "up", "down", "relu"} and own.stack == 1
        assert own.expr.height <= 4
        assert ops[1] <= {"input", "up", "down", *space.primitives}
        assert last.ratio == Fraction(1, 4) and middle.ratio in space.ratios
        assert 30_000 <= candidate.params <= 100_000
        assert space.candidate(candidate.texts) == candidate
        narrowed = frozen(space, candidate, "shapes")
        assert narrowed.random(rng).genes[2].ratio == Fraction(1, 4)


def test_a_layers_own_rules_are_reached(layered):
    drawn = [layered.random(Random(seed)) for seed in range(60)]
    assert any(candidate.genes[2].gated for candidate in drawn)
    assert not any(candidate.genes[1].gated for candidate in drawn)
    assert any("tanh" in str(candidate.genes[1]) for candidate in drawn)
    with pytest.raises(UserError, match=r"layer 0, .* gelu is not among the primitives"):
        layered.candidate(["1x1 down(gelu(up(x)))"] * 3)


def test_the_count_is_that_of_all_combinations_in_the_budget(layered):
    sizes = [[cost.params for cost in shapes.values()] for shapes in layered.costs]
    totals = [sum(combination) for combination in product(*sizes)]
    assert [len(layer) for layer in sizes] == [2, 4, 4]
    assert layered.count == sum(30_000 <= total <= 100_000 for total in totals) > 5
    assert replace(layered, params=None).count == len(totals)
    assert replace(layered, params=10).count == 0


def test_a_description_names_layers_budgets_and_ends(layered):
    lines = layered.describe().splitlines()
    assert len(lines) == 6
    assert f"{layered.count} combinations" in lines[0]
    assert "30,000 <= params <= 100,000" in lines[0]
    assert lines[1].startswith("layer 0: stacks 1, ratios 1/2, 1;") and "over relu" in lines[1]
    assert f"params {layered.smallest().params:,}" in lines[4]
    assert f"params {layered.largest().params:,}" in lines[5]
    assert layered.smallest().params < layered.largest().params <= 100_000
    assert "latency" not in lines[5]
    assert Space(96, 2).describe().count("\n") == 3


@pytest.mark.parametrize(
    ("written", "limits"),
    [
        (None, (None, None)),
        ("15M", (None, 15_000_000)),
        ("1.2k", (None, 1200)),
        (["800k", None], (800_000, None)),
        ([1, "2 G"], (1, 2_000_000_000)),
        ("1_500", (None, 1500)),
        (1e6, (None, 1_000_000)),
    ],
)
def test_budgets_in_words(written, limits):
    assert Window.read(written, ()) == limits
    assert Window.read(Window(*limits), ()) == limits


@pytest.mark.parametrize(
    "written", ["M", "15 MB", "-3", 1.5, "1.2345k", True, {}, [], float("inf")]
)
def test_no_budgets(written):
    with pytest.raises(UserError, match="must be a maximum or"):
        Window.read(written, ("params",))


def test_a_latency_is_in_milliseconds():
    assert Window.read([0.5, 2], (), whole=False).microseconds() == (500, 2000)
    assert Window.read(1.25, (), whole=False).microseconds().text("latency") == "latency <= 1.25 ms"


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (("stacks: [1, 2]", "stack: [1, 2]"), 5, "space.stack is unknown: did you mean stacks?"),
        (("hidden_size: 96", "hidden_size: wide"), 2, "hidden_size must be a positive integer"),
        (("gelu, relu", "gelu, rellu"), 4, "space.primitives.1: unknown primitive 'rellu': did"),
        (("[30k, 100k]", "[30k, 100x]"), 7, "space.params must be a maximum or [least, greatest]"),
        (("  2: {", "  3: {"), 13, "space.layers.3 is no layer: they are 0 to 2"),
        (("  2: {", "  '00': {"), 13, "space.layers.00 is layer 0, which is there already"),
        (("heights: [3, 4]", "heights: [3]"), 11, "space.layers.0.heights must be two integers"),
        (("ratios: 1/4", "ratio: 1/4"), 13, "space.layers.2.ratio is unknown: did you mean ratios"),
        (("gated: true", "gated: yes"), 13, "space.layers.2.gated must be true or false"),
        (("ratios: 1/4", "ratios: 1/400"), 13, "must leave a width of at least 1 of 96: 1/400"),
        (("num_layers: 3\n", ""), None, "space.num_layers is missing: give it a value"),
        (("stacks: 1\n", "stacks: 1\n    stacks: 2\n"), 13, "stacks is there twice"),
        (("hidden_size: 96", "hidden_size: [96"), 3, "no YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_files_line(tmp_path, change, line, message):
    assert change[0] in TEXT
    path = write(tmp_path, TEXT.replace(*change, 1))
    with pytest.raises(UserError) as caught:
        Space.read(path)
    said = str(caught.value)
    assert message in said and "\n" not in said
    assert said.startswith(f"{path}:{line}: " if line else f"{path}: ")


def test_a_file_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(UserError, match=r"space .*nowhere\.yaml cannot be read: No such file"):
        Space.read(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="hidden_size is missing"):
        Space.read(write(tmp_path, ""))
    with pytest.raises(UserError, match="must be a mapping"):
        Space.read(write(tmp_path, "[1, 2]"))
