"""The study: nothing is judged twice, nothing finished is lost, whatever dies in between."""

import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
from patience import PATIENCE

from fastffn import search
from fastffn.errors import UserError
from fastffn.expr import Gene
from fastffn.search import Evaluated, EvolutionProposal, Space, Stage, Study

SPACE = Space(hidden_size=120, num_layers=3, params=(60_000, 160_000))


def quality(genes) -> float:
    """A made-up truth: each layer wants a function and a width, and not its neighbour's stack."""
    wanted = (("gelu", 120), ("tanh", 60), ("swish", 40))
    score = 0.0
    for layer, (gene, (op, width)) in enumerate(zip(genes, wanted, strict=True)):
        ops = [node.op for node in gene.expr.walk()]
        score += 0.5 * (op in ops) - 0.05 * abs(len(ops) - 4)
        score -= abs(math.log(gene.stack * gene.width(120) / width)) * 0.3
        if layer and genes[layer - 1].stack == gene.stack:
            score -= 0.1
    return score


def fingerprints(study: Study) -> list[str]:
    return [record["fingerprint"] for record in study.candidates()]


def test_records_are_plain_and_true():
    study = Study(SPACE, quality)
    seen = []
    study.run(8, seeds=SPACE.plain(), progress=lambda *event: seen.append(event))
    records = study.candidates()
    assert json.loads(json.dumps(records)) == records and len(records) == 8
    assert [event[0] for event in seen] == records
    assert [event[1:] for event in seen] == [(done, 8) for done in range(1, 9)]
    for record in records:
        member = SPACE.candidate(record["genes"])
        assert (member.params, member.macs) == (record["params"], record["macs"])
        assert member.fingerprint == record["fingerprint"]
        assert record["quality"] == quality(member.genes)
    plain = [candidate.fingerprint for candidate in SPACE.plain()]
    assert fingerprints(study)[: len(plain)] == plain[:8]
    assert study.best()["quality"] == max(record["quality"] for record in records)


def test_the_front_is_what_none_beats():
    study = Study(SPACE, quality)
    study.run(30)
    records = study.candidates()

    def beaten(a):
        return any(
            b["params"] <= a["params"] and b["quality"] >= a["quality"] and b is not a
            for b in records
        )

    expected = [record for record in records if not beaten(record)]
    assert study.front() == sorted(expected, key=lambda record: record["params"])


def test_nothing_is_judged_twice_and_a_small_space_ends():
    space = Space(hidden_size=24, num_layers=1, functions=("down(gelu(up(x)))",), stacks=(1, 2, 3))
    judged = []
    study = Study(space, lambda genes: judged.append(genes) or len(judged))
    study.run(100, "evolution")
    assert len(judged) == len(set(judged)) == 12  # three stacks, four ratios


def test_evolution_beats_chance():
    def best(method, seed):
        study = Study(SPACE, quality, seed=seed)
        study.run(60, method)
        return study.best()["quality"]

    by_chance = [best("random", seed) for seed in range(16)]
    evolved = [best("evolution", seed) for seed in range(16)]
    # single runs scatter by 0.4; over 16 the mean gains about 0.4 of at most 1.3
    assert mean(evolved) > mean(by_chance) + 0.2


def test_a_resumed_study_proposes_what_an_uninterrupted_one_does(tmp_path):
    whole = Study(SPACE, quality, seed=7)
    whole.run(12, "evolution")
    for trials in (3, 7, 12):
        parts = Study(SPACE, quality, tmp_path, seed=7)
        parts.run(trials, "evolution")
    assert fingerprints(parts) == fingerprints(whole)
    before = len(parts.candidates())
    parts.run(12, "evolution")  # already there
    assert len(parts.candidates()) == before == 12


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_study import SPACE, quality
from fastffn.search import Study

log = open({log!r}, "a", buffering=1)
hang = {hang}

def evaluate(genes):
    global hang
    hang -= 1
    print(*genes, sep=";", end="", file=log, flush=True)
    if not hang:
        print("|killed", file=log)
        time.sleep(600)
    print("|finished", file=log)
    return quality(genes)

