"""How many steps each phase gets: its share of the time left, over the time that a step takes.

Speed is measured where the run happens and once: the numbers go to the run directory's plan and a
resumed run keeps them, since another number of steps would be another run. Given beforehand
(`Options.plan`), nothing is measured.

What a phase leaves unused or takes too much shows in the time left at the next decision. The shares
were tried on the demonstration: students gain most from long distillation, and a search with less
than about ten steps for a candidate ranks noise.
"""

import copy
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from fastffn.distill.batches import LengthSampler
from fastffn.distill.cache import TeacherCache
from fastffn.distill.objective import Objective
from fastffn.distill.teacher import Teacher
from fastffn.distill.trainer import distil
from fastffn.errors import UserError

NAMES = (
    *("sentences", "warmup_steps", "candidates", "candidate_steps"),
    *("distil_steps", "baseline_steps"),
)
MEASURE = 0.05  # of the whole time: measuring latency and retention at the end
TEACHER = 0.18  # of the whole time, at most
WARMUP, SEARCH = 0.12, 0.16  # of the time left after the teacher, without measuring
BASELINES = 0.2  # of the time left after the search: all of the short baselines together
LEAST = {
    "sentences": 64,
    "warmup_steps": 2,
    "candidates": 4,
    "candidate_steps": 4,
    "distil_steps": 4,
    "baseline_steps": 2,
}
_CANDIDATES = 24
_PROBE = 8  # batches; two rounds of a supernet's sandwich


def check(plan) -> dict[str, int]:
    """A plan given by the user.

    Raises:
        UserError: an unknown name or a number that is not positive.
    """
    plan = dict(plan or {})
    for name, number in plan.items():
        if name not in NAMES:
            raise UserError(f"plan: {name} is unknown; known: {', '.join(NAMES)}")
        if not isinstance(number, int) or number < 1:
            raise UserError(f"plan: {name} must be a positive integer, not {number}")
    return plan


def steps(name: str, seconds: float, seconds_per_step: float) -> int:
    """Steps that fit in the time, at least the least that make sense."""
    return max(LEAST[name], int(seconds / seconds_per_step))


def candidates(seconds: float, seconds_per_step: float) -> tuple[int, int]:
    """(candidates, steps of each): more time goes to both; judging counts as three steps."""
    least = LEAST["candidate_steps"]
    affordable = seconds / seconds_per_step / (least + 3)
    count = int(min(max(_CANDIDATES, _CANDIDATES * (seconds / 60) ** 0.5), affordable))
    count = max(LEAST["candidates"], count)
    return count, max(least, int(seconds / seconds_per_step / count) - 3)


@torch.inference_mode()
def teacher_tokens_per_second(teacher: Teacher, length: int = 32, batch: int = 128) -> float:
    """Measured on random tokens."""
    ids = torch.randint(teacher.model.config.vocab_size, (batch, length))
    ids = ids.to(teacher.model.device)
    mask = torch.ones_like(ids)
    times = []
    for _ in range(4):  # the first one allocates
        start = time.perf_counter()
        teacher.model(input_ids=ids, attention_mask=mask).last_hidden_state.sum().item()
        times.append(time.perf_counter() - start)
    return ids.numel() / min(times)


def seconds_per_step(
    model: nn.Module,
    cache: TeacherCache,
    objective: Objective,
    numbers: np.ndarray,
    batch_size: int,
    **options: Any,
) -> float:
    """Measured by training a copy on a few batches whose lengths are spread like the text's.

    A few batches need more padding than many, so that what is measured is the time for a token.
    """
    by_length = numbers[np.argsort(cache.lengths[numbers], kind="stable")]
    count = min(len(numbers), _PROBE * batch_size)
    spread = by_length[np.linspace(0, len(numbers) - 1, count).astype(int)]
    times = []

    def tick(done: int, total: int) -> None:
        times.append(time.perf_counter())

    batches = -(-count // batch_size)
    distil(
        copy.deepcopy(model),
        cache,
        objective,
        2 * batches,
        numbers=spread,
        batch_size=batch_size,
        learning_rate=1e-6,
        progress=tick,
        **options,
    )
    # The first pass over the batches allocates; the second one is measured.
    seconds = (times[-1] - times[batches - 1]) / batches
    measured, real = (tokens_per_step(cache.lengths[k], batch_size) for k in (spread, numbers))
    return seconds * real / measured


def tokens_per_step(lengths: np.ndarray, batch_size: int) -> float:
    """Mean over an epoch, padding included."""
    order = np.array(list(LengthSampler(lengths, batch_size)))
    batches = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
    return float(np.mean([len(batch) * lengths[batch].max() for batch in batches]))
