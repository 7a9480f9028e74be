"""Workers of one search: together they judge what one would, and a dead one costs nothing."""

from search_workers import survive


def test_killed_workers_of_a_run_directory_lose_and_repeat_nothing(tmp_path):
    study = survive(str(tmp_path / "run"), tmp_path / "log", 30, workers=3, kills=4, limit=60)
    assert len({record["worker"] for record in study.candidates()}) > 1