Study(SPACE, evaluate, {folder!r}, seed=5).run(14, "evolution")
"""


def test_a_killed_search_keeps_what_is_finished_and_repeats_what_was_not(tmp_path):
    log, folder, tests = tmp_path / "log", str(tmp_path / "run"), str(Path(__file__).parent)
    finished: list[str] = []
    for kills, hang in ((1, 4), (2, 7)):
        script = SCRIPT.format(tests=tests, log=str(log), folder=folder, hang=hang)
        process = subprocess.Popen([sys.executable, "-c", script])
        deadline = time.monotonic() + PATIENCE
        while not log.exists() or log.read_text().count("killed") < kills:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        kept = fingerprints(Study(SPACE, quality, folder, seed=5))
        assert kept[: len(finished)] == finished and len(kept) == len(finished) + hang - 1
        finished = kept

    judged = []
    study = Study(SPACE, lambda genes: judged.append(genes) or quality(genes), folder, seed=5)
    study.run(14, "evolution")
    assert fingerprints(study)[:9] == finished
    lines = log.read_text().splitlines() + [";".join(map(str, g)) + "|finished" for g in judged]
    genes, ends = zip(*(line.split("|") for line in lines), strict=True)
    assert Counter(ends) == {"finished": 14, "killed": 2}
    assert len(set(genes)) == 14
    for place, end in enumerate(ends):  # what was killed comes next
        assert (end == "killed") == (genes[place] in genes[place + 1 : place + 2])

    whole = Study(SPACE, quality, seed=5)  # the same as a search that nobody killed
    whole.run(14, "evolution")
    assert fingerprints(study) == fingerprints(whole)
    assert [r["quality"] for r in study.candidates()] == [r["quality"] for r in whole.candidates()]


DEADLY = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_study import SPACE, quality
from fastffn.search import Study

deadly = SPACE.plain()[0]

def evaluate(genes):
    if genes == deadly.genes:
        os.kill(os.getpid(), signal.SIGKILL)
    return quality(genes)

Study(SPACE, evaluate, {folder!r}).run(3, seeds=[deadly])
"""


def test_a_candidate_that_kills_its_process_is_given_up(tmp_path):
    folder, tests = str(tmp_path / "run"), str(Path(__file__).parent)
    script = DEADLY.format(tests=tests, folder=folder)
    ends = [subprocess.run([sys.executable, "-c", script]).returncode for _ in range(4)]
    assert ends == [-signal.SIGKILL] * 3 + [0]
    study = Study(SPACE, quality, folder)
    assert SPACE.plain()[0].fingerprint not in fingerprints(study)
    assert len(study.candidates()) == 2  # the one given up counts as tried
    assert study.counts() == {
        **{"settled": 3, "finished": 2, "pruned": 0, "diverged": 0, "given_up": 1},
        **{"running": 0, "waiting": 0},
    }
    assert study.reasons() == ["its process ended"]


def test_a_candidate_that_always_raises_is_given_up_and_an_interrupted_one_is_not(tmp_path):
    broken = SPACE.plain()[0]
    raised: list[BaseException] = [*[KeyboardInterrupt()] * 4, *[RuntimeError("memory")] * 3]

    def evaluate(genes):
        if genes == broken.genes:
            raise raised.pop(0)
        return quality(genes)

    while raised:
        with pytest.raises(type(raised[0])):
            Study(SPACE, evaluate, tmp_path).run(3, seeds=[broken])
    study = Study(SPACE, evaluate, tmp_path)
    study.run(3, seeds=[broken])
    assert (study.counts()["finished"], study.counts()["given_up"]) == (2, 1)
    assert study.counts()["diverged"] == 0 and study.reasons() == ["RuntimeError('memory')"]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_error_ends_the_run_and_the_candidate_is_tried_again(tmp_path, error):
    calls = []

    def evaluate(genes):
        calls.append(genes)
        if len(calls) == 3:
            raise error
        return quality(genes)

    study = Study(SPACE, evaluate, tmp_path)
    with pytest.raises(type(error)):
        study.run(5)
    assert len(study.candidates()) == 2
    Study(SPACE, evaluate, tmp_path).run(5)
    assert calls[2] == calls[3]
    assert len(calls) == 6 and len(study.candidates()) == 5


def test_a_diverged_candidate_has_no_quality_and_is_not_tried_again(tmp_path):
    calls = []

    def evaluate(genes):
        calls.append(genes)
        return math.nan if len(calls) % 2 else quality(genes)

    for trials in (3, 6):
        study = Study(SPACE, evaluate, tmp_path)
        study.run(trials, "evolution")
    assert len(calls) == len(set(calls)) == 6
    assert len(study.candidates()) == 3


