"""Latency tables: sums that are right for a device of known times, close to whole models on this
one; budgets on latency hold for every member."""

import json
import statistics
from dataclasses import replace
from functools import partial
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from fastffn.errors import UserError
from fastffn.expr import PRIMITIVES, Gene
from fastffn.models import extract, supernet_from_teacher
from fastffn.search import latency
from fastffn.search.latency import LatencyTable, Target, measure
from fastffn.search.space import Space, frozen
from fastffn.search.variation import cross, mutate

HIDDEN = 48
COSTS = {name: 0.01 * (1 + index) for index, name in enumerate(PRIMITIVES)}  # per column


def true_time(gene: Gene, hidden: int = HIDDEN) -> float:
    """Microseconds on a device that adds up: products, a pass before them, each operation."""
    parts, width = gene.segments, gene.width(hidden)
    time = 40.0 + 0.5 * width * (2 + gene.gated) + 7.0 * (not parts.prologue.is_leaf)
    for part, columns in (
        (parts.prologue, hidden),
        (parts.middle, width),
        (parts.epilogue, hidden),
    ):
        time += columns * sum(COSTS[node.op] for node in part.walk() if not node.is_leaf)
    return gene.stack * time


def space(**changes) -> Space:
    values = {"hidden_size": HIDDEN, "num_layers": 3, "ratios": ("1/4", "1/2", "1"), "gated": True}
    return Space(**(values | changes))


@pytest.fixture
def device(monkeypatch):
    """A device that takes `true_time`; the rest of a model takes 1000."""

    def timed(calls, _device, rounds, _seconds, progress):
        def took(name, call):
            if name == "model":
                return 1000.0 + sum(true_time(layer.ffn.gene) for layer in _ffns(call.func))
            if name == "feed-forward networks":
                return sum(true_time(ffn.gene) for ffn in call.func)
            return true_time(call.func.gene)

        return {name: [took(name, call)] * rounds for name, call in calls.items()}

    monkeypatch.setattr(latency, "_timed", timed)


def _ffns(model):
    return model.base_model.encoder.layer


def supernet(hidden: int = HIDDEN, layers: int = 3, width: int | None = None, **options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
        max_position_embeddings=128,
    )
    size = {"max_stack": 4, "max_width": width or hidden}
    return supernet_from_teacher(BertModel(config), **size, layers=range(layers), **options)


def table_of(members: Space) -> LatencyTable:
    """The table of the device that takes `true_time`, without a measurement."""
    widths = {(shape.ratio, shape.gated) for shapes in members.costs for shape in shapes}
    units = {}
    for ratio, gated in widths:
        text = "down(mul(swish(gate(x)), up(x)))" if gated else "down(gelu(up(x)))"
        gene = Gene(1, ratio, Gene.parse(text).expr)
        units[latency.unit_key(gene.width(HIDDEN), gated)] = true_time(gene)
    return LatencyTable(members.target, 1000.0, units, COSTS, 7.0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_a_table_adds_up_for_functions_that_were_never_measured(seed):
    members = space()
    table = table_of(members)
    for gene in members.random(Random(seed)).genes:
        assert table.of(gene, HIDDEN) == pytest.approx(true_time(gene), abs=0.51)


def test_measuring_finds_the_times_of_a_device(device):
    members = space(layers={1: {"ratios": "3/4", "primitives": ("gelu", "mul", "gelu_erf")}})
    model = supernet()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    table = measure(members, model=model)
    assert table.target == Target() and table.rest == pytest.approx(1000)
    assert table.prologue == pytest.approx(7)
    assert set(table.units) == {f"{w}{kind}" for w in (12, 24, 36, 48) for kind in ("", " gated")}
    assert set(table.primitives) == {*members.primitives, "gelu_erf"}
    assert table.primitives == pytest.approx({name: COSTS[name] for name in table.primitives})
    known = replace(members, table=table)
    for seed in range(20):
        candidate = known.random(Random(seed))
        wanted = 1000 + sum(map(true_time, candidate.genes))
        assert candidate.latency == pytest.approx(wanted, abs=2)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert measure(members).rest == 0


def test_what_fixed_functions_need_is_measured_too(device):
    functions = ("down(gelu_erf(up(x)))", "down(mul(gate(x), up(x)))", "down(relu(up(x)))")
    members = space(functions=functions, primitives=("relu",), ratios=(1,))
    table = measure(members)
    assert {"gelu_erf", "mul", "relu"} <= set(table.primitives)
    assert {"48", "48 gated"} == set(table.units)
    assert replace(members, table=table).smallest().latency > 0


def test_a_table_survives_json_and_files(tmp_path):
    members = space()
    table = table_of(members)
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    known = replace(members, table=str(tmp_path / "table.json"), latency=(None, 1.5))
    assert known.table == table
    assert Space.from_dict(json.loads(json.dumps(known.to_dict()))) == known


# -- budgets


def budgeted(**changes) -> Space:
    members = space(**changes)
    return replace(members, table=table_of(members))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**9), low=st.sampled_from([None, 1.6]), both=st.booleans())
def test_members_meet_a_budget_on_latency(seed, low, both):
    members = budgeted(latency=(low, 1.8), macs=30_000 if both else None)
    rng = Random(seed)
    first, second = members.random(rng), members.random(rng)
    for candidate in (
        first,
        second,
        mutate(members, first, rng),
        cross(members, first, second, rng),
    ):
        total = 1000 + sum(map(true_time, candidate.genes))
        assert candidate.latency == pytest.approx(total, abs=2)
        assert (low or 0) * 1000 <= candidate.latency <= 1800
        assert not both or candidate.macs <= 30_000
        assert members.candidate(candidate.texts) == candidate


