"""Progress: few plain lines without a terminal, bars on one, and an honest time left."""

import io
import re

import pytest

from fastffn import progress as module
from fastffn.progress import Progress, duration

Console = pytest.importorskip("rich.console").Console


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told: `clock[0] += seconds`."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def lines_of(calls, clock, step=0.0):
    file = io.StringIO()
    with Progress(Console(file=file)) as progress:
        assert not progress.live
        for call in calls:
            progress(*call)
            clock[0] += step
    return file.getvalue().splitlines()


def test_a_plain_line_about_every_tenth(clock):
    lines = lines_of([("search", k, 1000, f"candidate {k}") for k in range(1001)], clock)
    assert 10 <= len(lines) <= 12
    assert lines[0].startswith("search") and "0%" in lines[0]
    assert "100%" in lines[-1] and "candidate 1000" in lines[-1]
    assert not any("\x1b" in line for line in lines)


def test_a_plain_line_every_ten_seconds_of_a_slow_phase(clock):
    lines = lines_of([("distil", k, 10_000, "") for k in range(60)], clock, step=1.0)
    assert len(lines) == 6


def test_time_left_counts_from_where_a_resumed_phase_began(clock):
    lines = lines_of([("distil", 800, 1000, ""), ("distil", 900, 1000, "")], clock, step=20.0)
    assert "left" not in lines[0]
    assert "0:20 left" in lines[1]


def test_a_finished_phase_says_so_once(clock):
    lines = lines_of([("text", 1, 1, "done")] * 3, clock, step=20.0)
    assert len(lines) == 1 and "took 0:00" in lines[0]


def test_unknown_total_and_unknown_phase(clock):
    lines = lines_of([("other", 3, 0, "[b]text[/b]")], clock)
    assert "other" in lines[0] and "[b]text[/b]" in lines[0]


def test_bars_on_a_terminal():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=78, _environ={"TERM": "xterm"})
    with Progress(console) as progress:
        assert progress.live
        progress("warmup", 1, 4, "[loss] 0.5")
        progress("warmup", 4, 4, "[loss] 0.25")
        progress("search", 0, 0, "x" * 200)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert "warm-up" in last and "100%" in last and "took 0:00" in last and "[loss] 0.25" in last
    assert "x" * 78 not in last


def test_durations():
    assert [duration(s) for s in (-1, 0.4, 59.6, 725, 3723)] == [
        "0:00",
        "0:00",
        "1:00",
        "12:05",
        "1:02:03",
    ]
