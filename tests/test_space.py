"""The search space: only valid members, always in the budget, drawn evenly, each counted once."""

import itertools
import json
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastffn.errors import ExprError, UserError
from fastffn.expr import PRIMITIVES, PUBLISHED, Gene, gene_cost
from fastffn.search import budget
from fastffn.search.budget import Shape, ShapeTable, Window
from fastffn.search.space import Space, frozen
from fastffn.search.variation import cross, mutate

UNARY = {name for name, primitive in PRIMITIVES.items() if primitive.arity == 1}
BINARY = {name for name, primitive in PRIMITIVES.items() if primitive.arity == 2}

SPACES = {
    "default": Space(hidden_size=540, num_layers=3),
    "window": Space(hidden_size=540, num_layers=3, params=(2_000_000, 2_200_000)),
    "wide": Space(  # most widths exceed the hidden size, so x may not stand inside
        hidden_size=96,
        num_layers=2,
        base=4,
        stacks=(1, 2),
        gated=True,
        params=160_000,
        macs=(60_000, 150_000),
    ),
    "small": Space(hidden_size=36, num_layers=2, primitives=("relu", "add"), heights=(3, 4)),
    "tall": Space(hidden_size=36, num_layers=2, heights=(6, 7), gated=True),
    "functions": Space(
        hidden_size=540,
        num_layers=2,
        functions=("down(relu(mul(up(x), x)))", "tanh(down(gelu(up(x))))"),
        params=(500_000, 1_500_000),
    ),
    "shapes": Space(hidden_size=540, num_layers=2, shapes=("2x1/2", "1x1/3")),
}


def assert_member(space: Space, candidate) -> None:
    """Every rule once more, written without the space's own code."""
    assert len(candidate.genes) == space.num_layers
    params, macs = space.rest_params, space.rest_macs
    for gene in candidate.genes:
        assert Gene.parse(str(gene), space.base) == gene
        nodes = list(gene.expr.walk())
        ops = Counter(node.op for node in nodes if not node.is_leaf)
        assert ops["up"] == ops["down"] == 1
        assert ops["gate"] <= space.gated
        assert set(ops) <= {*space.primitives, "up", "down", "gate"}
        assert space.heights[0] <= gene.expr.height <= space.heights[1]
        assert len(nodes) <= space.max_nodes
        for node in nodes:
            if node.op in UNARY:
                assert node.args[0].op not in UNARY
            if node.op in BINARY:
                assert str(node.args[0]) != str(node.args[1])
            if node.op == "down":
                assert node.args[0].op not in ("up", "gate")
        assert (gene.stack in space.stacks and gene.ratio in space.ratios) or space.shapes
        cost = gene_cost(gene, space.hidden_size)  # refuses x inside where it is too narrow
        params, macs = params + cost.params, macs + cost.macs
    assert (candidate.params, candidate.macs) == (params, macs)
    assert space.params.distance(params) == space.macs.distance(macs) == 0
    assert space.candidate(candidate.texts) == candidate


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_random_mutated_and_crossed_candidates_are_members(name, seed):
    space, rng = SPACES[name], Random(seed)
    first, second = space.random(rng), space.random(rng)
    mutant = mutate(space, first, rng)
    for candidate in (first, mutant, cross(space, mutant, second, rng)):
        assert_member(space, candidate)
    assert mutant.fingerprint != first.fingerprint


def test_a_search_reaches_every_kind_of_change():
    space, rng = SPACES["default"], Random(1)
    start = space.random(rng)
    mutants = [mutate(space, start, rng) for _ in range(200)]
    shape = [[(g.stack, g.ratio) for g in mutant.genes] for mutant in (start, *mutants)]
    functions = [[g.expr for g in mutant.genes] for mutant in (start, *mutants)]
    assert sum(entry == shape[0] for entry in shape[1:]) > 30
    assert sum(entry == functions[0] for entry in functions[1:]) > 30
    assert {g.expr.height for m in mutants for g in m.genes} >= {3, 4, 5}


def test_random_functions_use_every_height_primitive_and_place_of_x():
    space, rng = SPACES["wide"], Random(0)
    genes = [gene for _ in range(300) for gene in space.random(rng).genes]
    heights = Counter(gene.expr.height for gene in genes)
    assert min(heights[height] for height in range(3, 8)) > 0.1 * len(genes)
    assert {node.op for gene in genes for node in gene.expr.walk()} >= {*space.primitives, "gate"}
    for part in ("prologue", "middle", "epilogue"):
        assert any("x" in getattr(gene.segments, part).inputs for gene in genes)
    inside = [gene for gene in genes if "x" in gene.segments.middle.inputs]
    assert all(gene.width(96) <= 96 for gene in inside)


