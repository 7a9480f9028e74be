"""The benchmarks' tools: what several runs become, and that a wrong contender is not timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE

ROOT = Path(__file__).resolve().parent.parent


def a_run(path, ratio, extra=()):
    case = {
        "group": "three operations",
        "extra_info": {
            "median_ms": {"fastffn": 2.0, "eager": 2.0 * ratio},
            "first_call_ms": {"fastffn": 3.0},
            "ratio": {"eager": ratio},
            "threads": 2,
        },
    }
    run = {
        "datetime": "2026-01-02T03:04:05",
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "machine_info": {"cpu": {"brand_raw": "A CPU", "count": 2}, "versions": {"torch": "2.13"}},
        "benchmarks": [case, *extra],
    }
    path.write_text(json.dumps(run))
    return str(path)


def report(*arguments):
    command = [sys.executable, "-m", "bench", "report", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


def test_runs_become_one_result_that_reads_back(tmp_path):
    untimed = {"group": "g", "name": "n", "extra_info": {}}
    runs = [a_run(tmp_path / f"{i}.json", r, [untimed]) for i, r in enumerate((1.0, 9.0, 4.0))]
    saved, drawn = tmp_path / "result.json", tmp_path / "result.png"
    done = report(*runs, "--save", str(saved), "--picture", str(drawn))
    assert done.returncode == 0, done.stderr
    assert "| three operations | 2 | 8 | 4.00 |" in done.stdout
    assert "A CPU, 2 cores; torch 2.13; 2026-01-02, 0123456789ab; median of 3 runs" in done.stdout
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert json.loads(saved.read_text())["runs"] == 3
    assert report(str(saved)).stdout == done.stdout


def test_memory_and_those_left_out_are_shown(tmp_path):
    run = tmp_path / "run.json"
    a_run(run, 3.0)
    content = json.loads(run.read_text())
    case = content["benchmarks"][0]
    case["extra_info"]["peak_mib"] = {"fastffn": 1.25, "eager": 512.4}
    case["extra_info"]["floor"] = {"ms": 1.0, "share": 0.5, "products": 0.25}
    alone = {"median_ms": {"fastffn": 7.0}, "first_call_ms": {}, "ratio": {}, "threads": 2}
    alone["left_out"] = {"eager": "it takes 412 GB"}
    content["benchmarks"].append({"group": "long", "extra_info": alone})
    run.write_text(json.dumps(content))
    shown = report(str(run), "--save", str(tmp_path / "saved.json")).stdout
    assert "| three operations | 2 | 6 | 3.00 | 50 % | 1.2 | 512 |" in shown
    assert "| long | 7 |  |  |  |  |  |" in shown
    assert "- long: without eager, it takes 412 GB" in shown
    assert report(str(tmp_path / "saved.json")).stdout == shown
    floor = json.loads((tmp_path / "saved.json").read_text())["cases"][0]["floor"]
    assert floor == {"ms": 1.0, "share": 0.5, "products": 0.25}


@pytest.mark.skipif(sys.platform != "linux", reason="the record of resident memory is Linux's")
def test_peak_memory_counts_what_others_freed():
    sys.path.insert(0, str(ROOT))
    try:
        from bench.memory import peak_mib
    finally:
        sys.path.remove(str(ROOT))
    work = lambda: torch.ones(16 << 20).exp().sum()  # noqa: E731  two tensors of 64 MiB
    assert all(120 < peak_mib(work) < 140 for _ in range(2))
    assert peak_mib(lambda: torch.ones(1 << 10)) < 8


@pytest.mark.parametrize("content", [None, "no json", "[]", "{}"])
def test_what_is_no_result_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    done = report(str(path))
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and str(path) in done.stderr


def test_a_wrong_contender_is_not_timed():
    sys.path.insert(0, str(ROOT))
    try:
        from bench.harness import check_outputs
    finally:
        sys.path.remove(str(ROOT))
    x = torch.linspace(-1, 1, 100)
    works = {"eager": lambda: x.tanh(), "fastffn": lambda: x.tanh() + 1e-4}
    with pytest.raises(AssertionError, match="fastffn: error"):
        check_outputs(works, lambda: x.double().tanh())
    works["fastffn"] = lambda: x.double().tanh().float()
    check_outputs(works, lambda: x.double().tanh())