def test_another_space_is_refused_with_the_difference(tmp_path):
    Study(SPACE, quality, tmp_path).run(1)
    other = Space(hidden_size=120, num_layers=3, params=(60_000, 170_000))
    with pytest.raises(UserError, match=r"params \[60000, 160000\] there, \[60000, 170000\] here"):
        Study(other, quality, tmp_path)
    Study(other, quality, tmp_path, name="other").run(1)  # beside it, under its own name
    assert len(Study(SPACE, quality, tmp_path).candidates()) == 1


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nosuch://host/name", "cannot open the search's database"),
        ("postgresql://user:secret@localhost:1/none", "cannot open the search's database"),
        (__file__, "is a file: give the run directory"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_one_line(place, message):
    with pytest.raises(UserError, match=message) as caught:
        Study(SPACE, quality, place)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_broken_database_file_is_one_line(tmp_path):
    (tmp_path / "search.sqlite3").write_text("this is no database " * 200)
    with pytest.raises(UserError, match="file is not a database"):
        Study(SPACE, quality, tmp_path)


def test_a_shared_database_resumes_too(tmp_path):
    url = f"sqlite:///{tmp_path}/shared.db"
    for trials in (2, 5):
        study = Study(SPACE, quality, url)
        study.run(trials, "evolution")
    assert len(study.candidates()) == 5


def test_results_before_the_first_candidate_are_refused():
    with pytest.raises(UserError, match="no candidate is finished yet"):
        Study(SPACE, quality).best()


def test_evolution_asks_for_sensible_settings_and_names_are_checked():
    with pytest.raises(UserError, match="between 0 and 1"):
        EvolutionProposal(SPACE, crossover=2)
    with pytest.raises(UserError, match="unknown proposal method 'magic'; known: random, evol"):
        Study(SPACE, quality).run(1, "magic")


# -- coarse to fine

STAGES = (Stage("coarse", 14, random=6), Stage("fine", 8, freeze="functions"))


def test_the_fine_stage_keeps_the_coarse_winners_functions(tmp_path):
    judged, events = [], []

    def evaluate(genes):
        judged.append(genes)
        return quality(genes)

    def tell(stage, record, done, total):
        events.append((stage, done, total))

    def run():
        return search.coarse_to_fine(SPACE, evaluate, tmp_path, STAGES, progress=tell)

    result = run()
    assert len(judged) == len(set(judged)) == 22
    coarse = [(*record.items(),) for record in result.candidates if record["stage"] == "coarse"]
    best = max((dict(items) for items in coarse), key=lambda record: record["quality"])
    functions = [Gene.parse(text).expr for text in best["genes"]]
    fine = [record for record in result.candidates if record["stage"] == "fine"]
    assert len(fine) == 8
    for record in fine:
        assert [Gene.parse(text).expr for text in record["genes"]] == functions
    assert result.best["quality"] == max(record["quality"] for record in result.candidates)
    assert [str(gene) for gene in result.genes] == result.best["genes"]
    assert set(result.front[0]) >= {"stage", "genes", "params", "macs", "quality"}
    assert {event[0] for event in events} == {"coarse", "fine"} and events[-1] == ("fine", 8, 8)

    again = run()  # all there already: nothing is judged, the result is the same
    assert len(judged) == 22 and again == result


def test_an_interrupted_search_resumes_in_its_stage(tmp_path):
    judged = []

    def evaluate(genes):
        judged.append(genes)
        if len(judged) == 17:
            raise KeyboardInterrupt
        return quality(genes)

    with pytest.raises(KeyboardInterrupt):
        search.coarse_to_fine(SPACE, evaluate, tmp_path, STAGES)
    result = search.coarse_to_fine(SPACE, evaluate, tmp_path, STAGES)
    assert len(judged) == 23 and len(set(judged)) == 22  # one was interrupted, then repeated
    whole = search.coarse_to_fine(SPACE, quality, None, STAGES)
    assert [r["genes"] for r in result.candidates] == [r["genes"] for r in whole.candidates]


def test_what_another_study_found_is_taken_over():
    first = Study(SPACE, quality)
    first.run(6)
    outside = Space(hidden_size=120, num_layers=3).plain()[0]
    second = Study(SPACE, quality, seed=1)
    second.inherit([*first.history(), Evaluated(outside, 1.0)])
    second.inherit(first.history())
    assert fingerprints(second) == fingerprints(first)
    second.run(4, "evolution")
    assert len(second.candidates()) == 10
    assert len(set(fingerprints(second))) == 10


def test_run_takes_a_recipe_and_overrides():
    recipe = {
        "space": {**SPACE.to_dict(), "params": 150_000},
        "stages": [{"name": "only", "trials": 5}],
    }
    result = search.run(recipe, quality, seeds=[["1x1/2 down(gelu(up(x)))"] * 3])
    assert len(result.candidates) == 5
    assert result.candidates[0]["genes"] == ["1x1/2 down(gelu(up(x)))"] * 3
    by_default = search.run(recipe, quality)
    plain = Space.from_dict(recipe["space"]).plain()
    assert [r["genes"] for r in by_default.candidates[:4]] == [c.texts for c in plain[:4]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": []}, "unknown key 'stage'; known: space"),
        ({"stages": []}, "at least one stage"),
        ({"stages": [{"name": "a", "trails": 3}]}, "is no stage: give name, trials"),
        ({"stages": [Stage("a", 1), Stage("a", 2)]}, "a name of its own"),
        ({"stages": [Stage("a", 1, freeze="shapes")]}, "no earlier stage found a candidate"),
        ({"seeds": [["4x1 down(gelu(up(x)))"] * 3]}, "is outside the budget"),
        ({"seeds": [["1x1 down(gelu(x))"] * 3]}, "up"),
    ],
)
def test_bad_recipes_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        search.run({"space": SPACE, **changes}, quality)


def test_bad_stages_are_refused():
    with pytest.raises(UserError, match="cannot freeze 'width'"):
        Stage("fine", 3, freeze="width")
    with pytest.raises(UserError, match="random 0 to trials"):
        Stage("fine", 3, random=4)


def test_only_diverged_candidates_are_an_error():
    with pytest.raises(UserError, match="all of them diverged"):
        search.run(SPACE, lambda genes: math.nan, stages=[Stage("only", 3)])


def test_optuna_is_imported_late():
    code = "import sys, fastffn.search; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