def test_the_published_genes_are_members():
    space = Space(hidden_size=540, num_layers=6, rest_params=1000, rest_macs=10)
    candidate = space.candidate(PUBLISHED)
    assert candidate.params == 1000 + sum(gene_cost(gene, 540).params for gene in PUBLISHED)
    assert space.candidate([str(gene) for gene in PUBLISHED]) == candidate


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("1x1 down(mul(up(x), tanh(x)))", "1x1 down(mul(tanh(x), up(x)))"),
        # where x > 0 it exceeds its tanh, and below 0 relu hides the difference
        ("2x1/2 down(gelu(up(relu(max(x, tanh(x))))))", "2x1/2 down(gelu(up(relu(x))))"),
    ],
)
def test_the_same_function_has_the_same_fingerprint(text, other):
    space = Space(hidden_size=540, num_layers=1)
    assert space.candidate([text]).fingerprint == space.candidate([other]).fingerprint


@pytest.mark.parametrize(
    "other",
    ["2x1 down(gelu(up(x)))", "1x1/2 down(gelu(up(x)))", "1x1 down(swish(up(x)))"],
)
def test_different_candidates_have_different_fingerprints(other):
    space = Space(hidden_size=540, num_layers=2)
    plain = "1x1 down(gelu(up(x)))"
    fingerprints = [
        space.candidate(genes).fingerprint
        for genes in ([plain, plain], [plain, other], [other, plain])
    ]
    assert len(set(fingerprints)) == 3


def test_ratios_too_small_for_the_fingerprints_own_width_still_work():
    space = Space(hidden_size=384, num_layers=1, ratios=("1/64", "1/32"), stacks=(1,))
    assert len({space.random(Random(seed)).fingerprint for seed in range(50)}) > 30


# -- shapes under a budget


def table_and_brute_force(windows, layers=3, hidden=540):
    shapes = [Shape(s, Fraction(1, n)) for s in (1, 2, 3) for n in (1, 2, 3)]
    costs = {}
    for shape in shapes:
        cost = gene_cost(Gene.parse(f"{shape.stack}x{shape.ratio} down(gelu(up(x)))"), hidden)
        costs[shape] = (cost.params, cost.macs, cost.values)[: len(windows)]
    combinations = {
        combination: tuple(map(sum, zip(*(costs[shape] for shape in combination), strict=True)))
        for combination in itertools.product(shapes, repeat=layers)
    }
    return ShapeTable([list(costs.items())] * layers, windows), combinations


WINDOWS = [
    [Window(1_500_000, 1_800_000)],
    [Window(None, 1_200_000), Window(900_000, None)],
    [Window(None, 1_200_000), Window(700_000, None), Window(13_000, 18_000)],
]


@pytest.mark.parametrize("windows", WINDOWS)
def test_shapes_are_drawn_evenly_from_all_that_fit(windows):
    table, combinations = table_and_brute_force(windows)
    fitting = {c for c, total in combinations.items() if table.distance(total) == 0}
    assert table.count == len(fitting) > 10
    rng = Random(0)
    drawn = Counter(tuple(table.draw(rng)) for _ in range(60 * len(fitting)))
    assert set(drawn) == fitting
    # chi-square with n - 1 degrees of freedom: mean n - 1, variance 2(n - 1); five sigma
    n = len(fitting)
    assert sum((count - 60) ** 2 / 60 for count in drawn.values()) < n - 1 + 5 * (2 * n) ** 0.5
    assert combinations[tuple(table.smallest())] == min(combinations[c] for c in fitting)


@pytest.mark.parametrize("windows", WINDOWS)
def test_a_thinned_table_still_tells_exact_costs(windows, monkeypatch):
    monkeypatch.setattr(budget, "LIMIT", 60)
    table, combinations = table_and_brute_force(windows)
    assert max(map(len, table.ways)) <= 60
    for seed in range(200):
        assert table.distance(combinations[tuple(table.draw(Random(seed)))]) == 0


def test_the_nearest_total_is_the_nearest():
    table, combinations = table_and_brute_force([Window(1_900_001, 1_900_002)])
    assert table.count == 0
    nearest = combinations[tuple(table.nearest())]
    assert table.distance(nearest) == min(map(table.distance, combinations.values()))


def test_smallest_and_plain():
    space = SPACES["window"]
    smallest = space.smallest()
    assert_member(space, smallest)
    sizes = [cost.params for cost in space.costs[0].values()]
    totals = map(sum, itertools.product(sizes, repeat=space.num_layers))
    assert smallest.params == min(t for t in totals if 2_000_000 <= t <= 2_200_000)
    for candidate in space.plain():
        assert_member(space, candidate)
    sizes = [candidate.params for candidate in SPACES["default"].plain()]
    assert len(sizes) == 16 and sizes == sorted(sizes, reverse=True)


# -- texts and refusals


