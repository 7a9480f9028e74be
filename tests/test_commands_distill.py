"""`fastffn distill` and `fastffn finetune`: what they hand to the engine, and how they end."""

from pathlib import Path

import pytest

from fastffn import cli

pytestmark = pytest.mark.usefixtures("loud_again")


@pytest.fixture
def engine(monkeypatch):
    """Replaces the engine: the list of (recipe, options) that it is called with."""
    import fastffn.distill

    called = []

    def run(recipe, **options):
        called.append((recipe, options))
        options["progress"]("task", 1, 1, "")
        return {
            "metrics": {"student": {"accuracy": 0.91234, "f1": 0.5}},
            "parameters": {"student": 11_400_000, "teacher": 22_700_000},
            "stages": {
                "general": {
                    "steps": 200,
                    "seconds": 61.2,
                    "seconds_by_part": {"teacher": 30.0, "student": 10.0},
                    "frozen": ["student.a", "student.b", "student.c"],
                }
            },
        }

    monkeypatch.setattr(fastffn.distill, "run", run, raising=False)
    return called


def test_distill_hands_over_a_checked_recipe(engine, tmp_path, capsys):
    words = ["minilmv2", "teacher=DIR", "--out", str(tmp_path / "run"), "--fresh", "seed=3"]
    assert cli.main(["distill", *words, "data.general.text=[a.txt, b.txt]"]) == 0
    ((recipe, options),) = engine
    assert (recipe.name, recipe.seed, recipe.models["teacher"].load) == ("minilmv2", 3, "DIR")
    assert recipe.data["general"].text == ("a.txt", "b.txt")
    assert options["out"] == tmp_path / "run" and options["fresh"] is True
    printed = capsys.readouterr().out
    assert "student: accuracy 0.9123, f1 0.5000" in printed
    assert "student: 11,400,000 parameters, teacher: 22,700,000 parameters" in printed
    assert "stage general: 200 steps in 61 s: teacher 75%, student 25%" in printed
    assert "left as they were: student.a, student.b and 1 more" in printed
    assert f"{tmp_path / 'run'} has the student" in printed


def test_distill_takes_a_file_and_writes_below_runs(engine, tmp_path):
    from fastffn.distill.recipe import shipped

    own = tmp_path / "own.yaml"
    own.write_text(shipped()["finetune"].read_text().replace("name: finetune\n", ""))
    assert cli.main(["distill", str(own), "student=a", "data.task.task=sst2"]) == 0
    ((recipe, options),) = engine
    assert recipe.name == "own" and options["out"] == Path("runs/own") and not options["fresh"]


def test_finetune_is_the_recipe_of_that_name(engine, tmp_path):
    words = ["1e4", "mrpc", "--data-dir", "it's here", "--debug", "stages.task.epochs=2"]
    assert cli.main(["finetune", *words]) == 0
    ((recipe, options),) = engine
    assert recipe.models["student"].load == "1e4" and recipe.stages[0].teacher is None
    assert (recipe.data["task"].task, recipe.data["task"].dir) == ("mrpc", "it's here")
    assert recipe.stages[0].epochs == 2 and options["out"] == Path("runs/finetune-mrpc")


def test_shipped_recipes_are_listed_and_shown(capsys):
    from fastffn.distill.recipe import shipped

    assert cli.main(["distill", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in lines] == list(shipped())
    assert all(len(row.split()) > 5 and row.endswith(".") for row in lines)
    assert cli.main(["distill", "--show", "theseus"]) == 0
    assert capsys.readouterr().out == shipped()["theseus"].read_text()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--list"),
        (["minlm"], "did you mean minilm"),
        (["absent.yaml"], "absent.yaml does not exist"),
        (["minilm", "--list"], "leave minilm out"),
        (["--show", "minlm"], "did you mean minilm"),
        (["soft-label"], "give teacher.load=DIR data.task.task=TASK"),
        (["soft-label", "teacher=x", "data.task.task=sst2", "sead=1"], "did you mean seed?"),
        (["soft-label", "teacher"], "give key.sub=value"),
    ],
)
def test_a_bad_recipe_is_one_line(words, named, engine, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["distill", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1 and named in err
    assert engine == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["demo", "x=1"], ["distill", "minilm", "--outt=x"], ["distill", "--fresh", "a", "b"]]
)
def test_words_that_nothing_takes_are_refused(words, engine, capsys):
    try:
        status = cli.main(words)
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2 and len(capsys.readouterr().err.splitlines()) == 1 and engine == []


def test_an_interrupted_distillation_says_how_to_resume(monkeypatch, tmp_path, capsys):
    import fastffn.distill

    def run(recipe, out, **options):
        (out / "state.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(fastffn.distill, "run", run, raising=False)
    words = ["finetune", "model", "sst2", "--out", str(tmp_path)]
    assert cli.main(words) == 130
    assert capsys.readouterr().err.startswith(f"interrupted: {tmp_path} keeps what is done")
