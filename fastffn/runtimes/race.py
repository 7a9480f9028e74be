"""Times contenders against each other: outputs compared first, then all of them in turn.

A machine drifts, so every contender runs in every round and what is reported are medians over the
rounds with their quartiles; the order is drawn anew for each, so that everyone follows everyone
else as often. What one leaves behind must not be charged to the next: threads that spin after a
call take a core for milliseconds, and caches hold somebody else's weights. So a turn begins with a
pause and, where it is short enough, with a pass that is not timed; then it repeats passes for about
20 ms.

Why not each contender by itself for a second: the first and the last would meet different machines.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .contenders import Batch

_PAUSE = 0.01  # seconds before a turn
_SHORT = 0.2  # seconds of a pass: longer ones need no pass before them
_TURN = 0.02  # seconds that a turn repeats for
# Of a text's hidden states, against float32 in eager torch: the norm of the difference over the
# norm. In bf16 twice what eager torch loses is allowed, and this.
LIMITS = {"fp32": 1e-4, "bf16": 1e-2, "int8": 0.5}


@dataclass
class Timing:
    """Seconds of a pass in each round, and of the first one, which compiles."""

    first: float = 0.0
    rounds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Milliseconds: "ms" (the median), "low" and "high" (quartiles), "first_ms"; "rounds"."""
        low, median, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        found = {"ms": median, "low": low, "high": high, "first_ms": self.first}
        found = {name: round(1e3 * seconds, 4) for name, seconds in found.items()}
        return {**found, "rounds": len(self.rounds)}


def race(
    passes: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int = 5,
    most: int = 50,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Runs every pass in turn, round by round, in random order.

    Args:
        passes: contenders, which have run before.
        seconds: about how long all rounds together may take.
        least, most: rounds.

    Returns:
        Seconds of a pass, in each round.
    """
    once = {name: timed(run, 1, device) for name, run in passes.items()}
    repeat = {name: max(1, min(50, round(_TURN / each))) for name, each in once.items()}
    total = sum(each * (repeat[name] + (each < _SHORT)) + _PAUSE for name, each in once.items())
    count = max(least, min(most, int(seconds / total)))
    times: dict[str, list[float]] = {name: [] for name in passes}
    order, shuffle = list(passes), random.Random(0).shuffle
    for _ in range(count):
        shuffle(order)
        for name in order:
            time.sleep(_PAUSE)
            if once[name] < _SHORT:
                passes[name]()
            times[name].append(timed(passes[name], repeat[name], device))
    return times


def timed(run: Callable[[], object], repeat: int, device: str) -> float:
    """Seconds of one of `repeat` calls in a row, by the clock, the device's work included."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    synchronise(device)
    return (time.perf_counter() - start) / repeat


def synchronise(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def disagreement(found: Tensor, truth: Tensor, batch: Batch) -> float:
    """How far hidden states [B, T, H] are from the truth: of the worst text, at its real tokens,
    the norm of the difference over that of the truth; infinite where they are not finite."""
    if found.shape != truth.shape:
        return float("inf")
    real = batch["attention_mask"].unsqueeze(-1) != 0
    far = (
        torch.where(real, found.to(truth.device).double() - truth.double(), 0)
        .flatten(1)
        .norm(dim=1)
    )
    size = torch.where(real, truth.double(), 0).flatten(1).norm(dim=1)
    worst = (far / size.clamp(min=1e-12)).max().item()
    return worst if worst == worst else float("inf")


def limit(precision: str, eager: float) -> float:
    """The largest disagreement that is let into a race; `eager`: of eager torch in bf16."""
    return LIMITS[precision] + (2 * eager if precision == "bf16" else 0.0)
