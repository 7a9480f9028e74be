"""Seconds of each part of a training step, on a CPU by the clock and on a GPU by its events.

Events are read when somebody asks, so that measuring never makes the host wait for the device.
"""

import contextlib
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """`with watch("student"): ...` adds to that part.

    Attributes:
        device: where the work runs.
    """

    def __init__(self, device: str = "cpu"):
        self.device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._add(part, start, self._now())

    def add(self, part: str, seconds: float) -> None:
        """Time that was measured otherwise."""
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    def mark(self) -> object:
        """A moment, for `since`."""
        return self._now()

    def since(self, part: str, moment: object) -> None:
        """Adds the time from a moment until now to a part."""
        self._add(part, moment, self._now())

    def seconds(self) -> dict[str, float]:
        """Of each part since the last call; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for part, start, end in self._events:
            self.add(part, start.elapsed_time(end) / 1000)
        taken, self._seconds, self._events = self._seconds, {}, []
        return taken

    def _now(self):
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, part: str, start, end) -> None:
        if self.device == "cuda":
            self._events.append((part, start, end))
        else:
            self.add(part, end - start)
