"""`fastffn search`, its worker and `show`: what they hand to the engine, and how they end."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import fastffn.search
from fastffn import cli

pytestmark = pytest.mark.usefixtures("loud_again")

SMALL = ["small", "teacher=DIR", "data.general.text=[a.txt, b.txt]"]
REPORT = {
    "objectives": ["quality"],
    "genes": ["1x1 down(gelu(up(x)))", "2x1/2 down(relu(up(x)))"],
    "best": {"quality": 0.91234, "params": 1_180_000, "macs": 1_170_000, "latency": None},
    "front": [{}, {}, {}],
    "stages": [
        {
            "name": "coarse",
            "trials": 24,
            "finished": 20,
            "pruned": 3,
            "diverged": 1,
            "seconds": 61.2,
            "candidates_per_minute": 23.53,
        },
        {
            "name": "fine",
            "trials": 5,
            "finished": 5,
            "pruned": 0,
            "diverged": 0,
            "seconds": 2.0,
            "candidates_per_minute": 150.0,
        },
    ],
}


@pytest.fixture
def called(monkeypatch):
    """Stands in for what searches: the list of (function, arguments, options) of its calls."""
    calls = []

    def stand_in(module: str, function: str, result):
        def run(*arguments, **options):
            calls.append((f"{module}.{function}", arguments, options))
            if "progress" in options:
                options["progress"]("coarse", 1, 1, "")
            return result

        modules.setdefault(module, SimpleNamespace())
        setattr(modules[module], function, run)

    modules = {}
    stand_in("engine", "run", REPORT)
    stand_in("engine", "compare", {"methods": {}})
    stand_in("compare", "table", "random 0.1")
    stand_in("worker", "run", {"judged": 7})
    stand_in("show", "show", None)
    for name, module in modules.items():
        monkeypatch.setattr(fastffn.search, name, module, raising=False)
    return calls


def test_search_hands_over_a_checked_recipe(called, tmp_path, capsys):
    words = [*SMALL, "--out", str(tmp_path), "--fresh", "--storage", "sqlite:///x.db", "seed=3"]
    assert cli.main(["search", *words, "search.coarse.trials=12"]) == 0
    ((what, (recipe, out), options),) = called
    assert what == "engine.run" and out == tmp_path
    assert (recipe.name, recipe.seed, recipe.search[0].trials) == ("small", 3, 12)
    assert recipe.distil.models["teacher"].load == "DIR"
    assert recipe.distil.data["general"].text == ("a.txt", "b.txt")
    assert options["storage"] == "sqlite:///x.db" and options["fresh"] is True
    printed = capsys.readouterr().out
    assert "stage coarse: 24 candidates in 61 s, 23.5 a minute, 3 pruned, 1 diverged" in printed
    assert "stage fine: 5 candidates in 2 s, 150.0 a minute\n" in printed
    assert "best: quality 0.9123 with 1,180,000 parameters, 1,170,000 MACs per token\n" in printed
    assert "  layer 1: 2x1/2 down(relu(up(x)))\n" in printed
    assert "front" not in printed and f"fastffn distill {tmp_path / 'student.yaml'}" in printed


def test_search_takes_a_file_and_writes_below_runs(called, tmp_path):
    from fastffn.search.recipe import shipped

    own = tmp_path / "own.yaml"
    own.write_text(shipped()["small"].read_text().replace("name: small\n", ""))
    assert cli.main(["search", str(own), *SMALL[1:], "--debug"]) == 0
    ((_, (recipe, out), options),) = called
    assert recipe.name == "own" and out == Path("runs/own")
    assert options["storage"] is None and options["fresh"] is False


def test_several_objectives_have_a_front():
    from fastffn.commands.search import summary

    best = {**REPORT["best"], "latency": 1250}
    report = {**REPORT, "objectives": ["quality", "latency"], "best": best}
    lines = summary(report, Path("out"))
    assert "best: quality 0.9123 with 1,180,000 parameters, 1,170,000 MACs per token, 1.25 ms" in (
        lines
    )
    assert "3 candidates are on the front of quality and latency" in lines


def test_methods_are_compared(called, capsys):
    words = [*SMALL, "--compare", "random,evolution", "--seeds", "4", "5", "--out", "there"]
    assert cli.main(["search", *words]) == 0
    assert cli.main(["search", *SMALL, "--compare", "evolution, random"]) == 0
    (what, (recipe, *rest), _), table, again, _ = called
    assert what == "engine.compare" and recipe.name == "small"
    assert rest == [Path("there"), ("random", "evolution"), (4, 5)]
    assert table[:2] == ("compare.table", ({"methods": {}},))
    assert again[1][1:] == (Path("runs/small"), ("evolution", "random"), (0, 1, 2))
    assert capsys.readouterr().out.endswith("random 0.1\n")


def test_a_worker_helps_with_a_study(called, capsys):
    words = ["--study", "postgresql://u@h/s", "data.general.text=x", "--out", "run", "teacher=T"]
    words += ["--name", "mine"]
    assert cli.main(["search", "worker", *words]) == 0
    ((what, study, options),) = called
    assert (what, study, options["out"]) == ("worker.run", ("postgresql://u@h/s",), Path("run"))
    assert options["name"] == "mine" and options["overrides"] == [
        "data.general.text=x",
        "teacher=T",
    ]
    assert "7 candidates were judged here" in capsys.readouterr().out


def test_a_study_is_shown(called):
    assert cli.main(["search", "show", "runs/small", "--out", "pictures"]) == 0
    assert called == [("show.show", ("runs/small",), {"out": Path("pictures")})]


def test_shipped_recipes_are_listed_and_shown(capsys):
    from fastffn.search.recipe import shipped

    assert cli.main(["search", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in lines] == list(shipped())
    assert all(len(row.split()) > 5 and row.endswith(".") for row in lines)
    assert cli.main(["search", "--show-recipe", "small"]) == 0
    assert capsys.readouterr().out == shipped()["small"].read_text()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "no recipe given"),
        (["smal"], "did you mean small"),
        (["absent.yaml"], "absent.yaml does not exist"),
        (["small", "--list"], "leave small out"),
        (["--show-recipe", "smal"], "did you mean small"),
        (["small"], "give teacher.load=DIR data.general.text=FILE"),
        ([*SMALL, "sead=1"], "did you mean seed?"),
        ([*SMALL, "search.coarse.trails=1"], "did you mean trials?"),
        ([*SMALL, "space.params=x"], "space.params"),
        ([*SMALL, "teacher"], "give key.sub=value"),
        ([*SMALL, "--compare", "random,evolutoin"], "did you mean evolution?"),
        ([*SMALL, "--compare", "random"], "at least two methods"),
        ([*SMALL, "--compare", "random,evolution", "--fresh"], "--fresh is of a search"),
        ([*SMALL, "--seeds", "1"], "give seed=S"),
        (["worker"], "--study"),
        (["show"], "URL_OR_DIR"),
    ],
)
def test_bad_input_is_one_line(words, named, called, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["search", *words])
    except SystemExit as exit_:
        status = exit_.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.startswith("error: ")
    assert len(err.splitlines()) == 1 and named in err
    assert called == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupted_search_says_how_to_resume(begun, called, monkeypatch, tmp_path, capsys):
    def run(*arguments, **options):
        if begun:
            (tmp_path / "search.sqlite3").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(fastffn.search.engine, "run", run)
    assert cli.main(["search", *SMALL, "--out", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    assert said.startswith(
        f"interrupted: {tmp_path} keeps what is done" if begun else "interrupted before anything"
    )
    monkeypatch.setattr(fastffn.search.worker, "run", run)
    assert cli.main(["search", "worker", "--study", "x"]) == 130
    assert "the candidate under way goes back" in capsys.readouterr().err


def test_an_absent_extra_is_named(called, monkeypatch, capsys):
    def run(*arguments, **options):
        raise ModuleNotFoundError("No module named 'sqlalchemy'", name="sqlalchemy.orm")

    monkeypatch.setattr(fastffn.search.engine, "run", run)
    assert cli.main(["search", *SMALL]) == 2
    assert 'pip install "fastffn[search]"' in capsys.readouterr().err
