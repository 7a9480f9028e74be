"""A database that several searches share: whose studies are whose, and what is written where."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("optuna")

import optuna
from tiny_recipes import Files
from tiny_searches import search

from fastffn.errors import UserError
from fastffn.search import Space, Study, engine, show, worker
from fastffn.search.storage import Storage

STAGES = [{"name": "coarse", "trials": 2, "train": "proxy", "supernet": "warmup"}]
FEW = [
    {"name": "warmup", "student": "supernet", "subnetworks": 3},
    {"name": "proxy", "student": "candidate"},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("database") / "files")


def recipe(files, **proxy):
    return search(files, STAGES, [FEW[0], FEW[1] | proxy])


def test_a_search_of_the_same_name_with_other_options_is_refused_and_fresh_replaces_it(
    files, tmp_path
):
    url = f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    one = engine.run(recipe(files), tmp_path / "one", storage=url)
    other = recipe(files, learning_rate=0.05)
    with pytest.raises(UserError, match=r"called tiny .* \(stages.proxy.learning_rate was"):
        engine.run(other, tmp_path / "other", storage=url)
    assert show.collect(url)["candidates"] == one["candidates"]
    found = engine.run(other, tmp_path / "other", storage=url, fresh=True)
    assert [r["number"] for r in found["candidates"]] == [0, 1]
    before, after = ([r["quality"] for r in each["candidates"]] for each in (one, found))
    assert before != after


def test_passwords_are_kept_nowhere(files, tmp_path):
    url = "postgresql://me:sesame@localhost:1/none?sslpassword=sesame"
    with pytest.raises(UserError) as caught:
        engine.run(recipe(files), tmp_path / "run", storage=url)
    assert "sesame" not in str(caught.value)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any(b"sesame" in path.read_bytes() for path in written)


def test_what_only_looks_makes_no_database(tmp_path):
    url = f"sqlite:///{tmp_path / 'none.sqlite3'}"
    for look in (show.collect, worker.run):
        with pytest.raises(UserError, match="no search in sqlite"):
            look(url)
    assert not [*tmp_path.iterdir()]
    Storage(url)  # has tables, but no search
    with pytest.raises(UserError, match="no search in sqlite"):
        worker.run(url)


def test_a_storage_that_is_no_url_is_refused(files, tmp_path):
    with pytest.raises(UserError, match="storage here is no URL such as postgresql"):
        engine.run(recipe(files), tmp_path / "run", storage="here")
    assert not [*tmp_path.iterdir()]


def test_a_worker_may_change_paths_and_nothing_else():
    theirs = {"teacher.load": "a", "stages.proxy.learning_rate": 0.1, "data.general.text": ["b"]}
    ours = theirs | {"teacher.load": "c", "data.general.text": ["d"]}
    worker._check_paths_alone(theirs, ours)
    with pytest.raises(UserError, match=r"proxy\.learning_rate is 0.1 in the search: a worker"):
        worker._check_paths_alone(theirs, ours | {"stages.proxy.learning_rate": 1.0})


def test_starting_over_leaves_what_is_not_ours_and_waits_for_nobody(files, tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    engine.run(recipe(files), tmp_path / "one", storage=url)
    storage = Storage(url)
    optuna.create_study(storage=storage.backend, study_name="tiny.sweep")
    storage.remove("tiny")
    assert storage.names() == ["tiny.sweep"]
    theirs = optuna.create_study(storage=storage.backend, study_name="tiny")
    theirs.add_trial(optuna.create_trial(value=1.0))
    storage.remove("tiny")
    with pytest.raises(UserError, match="has a study called tiny that is no search's"):
        engine.run(recipe(files), tmp_path / "two", storage=url)
    assert len(theirs.trials) == 1


def test_a_search_is_not_removed_under_a_worker(tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    other = Storage(url)

    def evaluate(genes):
        with pytest.raises(UserError, match="judges a candidate of search in"):
            other.remove("search")
        return 1.0

    study = Study(Space(24, 1), evaluate, url, "search.coarse")
    study.run(1)
    other.remove("search")
    assert other.names() == []


def test_a_result_that_cannot_be_stored_is_a_database_that_was_lost(tmp_path, monkeypatch):
    study = Study(Space(24, 1), lambda genes: 1.0, tmp_path, heartbeat=1)
    database = study._storage._database
    store, failures = type(database).set_trial_state_values, []

    def fail_once(self, number, state, values=None):
        if state.name == "COMPLETE" and not failures:
            failures.append(number)
            raise optuna.exceptions.StorageInternalError("no space left")
        return store(self, number, state, values)

    monkeypatch.setattr(type(database), "set_trial_state_values", fail_once)
    with pytest.raises(UserError, match="lost the search's database"):
        study.run(3)
    study.run(3)  # the same process goes on: nobody waits for itself
    assert study.counts()["finished"] == 3
