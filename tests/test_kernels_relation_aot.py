"""The relation kernels as machine code for three GPU generations, without a GPU.

What is asserted decides their speed: no spills, tensor cores where there are some, how many
exponentials an element costs (they are what the kernels are bound by), registers (how many blocks
fit), loads by way of shared memory as wide as the head allows, no exchange between threads in the
loops.
"""

import itertools
import re

import aot
import pytest
import torch

from fastffn.kernels import relation

TYPES = (torch.bfloat16, torch.float32)
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")
HEADS = 4
# Registers of a thread: 3 or 2 blocks of four warps on a multiprocessor at the widths of MiniLM.
REGISTERS = {"sm_80": 168, "sm_90": 168, "sm_100": 200}


def plan(direction, divergence, widths=(8, 16), dtype=torch.bfloat16, itself=True, length=512):
    """The launches for one example with a mask; the last one or two are those of the relation."""
    a, b = (torch.empty(1, length, HEADS * widths[0], dtype=dtype) for _ in range(2))
    ta, tb = (torch.empty(1, length, HEADS * widths[1], dtype=dtype) for _ in range(2))
    if itself:
        b = tb = None
    real = torch.empty(1, length, dtype=torch.bool)
    rows = torch.empty(1, HEADS, length)
    stats = torch.empty(relation.stats_count(divergence), 1, HEADS, length)
    arguments = (a, b, ta, tb, real, HEADS, 0.3, 0.2, divergence)
    if direction == "forward":
        return relation.plan_forward(*arguments, rows, stats)
    return relation.plan_backward(*arguments, stats, rows, a, b)


def build(launch, target):
    return aot.compile(launch.kernel, launch.arguments, launch.constants, target)


@pytest.fixture
def built(monkeypatch):
    """Compiles the last launches of a plan, as many as asked for."""

    def compile(target, *args, launches=1, **kwargs):
        capability = int(target.removeprefix("sm_")) // 10
        monkeypatch.setattr(relation, "_capability", lambda device: capability)
        return [build(launch, target) for launch in plan(*args, **kwargs)[-launches:]]

    return compile


def loops(compiled) -> list[list[str]]:
    """The instructions of every innermost loop that takes exponentials or products."""
    lines = re.findall(
        r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", compiled.sass
    )
    code = [(int(at, 16), name, rest) for at, name, rest in lines]
    spans = []
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and at - int(target[1], 16) > 512:
            spans.append((int(target[1], 16), at))
    bodies = [[name for at, name, _ in code if low <= at <= high] for low, high in spans]
    inner = [
        body
        for (low, high), body in zip(spans, bodies, strict=True)
        if "EXIT" not in body
        and not any((low, high) != o and low <= o[0] and o[1] <= high for o in spans)
    ]
    return [body for body in inner if any(name.startswith(PRODUCTS) for name in body)]


def exponentials(body) -> int:
    return sum(name.startswith("MUFU.EX2") for name in body)


def check(compiled, target, dtype, spills=0):
    # Without tensor cores, and where allowed, the assembler spills a few to fit another block.
    assert compiled.spills <= (10 if dtype == torch.float32 else spills)
    assert compiled.shared <= aot.SHARED_LIMIT[target]
    products = sum(compiled.count(name) for name in PRODUCTS)
    assert (products > 0) == (dtype != torch.float32)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("divergence", relation._STATS)
def test_forward(built, divergence, target):
    (compiled,) = built(target, "forward", divergence)
    check(compiled, target, torch.bfloat16)
    assert compiled.registers <= REGISTERS[target]
    assert compiled.widest("LDGSTS") == 128
    for body in loops(compiled):
        per_element = exponentials(body) / 32
        assert per_element <= {"score_mse": 0}.get(divergence, 2.2), per_element
        if target != "sm_100":
            assert not any(name.startswith("SHFL") for name in body)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("divergence", relation._STATS)
def test_backward_of_self_relations(built, divergence, target):
    (compiled,) = built(target, "backward", divergence)
    check(compiled, target, torch.bfloat16)
    assert compiled.registers <= REGISTERS[target]
    found = sorted(exponentials(body) for body in loops(compiled))
    # kl: the factored loop, 2 of 32 elements, and the one for wide heads, 4 of 16.
    wanted = {"kl": [64, 64], "reverse_kl": [64], "probability_mse": [64], "score_mse": [0]}
    if target == "sm_100":  # waiting for a product is a loop in itself, which hides the outer one
        assert compiled.count("MUFU.EX2") >= wanted[divergence][0]
    else:
        assert found == wanted[divergence]


@pytest.mark.parametrize("target", aot.TARGETS)
def test_backward_of_general_relations(built, target):
    for compiled in built(target, "backward", "kl", launches=2, itself=False):
        check(compiled, target, torch.bfloat16)
        assert compiled.registers <= REGISTERS[target]
        if target != "sm_100":
            assert [exponentials(body) for body in loops(compiled)] == [64]


@pytest.mark.parametrize(("widths", "bits"), [((12, 12), 64), ((64, 64), 128), ((6, 12), 32)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_widths(built, direction, widths, bits):
    """Loads into shared memory are as wide as the narrower head allows."""
    (compiled,) = built("sm_90", direction, "kl", widths)
    check(compiled, "sm_90", torch.bfloat16)
    widths_of_loads = {name for name in compiled.instructions if name.startswith("LDGSTS")}
    assert any((f".{bits}" in name) if bits > 32 else True for name in widths_of_loads)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_widest_heads(built, target, direction):
    (compiled,) = built(target, direction, "kl", (128, 128))
    check(compiled, target, torch.bfloat16)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("widths", [(8, 16), (64, 64)])
def test_single_precision(built, widths, direction):
    (compiled,) = built("sm_80", direction, "kl", widths, dtype=torch.float32)
    check(compiled, "sm_80", torch.float32)


def test_kernels_over_whole_rows():
    order, factors = plan("backward", "kl")[:2]
    for launch in (order, factors):
        compiled = build(launch, "sm_90")
        assert compiled.spills == 0
        assert compiled.registers <= 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "divergence", "widths", "dtype", "itself", "target"),
    list(
        itertools.product(
            ("forward", "backward"),
            relation._STATS,
            ((8, 16), (4, 6), (12, 12), (45, 45), (32, 64), (64, 64), (128, 128)),
            TYPES,
            (False, True),
            aot.TARGETS,
        )
    ),
)
def test_grid(built, direction, divergence, widths, dtype, itself, target):
    launches = 1 if itself or direction == "forward" else 2
    for compiled in built(
        target, direction, divergence, widths, dtype=dtype, itself=itself, launches=launches
    ):
        check(compiled, target, dtype, spills=10 if max(widths) > 64 or widths[0] % 2 else 0)
