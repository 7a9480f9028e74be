"""A worker's loop: joins whatever stage of a search is open, until the search is finished.

A search has a head, a study whose notes say what goes on: "stages" (names, in order) and, at the
end, "finished". Stage `coarse` of the search `search` is the study `search.coarse`; its note
"open" says that candidates may be judged, and its plan says how many and by which proposals. All of
it is in the database, so a worker needs nothing but its address and something to evaluate with.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .head import HeadWatch
from .judging import Evaluate
from .space import Space
from .storage import AGAIN, Storage
from .study import PLAN, Progress, Study

Evaluators = Callable[[str, Mapping[str, Any], Space], Evaluate]


def work(
    storage: str | Path | Storage,
    evaluators: Evaluators,
    name: str = "search",
    wait: float = 2.0,
    progress: Callable[..., None] | None = None,
    heartbeat: int | None = None,
    say: Callable[[str], None] | None = None,
) -> int:
    """Judges candidates of a search until its head says that it is finished.

    An interrupt (Ctrl-C) ends it; the candidate under way goes to another worker.

    Args:
        storage: run directory or database URL of the search (see `Study`).
        evaluators: called once per stage with its name, the head's notes and the stage's space;
            gives what judges the stage's candidates.
        name: of the search.
        wait: seconds between two looks for work.
        progress: called after each candidate, of any worker, with the stage's name and what
            `Study.run` gives.
        say: called with a line when there is nothing to do since the process that leads the search
            is gone.

    Returns:
        How many candidates this call judged.

    Raises:
        UserError: no such storage or search, or a search that nobody has led for long (10 minutes
            in a run directory, an hour at a URL) with nothing to judge.
        Exception: whatever an evaluation raises.
    """
    place = storage if isinstance(storage, Storage) else Storage(storage, heartbeat, create=False)
    studies: dict[str, Study] = {}
    judged, begun = 0, None
    watch = HeadWatch(name, place.grace)

    def idle(head: dict[str, Any]) -> None:
        if (line := watch.look(head)) and say is not None:
            say(line)
        time.sleep(wait)

    while not (head := place.notes(name)).get("finished"):
        if head.get("begun") != begun:  # started over: other studies, perhaps of the same names
            begun = head.get("begun")
            studies.clear()
        stage, title = _open_stage(place, name, head)
        if stage is None:
            idle(head)
            continue
        if title not in studies:
            studies.clear()  # with what the stage before was judged by
            study = Study.load(place, title)
            study.evaluate = evaluators(stage, head, study.space)
            studies[title] = study
        study = studies[title]
        tell: Progress | None = progress and partial(progress, stage)
        found = study.join(tell, stop=lambda study=study: not study.notes.get("open"))
        judged += found
        if found:
            watch = HeadWatch(name, place.grace)
        else:  # all candidates are settled, and the head has not closed the stage yet
            idle(place.notes(name))
    return judged


def _open_stage(
    place: Storage, name: str, head: Mapping[str, Any]
) -> tuple[str, str] | tuple[None, None]:
    """The first stage that is open and has a plan, and the name of its study."""
    latest = {study.partition(AGAIN)[0]: study for study in place.names()}
    for stage in head.get("stages", ()):
        study = latest.get(f"{name}.{stage}")
        if study and place.notes(study).get("open") and PLAN in place.attributes(study):
            return stage, study
    return None, None
