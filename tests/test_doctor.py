"""The doctor's report: complete, plain data, one screen, and honest about what is missing."""

import json
import subprocess
import sys

import pytest
import torch

from fastffn import doctor


@pytest.fixture(scope="module")
def found():
    return doctor.report()


def test_report_is_plain_data(found):
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["cores"] >= 1
    assert bool(found["cuda"]["devices"]) == torch.cuda.is_available()


def test_every_op_says_who_serves_it_and_why(found):
    rows = found["backends"]
    assert "elementwise" in {row["op"] for row in rows}
    assert all(row["backend"] and row["reason"] for row in rows)


def test_instruction_set_is_one_that_runs_here(found):
    extension = found["extension"]
    if not extension["loaded"]:
        pytest.skip(extension["reason"])
    assert extension["isa"] in extension["available_isas"]
    assert extension["available_isas"][-1] == "baseline"
    assert set(extension["available_isas"]) <= set(found["build"]["isas"])


def test_one_screen(found, capsys):
    doctor.print_report()
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 45
    assert torch.__version__ in printed
    assert found["python"] in printed


def test_extension_shares_torchs_openmp():
    """Alone in a process: other libraries bring OpenMP runtimes of their own."""
    pytest.importorskip("threadpoolctl")
    code = (
        "import json; from fastffn import doctor; "
        "print(json.dumps([doctor._extension()['loaded'], doctor._thread_pools()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, pools = json.loads(done.stdout)
    if not loaded:
        pytest.skip("csrc was not built")
    assert len(pools) == 1, pools


def test_failure_shows_its_reason_and_absent_packages_their_extra(found):
    changed = dict(found)
    changed["build"] = {"status": "failed", "error": "a\nb\nx.cpp:1: error: no"}
    changed["extension"] = {"loaded": False, "reason": "No module named 'fastffn._C'"}
    changed["versions"] = {**found["versions"], "optuna": None}
    changed["thread_pools"] = [{"library": "/a/libgomp.so", "threads": 2}] * 2
    text = doctor.format_report(changed)
    assert "x.cpp:1: error: no" in text
    assert "not loaded: No module named 'fastffn._C'" in text
    assert "absent: optuna: pip install 'fastffn[search]'" in text
    assert "two OpenMP runtimes" in text


def test_record_absent_or_broken_is_an_answer(tmp_path):
    path = tmp_path / "_build.json"
    assert doctor.read_build_record(path)["status"] == "absent"
    path.write_text("{")
    assert doctor.read_build_record(path)["status"] == "unreadable"