@pytest.mark.parametrize("name", SPACES)
def test_a_space_survives_json(name):
    space = SPACES[name]
    assert Space.from_dict(json.loads(json.dumps(space.to_dict()))) == space


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive integer"),
        (
            {"primitives": ("gelu", "gulu")},
            r"primitives.1: unknown primitive 'gulu': did you mean gelu\?",
        ),
        ({"heights": (5, 4)}, "heights must be two integers"),
        ({"heights": (1, 2)}, "greatest height must be 3"),
        ({"stacks": (0,)}, "stacks must be positive"),
        ({"ratios": ("half",)}, 'numbers such as "1/2"'),
        ({"ratios": ("1/1000",)}, "width of at least 1"),
        ({"params": (2, 1)}, "params has its least, 2, above its greatest, 1"),
        ({"params": (1, 2, 3)}, r"params must be a maximum or \[least, greatest\]"),
        ({"macs": "15 apples"}, "macs must be a maximum .* such as 15M, not '15 apples'"),
        ({"functions": ("down(gelu(up(x)))",)}, "functions must have one entry per layer, 2"),
        ({"gates": True}, r"space.gates is unknown: did you mean gated\?"),
    ],
)
def test_bad_spaces_are_refused(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        Space.from_dict({"hidden_size": 540, "num_layers": 2, **changes})
    assert "\n" not in str(caught.value)


def test_a_bad_function_points_at_the_character():
    with pytest.raises(ExprError, match="up"):
        Space(hidden_size=540, num_layers=1, functions=("down(gelu(x))",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"params": 1000},
            r"params <= 1,000: the nearest has params = \d{3},\d{3}, macs = \d{3},",
        ),
        ({"params": 10**6, "macs": (10**9, None)}, r"and macs >= 1,000,000,000: the nearest has"),
        ({"primitives": ()}, "layer 0 can have no gene: with primitives \\(none\\)"),
        # a binary operation needs x, which is narrower than the inner width
        ({"primitives": ("add",), "base": 4, "ratios": (1,)}, "layer 0 can have no gene"),
    ],
)
def test_a_space_without_members_says_why(changes, message):
    space = Space(hidden_size=540, num_layers=2, **changes)
    with pytest.raises(UserError, match=message) as caught:
        space.random(Random(0))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        space.smallest()


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        (["1x1 down(gelu(up(x)))"], "1 genes for 2 layers"),
        (["5x1 down(gelu(up(x)))"] * 2, "layer 0, gene 5x1 .* allowed: 1x1/4, 1x1/3, 1x1/2"),
        (["1x1 down(gelu(up(x)))", "1x1 down(tanh(relu(up(x))))"], "layer 1, .* directly on relu"),
        (["1x1 down(add(up(x), mul(x, x)))"] * 2, "both operands of mul are x"),
        (["1x1 down(gelu_erf(up(x)))"] * 2, "gelu_erf is not among the primitives"),
        (["1x1 down(mul(gate(x), up(x)))"] * 2, "gated 1x1 is not among the allowed: none"),
        (["1x1 down(gelu(up(x)))", "1x1 down(gelu(x))"], "layer 1, gene .*up.* is missing"),
        (["1x1 down(gelu(up(x)))", "nonsense("], r"layer 1, gene 'nonsense\(': .*at character"),
        (["1x1 down(gelu(up(x)))", 3], "layer 1: a gene is a text, not 3"),
        (["4x1 down(gelu(up(x)))"] * 2, "4,682,880 is outside the budget params <= 2,000,000"),
    ],
)
def test_no_member_is_refused_with_the_reason(genes, message):
    space = Space(hidden_size=540, num_layers=2, params=2_000_000)
    with pytest.raises(UserError, match=message) as caught:
        space.candidate(genes)
    assert "\n" not in str(caught.value)


def test_frozen_keeps_functions_or_shapes():
    space, rng = SPACES["window"], Random(3)
    candidate = space.random(rng)
    for what, read in (("functions", lambda g: g.expr), ("shapes", lambda g: (g.stack, g.ratio))):
        narrowed = frozen(space, candidate, what)
        assert narrowed != space == replace(narrowed, functions=None, shapes=None)
        for _ in range(20):
            member = mutate(narrowed, narrowed.random(rng), rng)
            assert list(map(read, member.genes)) == list(map(read, candidate.genes))
            assert_member(narrowed, member)


@pytest.mark.parametrize("method", ["random", "evolved"])
def test_a_thousand_proposals_take_less_than_ten_seconds(method):
    space, rng = Space(hidden_size=540, num_layers=6, params=(6_000_000, 6_500_000)), Random(0)
    proposed = [space.random(rng)]  # the table of shapes is made once
    start = time.process_time()  # the machine may be busy with others
    for k in range(1000):
        if method == "random":
            proposed.append(space.random(rng))
        elif k % 3:
            proposed.append(mutate(space, rng.choice(proposed), rng))
        else:
            proposed.append(cross(space, *rng.choices(proposed, k=2), rng))
    for candidate in proposed:
        space.candidate(candidate.texts)
    assert time.process_time() - start < 10
    assert len({candidate.fingerprint for candidate in proposed}) > 900