def test_a_budget_that_plain_functions_barely_meet_still_has_other_functions():
    whole = budgeted()
    smallest = whole.smallest().latency
    members = replace(whole, latency=(smallest + 1) / 1000)
    assert members.smallest().latency == smallest
    drawn = [members.random(Random(seed)) for seed in range(40)]
    assert all(candidate.latency <= smallest + 1 for candidate in drawn)
    assert len({candidate.fingerprint for candidate in drawn}) > 1


def test_a_narrowed_space_keeps_the_budget():
    members = budgeted(latency=1.8)
    candidate = members.random(Random(0))
    for what in ("functions", "shapes"):
        narrowed = frozen(members, candidate, what)
        for seed in range(20):
            assert narrowed.random(Random(seed)).latency <= 1800
    # with its functions fixed the drawn shapes are exact, whatever the plain ones would take
    fixed = frozen(members, candidate, "functions")
    totals = {member.latency for member in (fixed.smallest(), fixed.largest())}
    assert max(totals) <= 1800 and fixed.count > 1


def test_without_a_table_a_latency_budget_says_to_measure():
    members = space(latency=5)
    for ask in (lambda: members.random(Random(0)), lambda: members.count, members.smallest):
        with pytest.raises(UserError, match=r"needs measurements on cpu.*latency\.measure"):
            ask()
    assert space().random(Random(0)).latency is None


def test_a_latency_that_nothing_meets_says_the_nearest():
    with pytest.raises(UserError, match=r"latency <= 0\.50 ms: the nearest .*latency = 1\.\d\d ms"):
        budgeted(latency=0.5).random(Random(0))
    members = budgeted(latency=1.3)
    slow = ["4x1 tanh(down(gelu(up(x))))"] * 3
    with pytest.raises(UserError, match=r"latency = 2\.\d\d ms is outside .* latency <= 1\.30 ms"):
        members.candidate(slow)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": {"batch": 1}}, r"space\.target\.batch is unknown: did you mean batch_size"),
        ({"target": {"length": 0}}, r"space\.target\.length must be a positive integer"),
        ({"target": {"dtype": "int8"}}, r"space\.target\.dtype must be one of float32"),
        ({"latency": "fast"}, r"space\.latency must be a maximum .* in milliseconds"),
        ({"table": {"rest": 1.0}}, r"space\.table\.target is missing"),
        ({"table": 3}, r"space\.table must be a mapping or the path"),
        ({"table": "nowhere.json"}, r"space\.table: latency table nowhere\.json: No such file"),
    ],
)
def test_bad_targets_and_tables_are_refused(change, message):
    with pytest.raises(UserError, match=message) as caught:
        space(**change)
    assert "\n" not in str(caught.value)


def test_a_table_of_another_target_or_space_is_refused():
    table = table_of(space())
    with pytest.raises(UserError, match=r"measured on another target .*2 threads.*measure again"):
        space(table=table, target={"threads": 2, "batch_size": 1})
    with pytest.raises(UserError, match=r"width 36 was not measured .*measure again"):
        space(table=table, ratios=("3/4",)).smallest()


def test_a_device_or_a_model_that_does_not_fit_is_refused():
    members = space(primitives=("gelu",), ratios=("1/4",))
    with pytest.raises(UserError, match="device 'gpu' is not there"):
        measure(members, Target(device="gpu"))
    with pytest.raises(UserError, match="the model has 2 layers of width 48, the space 3 of 48"):
        measure(members, model=supernet(layers=2))
    with pytest.raises(UserError, match="the model has 4 layers of width 48, the space 3 of 48"):
        measure(members, model=extract(supernet(layers=4)))
    with pytest.raises(UserError, match="length 500 is more than the model's 128 positions"):
        measure(members, Target(length=500), supernet())
    with pytest.raises(UserError, match="Linear is no EfficientBert model"):
        measure(members, model=torch.nn.Linear(1, 1))


# -- this machine


def test_a_real_measurement_in_the_small():
    members = space(gated=False, primitives=("gelu", "add"), ratios=("1/2",))
    threads, seen = torch.get_num_threads(), []
    target = Target(batch_size=2, length=16, threads=1, dtype="bfloat16")
    tell = lambda *event: seen.append(event)  # noqa: E731
    table = measure(members, target, supernet(), tell, rounds=6)
    assert table.rest > 0 and table.units["24"] > 0 and table.target == target
    assert seen == [(done, 6) for done in range(1, 7)] and torch.get_num_threads() == threads


@pytest.mark.slow
def test_estimates_are_close_to_whole_models():
    hidden, target = 256, Target(threads=1)
    members = Space(hidden, 3, ratios=("1/4", "1/2", "1", "2"), target=target)
    net = supernet(hidden, width=2 * hidden)
    members = replace(members, table=measure(members, model=net))
    candidates = [members.random(Random(seed)) for seed in range(12)]
    ids = torch.zeros((1, 128), dtype=torch.long)
    models = [extract(net, candidate.genes).eval() for candidate in candidates]
    calls = {str(k): partial(model, input_ids=ids) for k, model in enumerate(models)}
    with latency._threads(1):
        times = latency._timed(calls, torch.device("cpu"), 60, 20.0, None)
    real = [statistics.quantiles(found, n=10)[0] for found in times.values()]
    ratios = [c.latency / time for c, time in zip(candidates, real, strict=True)]
    assert 0.8 < statistics.median(ratios) < 1.25 and 0.65 < min(ratios) < max(ratios) < 1.5
    ranks = [
        [sorted(values).index(value) for value in values]
        for values in ([c.latency for c in candidates], real)
    ]
    assert statistics.correlation(*ranks) > 0.85
