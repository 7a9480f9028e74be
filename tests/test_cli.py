"""The command line: how each kind of failure ends, and that bad input leaves nothing behind."""

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from report_example import example

from fastffn import Expr, UserError, cli

for _needed in ("transformers", "optuna", "rich", "matplotlib"):
    pytest.importorskip(_needed)


@pytest.fixture(autouse=True)
def loud_again(monkeypatch):
    """`quiet` changes the whole process; the next test gets it as it was."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with warnings.catch_warnings():
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def pipeline(monkeypatch):
    """Replaces the pipeline: `pipeline(function)` runs that instead."""

    def replace(run):
        fake = types.ModuleType("fastffn.compress.pipeline")
        fake.run = run
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        import fastffn.compress

        monkeypatch.setattr(fastffn.compress, "pipeline", fake, raising=False)

    return replace


def raises(error):
    def run(options, progress):
        raise error

    return run


def started(code: str, **more) -> subprocess.Popen:
    """Another Python; its pipeline is what `code` defines as `run`."""
    program = f"""
import sys, types
{code}
fake = types.ModuleType("fastffn.compress.pipeline")
fake.run = run
sys.modules[fake.__name__] = fake
import fastffn.compress
fastffn.compress.pipeline = fake
from fastffn import cli
sys.exit(cli.main(sys.argv[1:]))
"""
    return subprocess.Popen(
        [sys.executable, "-c", program, "demo"], stderr=subprocess.PIPE, text=True, **more
    )


# -- what needs no command ---------------------------------------------------------------------


def test_help_waits_for_nothing():
    code = (
        "import sys; sys.argv = ['fastffn', '--help']\n"
        "from fastffn import cli\n"
        "try: cli.main()\n"
        "finally: print(*sorted({'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules)),"
        " file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "demo" in done.stdout and "doctor" in done.stdout
    assert done.stderr.strip() == ""


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("fastffn 0.")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["distill"], "distill"),
        (["demo", "--minutes", "soon"], "soon"),
        (["demo", "--budget-params", "2.4X"], "2.4X"),
        (["demo", "--layers", "0;2"], "0;2"),
        (["demo", "--sead", "1"], "--sead"),
    ],
)
def test_wrong_usage_is_one_line(arguments, named, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and named in err and "--help" in err


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    assert "elementwise" in capsys.readouterr().out


def test_bench_needs_a_checkout(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli.fastffn, "__file__", str(tmp_path / "fastffn" / "__init__.py"))
    assert cli.main(["bench"]) == 2
    assert "source checkout" in capsys.readouterr().err


def test_bench_passes_on_what_pytest_says(monkeypatch):
    ran = []

    def run(command, **more):
        ran.append(command)
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(subprocess, "run", run)
    assert cli.main(["bench", "--", "-k", "nothing"]) == 5
    assert ran[0][1:4] == ["-m", "pytest", "bench"] and ran[0][-2:] == ["-k", "nothing"]
    assert len(ran) == 1  # no report of what failed


# -- how a command ends --------------------------------------------------------------------------


def test_demo_hands_over_its_options_and_writes_the_report(pipeline, tmp_path, capsys):
    seen = []

    def run(options, progress):
        seen.append(options)
        progress("text", 1, 1, "read")
        return example()

    pipeline(run)
    out = tmp_path / "run"
    text = "demo --teacher t --text a b --budget-params 2.4M --embedding-size 128 --layers 0,2,5"
    more = f"--minutes 2.5 --seed 3 --ablate --fresh --keep-cache --out {out}"
    assert cli.main([*text.split(), *more.split()]) == 0
    (options,) = seen
    assert (options.teacher, options.text) == ("t", (Path("a"), Path("b")))
    assert (options.budget_params, options.embedding_size) == (2_400_000, 128)
    assert (options.layers, options.minutes, options.seed) == ((0, 2, 5), 2.5, 3)
    assert options.ablate and options.fresh and options.keep_cache
    assert options.out == out
    found = json.loads((out / "report.json").read_text())
    assert found["retention"]["spearman"] == example()["retention"]["spearman"]
    printed, errors = capsys.readouterr()
    assert "Teacher and student" in printed and str(out / "report.md") in printed
    assert errors == ""


def test_user_error_is_one_line(pipeline, capsys):
    pipeline(raises(UserError("the teacher is\nno encoder: give another")))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "error: the teacher is no encoder: give another\n"


def test_expression_error_points_at_the_character(pipeline, capsys):
    def run(options, progress):
        Expr.parse("add(a, tan(b))")

    pipeline(run)
    assert cli.main(["demo"]) == 2
    first, text, caret = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert text[caret.index("^") :].startswith("tan")


def test_debug_shows_the_traceback(pipeline, capsys):
    pipeline(raises(UserError("no encoder")))
    assert cli.main(["demo", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1] == "error: no encoder"


def test_absent_extra_names_its_remedy(pipeline, capsys, monkeypatch):
    pipeline(raises(ModuleNotFoundError("No module named 'sklearn'", name="sklearn.tree")))
    assert cli.main(["demo"]) == 2
    line = 'error: sklearn.tree is not installed: pip install "fastffn[search]"\n'
    assert capsys.readouterr().err == line
    find = importlib.util.find_spec
    monkeypatch.setattr(cli.util, "find_spec", lambda name: None if name == "rich" else find(name))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == 'error: rich is not installed: pip install "fastffn[demo]"\n'


def test_unusable_file_is_one_line(pipeline, capsys, tmp_path):
    pipeline(lambda options, progress: (tmp_path / "absent").read_text())
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {tmp_path / 'absent'}: No such file or directory\n"


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes"), ModuleNotFoundError("x", name="fastffn.absent"), OSError("?")]
)
def test_defect_shows_its_traceback_and_where_to_report(error, pipeline, capsys):
    pipeline(raises(error))
    assert cli.main(["demo"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "report it" in err.splitlines()[-1]


def test_interrupt_says_how_to_resume(pipeline, capsys):
    pipeline(raises(KeyboardInterrupt()))
    assert cli.main(["demo", "--out", "some/run"]) == 130
    err = capsys.readouterr().err
    assert err.startswith("interrupted: some/run ") and "same command again to resume" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_run_in_order(sent):
    code = """
def run(options, progress):
    import time
    print("running", flush=True)
    try:
        time.sleep(60)
    finally:
        print("closed", flush=True)
"""
    process = started(code, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "running\n"
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == "closed\n"
    assert err.startswith("interrupted: ") and len(err.splitlines()) == 1


def test_closed_pipe_is_quiet():
    code = """
def run(options, progress):
    for k in range(100000):
        progress("phase %d" % k, 1, 1, "x" * 100)
"""
    process = started(code, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 141


def test_other_libraries_are_quiet_but_their_errors_are_not(pipeline, caplog, capfd):
    def run(options, progress):
        import transformers

        logger = transformers.utils.logging.get_logger("transformers.something")
        logger.warning("advice")
        logger.error("broken")
        warnings.warn("old", FutureWarning, stacklevel=1)
        raise UserError("enough")

    pipeline(run)
    assert cli.main(["demo"]) == 2
    assert caplog.messages == ["broken"]
    assert "old" not in capfd.readouterr().err


def test_debug_lets_everybody_speak(pipeline, caplog):
    def run(options, progress):
        logging.getLogger("transformers").warning("advice")
        raise UserError("enough")

    pipeline(run)
    assert cli.main(["demo", "--debug"]) == 2
    assert caplog.messages == ["advice"]
