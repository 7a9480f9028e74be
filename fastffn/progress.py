"""Progress of a long run: a bar for each phase with the time left, plain lines without a terminal.

A run calls `progress(phase, done, total, text)` as often as it likes; here is decided what is shown
of it. On a terminal rich draws one bar for each phase. In a pipe, a log or a dumb terminal a phase
prints a line at its start, about every tenth of it or every ten seconds, and at its end.

Why an own estimate of the time left: a phase that resumes starts in its middle, and what an earlier
run did must not count as speed.
"""

import time
from dataclasses import dataclass, field

TITLES = {  # what a phase is called on screen
    "text": "text",
    "teacher": "teacher outputs",
    "warmup": "warm-up",
    "search": "search",
    "distil": "distillation",
    "baselines": "baselines",
    "measure": "measurement",
}
_WIDTH = max(map(len, TITLES.values()))
_FRACTION, _SECONDS = 0.1, 10.0  # a plain line for every such step


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `1:02:03`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@dataclass
class _Phase:
    """One phase: where it stood when this run met it, and what was printed last."""

    name: str
    origin: float  # `done` at the first call
    start: float = field(default_factory=lambda: time.monotonic())
    done: float = 0.0
    total: float = 0.0
    finished: bool = False
    printed: tuple[float, float] | None = None  # fraction and time of the last plain line
    task: object = None  # rich's handle

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name)

    @property
    def fraction(self) -> float:
        return min(1.0, max(0.0, self.done / self.total)) if self.total > 0 else 0.0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def time_text(self) -> str:
        """Time left, or what a finished phase took; empty while nothing is known."""
        if self.finished:
            return f"took {duration(self.elapsed)}"
        if self.done <= self.origin or self.total <= 0:
            return ""
        left = self.elapsed * (self.total - self.done) / (self.done - self.origin)
        return f"{duration(left)} left"


class Progress:
    """Shows progress on `console`; use it as a context manager and call it.

    Args:
        console: a rich Console; None: standard output.
    """

    def __init__(self, console=None):
        from rich.console import Console

        self.console = console or Console()
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._phases: dict[str, _Phase] = {}
        self._bars = None

    def __enter__(self) -> "Progress":
        if self.live:
            self._bars = _bars(self.console)
            self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, phase: str, done: float, total: float, text: str = "") -> None:
        """Tells that `done` of `total` (any unit, 0: unknown) of a phase is behind us.

        Args:
            phase: its name; a new name is a new phase.
            text: what there is to say now, such as a loss; one short line.
        """
        state = self._phases.get(phase)
        if state is None:
            state = self._phases[phase] = _Phase(phase, origin=done)
        state.done, state.total = done, total
        state.finished = total > 0 and done >= total
        if self._bars is not None:
            self._draw(state, text)
        elif not self.live:
            self._print(state, text)

    def _draw(self, state: _Phase, text: str) -> None:
        fields = {"when": state.time_text(), "text": text}
        total = state.total if state.total > 0 else None
        if state.task is None:
            state.task = self._bars.add_task(state.title, total=total, **fields)
        self._bars.update(state.task, completed=min(state.done, state.total), total=total, **fields)

    def _print(self, state: _Phase, text: str) -> None:
        now = time.monotonic()
        if state.printed is not None:
            fraction, moment = state.printed
            if fraction >= 1.0:
                return
            due = state.fraction - fraction >= _FRACTION or now - moment >= _SECONDS
            if not (due or state.finished):
                return
        state.printed = (state.fraction, now)
        line = f"{state.title:<{_WIDTH}}  {state.fraction:4.0%}  {state.time_text():<12}  {text}"
        print(line.rstrip(), file=self.console.file, flush=True)


def _bars(console):
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    return Bars(
        TextColumn("{task.description}", table_column=Column(min_width=_WIDTH, no_wrap=True)),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[when]}", table_column=Column(min_width=12, no_wrap=True)),
        TextColumn(
            "{task.fields[text]}",
            style="dim",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        console=console,
        expand=True,
        refresh_per_second=4,
    )
