"""What one sees of a search: the report of one under way, tables, the line while it runs."""

import io
import json
import math
import time
from datetime import datetime, timedelta

import pytest
from search_report_example import example

from fastffn.errors import UserError
from fastffn.figures import amount
from fastffn.search import show
from fastffn.search.space import Space
from fastffn.search.study import Study

pytest.importorskip("matplotlib")


# -- the report of a search under way ------------------------------------------------------------


def _judge(genes) -> float:
    return sum("gelu" in str(gene) for gene in genes) + 0.01 * sum(gene.stack for gene in genes)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    space = Space(hidden_size=64, num_layers=2)
    Study(space, _judge, folder, "some.coarse", seed=3).run(14)
    half = Study(space, lambda genes: iter((0.1, math.nan)), folder, "some.fine", seed=3)
    half.run(2)
    return folder


def test_the_report_of_a_search_under_way(searched):
    report = show.collect(searched)
    assert report["name"] == "some" and report["seed"] == 3
    assert [(s["name"], s["trials"], s["finished"]) for s in report["stages"]] == [
        ("coarse", 14, 14),
        ("fine", 2, 0),
    ]
    assert report["stages"][1]["diverged"] == 2
    assert len(report["candidates"]) == 14 and report["candidates"][0]["stage"] == "coarse"
    best = max(report["candidates"], key=lambda record: record["quality"])
    assert report["best"]["quality"] == best["quality"] and report["best"]["stage"] == "coarse"
    assert report["genes"] == report["best"]["genes"]
    assert Space.from_dict(report["space"]).hidden_size == 64
    json.dumps(report)


def test_a_finished_search_is_read_from_its_report(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(example()))
    assert show.collect(tmp_path) == json.loads(json.dumps(example()))


def test_a_report_that_later_candidates_left_behind_is_not_shown(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(example()))
    study = Study(Space(hidden_size=64, num_layers=2), _judge, tmp_path, "more.coarse")
    study.run(2)
    found = show.collect(tmp_path)
    assert len(found["candidates"]) == 2 and "machine" not in found
    (tmp_path / "report.json").write_text(json.dumps({**found, "machine": "some"}))
    assert show.collect(tmp_path)["machine"] == "some"


def test_optuna_tells_which_layers_matter(searched):
    import optuna

    url = f"sqlite:///{searched / 'search.sqlite3'}"
    study = optuna.load_study(study_name="some.coarse", storage=url)
    found = optuna.importance.get_param_importances(study)
    assert set(found) == {f"layer{k}.{what}" for k in (0, 1) for what in ("stack", "ratio")}
    assert max(found, key=found.get).endswith("stack"), "the ratio is worth nothing to the judge"


def test_show_prints_tables_and_draws_pictures(searched, tmp_path):
    pytest.importorskip("rich")
    from rich.console import Console

    text = io.StringIO()
    drawn = show.show(searched, tmp_path / "pictures", Console(file=text, width=120))
    assert {path.parent for path in drawn.values()} == {tmp_path / "pictures"}
    said = text.getvalue()
    report = show.collect(searched)
    for word in ("Search some", "coarse", "fine", "The winner", "Front of quality and params"):
        assert word in said
    assert all(gene in said for gene in report["genes"])
    assert f"{report['best']['params']:,} parameters" in said
    assert "winner.svg" in said


def test_show_without_a_finished_candidate(tmp_path):
    pytest.importorskip("rich")
    from rich.console import Console

    Study(Space(hidden_size=64, num_layers=2), _judge, tmp_path, "new.coarse")
    text = io.StringIO()
    assert show.show(tmp_path, console=Console(file=text, width=100)) == {}
    assert "No candidate is finished yet" in text.getvalue()


def test_tables_fit_a_narrow_terminal_and_name_long_fronts():
    pytest.importorskip("rich")
    from rich.console import Console

    report = example(latency=True, objectives=("quality", "latency"), counts={"coarse": 400})
    text = io.StringIO()
    console = Console(file=text, width=80)
    for part in show.table(report):
        console.print(part)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("Front of quality and latency: ") for line in lines)


@pytest.mark.parametrize(
    "content, message", [("{", "cannot be read"), ("[]", "not the report of a search")]
)
def test_a_broken_report_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=message):
        show.collect(tmp_path)


def test_places_without_a_search(tmp_path):
    with pytest.raises(UserError, match="no search in"):
        show.collect(tmp_path)
    with pytest.raises(UserError, match="no search in"):
        show.collect(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir()), "looking makes nothing"


def test_an_unknown_name_is_told_with_those_that_are_there(searched):
    with pytest.raises(UserError, match=r"some\.coarse"):
        show.collect(searched, "other")


# -- the line while it runs ----------------------------------------------------------------------


def test_status_says_best_front_and_speed_of_this_run(monkeypatch):
    records = example(counts={"coarse": 30})["candidates"]
    finished = [record for record in records if not record["pruned"]]
    best = max(finished, key=lambda record: record["quality"])
    now = time.monotonic()
    monkeypatch.setattr(show.time, "monotonic", lambda: now)
    minute_ago = now - 60
    said = show.status(records, ("quality",), 30, 100, minute_ago, before=18)
    assert said == f"best {best['quality']:.4g} ({amount(best['params'])}), 12 a minute"
    said = show.status(records, ("quality", "params"), 30, 100, minute_ago)
    assert ", front " in said and said.endswith("30 a minute")


def test_status_before_anything_is_known():
    assert show.status([], ("quality",), 0, 100, time.monotonic()) == "0 of 100 judged"


def test_the_seconds_of_a_stage_leave_out_pauses_and_count_workers_once():
    def at(seconds):
        return datetime(2026, 1, 1) + timedelta(seconds=seconds)

    seconds = [(0, 10), (5, 12), (6, 8), (100, 101), (101, 101)]
    spans = [(at(start), at(end)) for start, end in seconds]
    assert show._covered(spans) == show._covered(spans[::-1]) == 13
    assert show._covered([]) == 0
