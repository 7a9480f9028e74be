"""How a case is measured: outputs compared first, then all contenders in turn, in one process.

Machines are noisy and drift, so a figure is the ratio of medians over rounds in which every
contender ran once, in random order. The medians, the ratios, what the first call cost
(compilation) and the conditions stand in pytest-benchmark's file as extra_info, which
`python -m bench report` turns into a table; pytest-benchmark's own columns time fastffn alone.

The floor of a case is what the machine cannot go below: its bytes over the bandwidth of a copy, or
its FLOPs over the rate of a large matrix product, both measured in the same process.
"""

import ctypes
import functools
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fastffn.ops.matmul import linear

from .memory import peak_mib

Work = Callable[[], Tensor | tuple[Tensor, ...]]
_CUDA_SECONDS = 1e-3  # on a GPU, calls are repeated between two events for about so long


@dataclass
class Timing:
    """Seconds of each round, and of the first call."""

    first: float
    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def keep_freed_memory() -> None:
    """Tells glibc to hand freed memory out again instead of returning it to the system.

    Otherwise a contender pays for page faults (2 microseconds per 4 KiB on a virtual machine, more
    than the work itself) according to what the one before it freed. All contenders share the
    setting; it is what a long-running process has with any caching allocator.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


class _Recorder:
    """Takes what `interleave` notes, where pytest-benchmark's fixture is not."""

    def __init__(self):
        self.group = ""
        self.extra_info = {}

    def pedantic(self, work: Work, rounds: int) -> None:
        pass


def _record(run: Callable, arguments: tuple) -> tuple[str, dict]:
    recorder = _Recorder()
    run(recorder, *arguments)
    return recorder.group, recorder.extra_info


def in_fresh_process(benchmark, run: Callable, *arguments) -> None:
    """run(benchmark, *arguments), in a process that no other case has left its memory to."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        benchmark.group, info = pool.submit(_record, run, arguments).result()
    benchmark.extra_info.update(info)
    benchmark.pedantic(lambda: None, rounds=1)


def timed(work: Work, repeat: int = 1) -> float:
    """Seconds of one call. On a GPU of `repeat` calls in a row, by events: without the launches,
    as far as these keep ahead of the device."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeat):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeat


def first_call(work: Work) -> float:
    """Seconds by the clock, with everything that the first call makes ready."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@functools.cache
def bandwidth(device: str) -> float:
    """Bytes per second, read and written, of copying 256 MiB."""
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), 10) for _ in range(10))
    return 2 * source.nbytes / seconds


@functools.cache
def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product, by the library that `ffn` uses."""
    size = 4096 if device == "cuda" else 1024
    x, w = (torch.zeros(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: linear(x, w), 10) for _ in range(10))


def floor_seconds(device: str, dtype: torch.dtype, traffic: int = 0, flops: int = 0) -> float:
    """The larger of both floors of a case that moves `traffic` bytes and does `flops`."""
    return max(traffic / bandwidth(device), flops / product_rate(device, dtype) if flops else 0.0)


def works_of(
    functions: Mapping[str, Callable], inputs: Sequence[Tensor], grad: Tensor | None
) -> dict[str, Work]:
    """Per contender: its outputs, or, with a gradient of the output, its inputs' gradients."""

    def work(function: Callable) -> Work:
        def forward():
            with torch.no_grad():
                return function(*inputs)

        def training():
            return torch.autograd.grad(function(*inputs), inputs, grad)

        return forward if grad is None else training

    return {name: work(function) for name, function in functions.items()}


def losses_of(functions: Mapping[str, Callable], inputs: Sequence[Tensor]) -> dict[str, Work]:
    """Per contender, each a function of the inputs to a scalar: that, and the inputs' gradients."""

    def work(function: Callable) -> Work:
        def training():
            loss = function(*inputs)
            return loss.detach(), *torch.autograd.grad(loss, inputs)

        return training

    return {name: work(function) for name, function in functions.items()}


def modes(device: str) -> list[str | None]:
    """Of torch.compile, to compare with."""
    return [None] if device == "cpu" else [None, "max-autotune"]


