"""The command line: how each kind of failure ends, and that bad input leaves nothing behind."""

import importlib.util
import json
import logging
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from patience import PATIENCE
from report_example import example

from fastffn import Expr, UserError, cli

for _needed in ("transformers", "optuna", "rich", "matplotlib"):
    pytest.importorskip(_needed)


pytestmark = pytest.mark.usefixtures("loud_again")


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
        (["distil"], "distil"),
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
    line = 'error: sklearn.tree is not installed: pip install "fastffn[train]"\n'
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


def test_interrupt_says_how_to_resume(pipeline, tmp_path, capsys):
    def run(options, progress):
        (options.out / "state.json").touch()
        raise KeyboardInterrupt

    pipeline(run)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 130
    err = capsys.readouterr().err
    assert err.startswith(f"interrupted: {tmp_path} ") and "same command again to resume" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_run_in_order(sent, tmp_path):
    code = """
def run(options, progress):
    import time
    try:
        print("running", flush=True)
        time.sleep(600)
    finally:
        print("closed", flush=True)
"""
    process = started(code, stdout=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout.readline() == "running\n"
    process.send_signal(sent)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert out == "closed\n"
    assert err == "interrupted before anything was done; run the same command again\n"


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
    assert process.wait(timeout=PATIENCE) == 141


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


# -- bad input, through the real pipeline --------------------------------------------------------

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] one two three four five six seven eight nine".split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny teacher, text, and files and directories that are neither."""
    import transformers

    folder = tmp_path_factory.mktemp("inputs")
    sizes = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20}
    config = transformers.BertConfig(vocab_size=16, num_hidden_layers=2, **sizes)
    transformers.BertModel(config).save_pretrained(folder / "teacher")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder / "teacher")
    decoder = transformers.GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=16)
    transformers.GPT2Model(decoder).save_pretrained(folder / "decoder")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("precious")
    (folder / "empty.txt").touch()
    numbers = WORDS[5:]
    sentences = [
        f"{numbers[k % 9]} {numbers[k // 9 % 9]} {numbers[k // 81 % 9]} {numbers[k % 7]}."
        for k in range(400)
    ]
    (folder / "text.txt").write_text("\n".join(sentences))
    return folder


BAD = {
    "missing text": ("{1} --text {0}/absent.txt", "absent.txt does not exist"),
    "empty text": ("{1} --text {0}/empty.txt", "0 sentences"),
    "unknown teacher": ("--teacher {0}/absent --text {0}/text.txt", "absent does not exist"),
    "empty teacher": ("--teacher {0}/empty --text {0}/text.txt", "cannot be loaded"),
    "no encoder": ("--teacher {0}/decoder --text {0}/text.txt", "is no BERT-like encoder"),
    "impossible budget": (
        "{1} --text {0}/text.txt --budget-params 100",
        "no student meets the budget of 100",
    ),
    "absent layer": ("{1} --text {0}/text.txt --layers 0,7", "not 7"),
    "no time": ("{1} --text {0}/text.txt --minutes 0", "positive"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, inputs, tmp_path, capsys):
    text, said = BAD[case]
    out = tmp_path / "run"
    good = f"--budget-params 8k --teacher {inputs}/teacher"
    assert cli.main(["demo", *text.format(inputs, good).split(), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and said in err
    assert list(tmp_path.iterdir()) == []


def test_bad_input_in_a_process_of_its_own(inputs, tmp_path):
    """As a person meets it: nothing that a library says at import or exit is in between."""
    command = [sys.executable, "-m", "fastffn.cli", "demo", "--teacher", str(inputs / "decoder")]
    done = subprocess.run(
        [*command, "--out", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_other_things_is_left_alone(inputs, capsys):
    full = inputs / "full"
    assert cli.main(["demo", "--fresh", "--teacher", "x", "--out", str(full)]) == 2
    assert "choose another directory" in capsys.readouterr().err
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]


def test_a_wrong_option_costs_no_earlier_run(inputs, tmp_path, capsys):
    """--fresh removes the run that is there once the new one has passed its checks."""
    from fastffn.compress.options import Options
    from fastffn.rundir import RunDirectory

    RunDirectory(tmp_path, Options().identity()).phase("text", lambda: {"digest": "before"})
    before = (tmp_path / "state.json").read_text()
    absent = str(inputs / "absent")
    assert cli.main(["demo", "--fresh", "--teacher", absent, "--out", str(tmp_path)]) == 2
    assert (tmp_path / "state.json").read_text() == before


def test_demo_from_end_to_end_and_again(inputs, tmp_path, capsys):
    """A tiny encoder through every phase; the same command again works for free."""
    from fastffn import EfficientBertModel

    out = tmp_path / "run"
    text = f"demo --teacher {inputs}/teacher --text {inputs}/text.txt --minutes 0.02 --out {out}"
    command = [*text.split(), "--budget-params", "8k"]
    own = [sys.executable, "-m", "fastffn.cli", *command]
    done = subprocess.run(own, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "What each part brings" in done.stdout and "{'loss'" not in done.stdout
    names = {"report.json", "report.md", "state.json", "student"}
    assert names <= {path.name for path in out.iterdir()}
    found = json.loads((out / "report.json").read_text())
    student = found["student"]
    assert student["params_without_word_embeddings"] <= 8000
    for part in ("no_search", "no_relations", "vectors_only"):
        assert -1 <= found["baselines"][part]["spearman"] <= 1
    model = EfficientBertModel.from_pretrained(out / student["path"])
    assert sum(p.numel() for p in model.parameters()) == student["params"]
    assert cli.main(command) == 0
    assert "finished before" in capsys.readouterr().out
    assert json.loads((out / "report.json").read_text()) == found
