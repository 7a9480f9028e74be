"""How a case is measured: outputs compared first, then all contenders in turn, in one process.

Machines are noisy and drift, so a figure is the ratio of medians over rounds in which every
contender ran once, in random order. The medians, the ratios, what the first call cost
(compilation) and the conditions stand in pytest-benchmark's file as extra_info, which
`python -m bench report` turns into a table; pytest-benchmark's own columns time fastffn alone.
"""

import ctypes
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Work = Callable[[], Tensor | tuple[Tensor, ...]]


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


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Work) -> float:
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def check_outputs(works: Mapping[str, Work], exact: Work, baseline: str = "eager") -> None:
    """The oracle rule for every contender: at most twice the baseline's error, plus 1e-6 of the
    size.

    Raises:
        AssertionError: a contender's output breaks the rule; its times would mean nothing.
    """

    def tensors(result) -> tuple[Tensor, ...]:
        return (result,) if isinstance(result, Tensor) else tuple(result)

    truths = tensors(exact())
    allowed = [
        2 * (out.double() - true).abs().max() + 1e-6 * true.abs().max()
        for out, true in zip(tensors(works[baseline]()), truths, strict=True)
    ]
    for name, work in works.items():
        for out, true, bound in zip(tensors(work()), truths, allowed, strict=True):
            error = (out.double() - true).abs().max()
            assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"


def interleave(benchmark, works: Mapping[str, Work], ours: str, seconds: float = 2.0) -> None:
    """Times all `works` in turn, round by round, and notes the result as extra_info.

    Args:
        benchmark: pytest-benchmark's fixture.
        works: contenders by name.
        ours: the one whose ratio to the others is reported (above 1: it is faster).
        seconds: about how long the rounds together may take.
    """
    keep_freed_memory()
    times = {name: Timing(timed(work), []) for name, work in works.items()}
    once = sum(min(timed(work) for _ in range(3)) for work in works.values())
    rounds = max(9, min(200, int(seconds / once)))
    order, shuffle = list(works), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)  # everyone follows everyone else as often, and finds the caches they leave
        for name in order:
            times[name].rounds.append(timed(works[name]))
    benchmark.pedantic(works[ours], rounds=5)
    rivals = [name for name in works if name != ours]
    benchmark.extra_info.update(
        median_ms={name: 1e3 * timing.median for name, timing in times.items()},
        first_call_ms={name: 1e3 * timing.first for name, timing in times.items()},
        ratio={name: times[name].median / times[ours].median for name in rivals},
        rounds=rounds,
        threads=torch.get_num_threads(),
    )