def compiled(function: Callable, device: str) -> dict[str, Callable]:
    """torch.compile of `function` in each mode, by name."""
    return {
        f"torch.compile{f' {mode}' if mode else ''}": torch.compile(function, mode=mode)
        for mode in modes(device)
    }


def check_outputs(
    works: Mapping[str, Work], exact: Work, baseline: str = "eager"
) -> dict[str, float]:
    """The oracle rule for every contender: at most twice the baseline's error, plus 1e-6, both
    relative to the size of their output and as the worst over all outputs.

    The worst, because of functions with a kink: among millions of values a few lie so close to it
    that rounding chooses the side, for each contender others; they move single gradients by whole
    units. (The tests hold every output to the rule by itself.)

    Returns:
        Seconds of each contender's first call, which compiles.

    Raises:
        AssertionError: a contender's output breaks the rule; its times would mean nothing.
    """
    first: dict[str, float] = {}

    def tensors(result) -> tuple[Tensor, ...]:
        return (result,) if isinstance(result, Tensor) else tuple(result)

    truths = tensors(exact())

    def error(name: str) -> float:
        outputs: list[Tensor] = []
        first[name] = first_call(lambda: outputs.extend(tensors(works[name]())))
        pairs = zip(outputs, truths, strict=True)
        return max(
            ((out.double() - true).abs().max() / true.abs().max()).item() for out, true in pairs
        )

    errors = {name: error(name) for name in works}
    allowed = 2 * errors[baseline] + 1e-6
    for name, found in errors.items():
        assert found <= allowed, f"{name}: error {found:.3g}, allowed {allowed:.3g}"
    return first


def interleave(
    benchmark,
    works: Mapping[str, Work],
    ours: str,
    seconds: float = 2.0,
    floor: float | Mapping[str, float] = 0.0,
    first: Mapping[str, float] | None = None,
    least: int = 9,
    keep_memory: bool = True,
) -> None:
    """Times all `works` in turn, round by round, and notes the result as extra_info.

    Args:
        benchmark: pytest-benchmark's fixture.
        works: contenders by name.
        ours: the one whose ratio to the others is reported (above 1: it is faster).
        seconds: about how long the rounds together may take.
        floor: seconds that no contender can go below, see `floor_seconds`; 0: unknown. Several by
            name: the share of each is noted, and the largest is the floor.
        first: seconds of first calls that were made before, as `check_outputs` returns them.
        least: rounds, if they take longer than `seconds`.
        keep_memory: see `keep_freed_memory`; False: as the process has it.
    """
    if keep_memory:
        keep_freed_memory()
    seen = first or {}
    times = {
        name: Timing(seen[name] if name in seen else first_call(work), [])
        for name, work in works.items()
    }
    once = {name: min(timed(work) for _ in range(3)) for name, work in works.items()}
    repeat = dict.fromkeys(works, 1)
    if torch.cuda.is_available():
        repeat = {name: max(1, math.ceil(_CUDA_SECONDS / once[name])) for name in works}
    total = sum(once[name] * repeat[name] for name in works)
    rounds = max(least, min(200, int(seconds / total)))
    order, shuffle = list(works), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)  # everyone follows everyone else as often, and finds the caches they leave
        for name in order:
            times[name].rounds.append(timed(works[name], repeat[name]))
    benchmark.pedantic(works[ours], rounds=5)
    rivals = [name for name in works if name != ours]
    benchmark.extra_info.update(
        median_ms={name: 1e3 * timing.median for name, timing in times.items()},
        first_call_ms={name: 1e3 * timing.first for name, timing in times.items()},
        ratio={name: times[name].median / times[ours].median for name in rivals},
        rounds=rounds,
        threads=torch.get_num_threads(),
    )
    if floor:
        named = floor if isinstance(floor, Mapping) else {}
        longest = max(named.values()) if named else floor
        benchmark.extra_info["floor"] = {
            "ms": 1e3 * longest,
            "share": longest / times[ours].median,
            **{name: each / times[ours].median for name, each in named.items()},
        }
    peaks = {name: peak_mib(work) for name, work in works.items()}
    if None not in peaks.values():
        benchmark.extra_info["peak_mib"] = peaks
