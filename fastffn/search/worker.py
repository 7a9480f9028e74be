"""Joins a search that another process has started: judges its candidates until it ends.

    run("postgresql://user@host/name")        or the run directory of a search on this machine

What to do stands in the database: the recipe, the stage that is open, how its candidates are
proposed. What it takes must be on this machine: the teacher, the data (paths of the recipe, or
overrides of them), and the run directory with the supernets, on a file system that both machines
see, or as a copy that `out` names. All are compared with what the search itself has: a worker that
judged with other weights or rows would spoil it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastffn.errors import UserError
from fastffn.memory import freed_memory_kept
from fastffn.search.beginning import options
from fastffn.search.evaluation import evaluation, fingerprint
from fastffn.search.ledger import verdict
from fastffn.search.recipe import SearchRecipe
from fastffn.search.space import Space
from fastffn.search.storage import Storage
from fastffn.search.work import work

_PLACES = ("teacher", "student", "models", "data")
_PATHS = ("load", "text", "dir", "train", "validation", "test")  # keys of files and folders
Progress = Callable[[str, float, float, str], None]


def run(
    study: str,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    name: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Works until the search is finished.

    Args:
        study: URL of the search's database, or its run directory.
        out: the run directory as this machine sees it; None: where the search has it.
        overrides: texts "key.sub=value" for paths that differ here, see `recipe.read`.
        name: of the search; None: the only one there.
        progress: called as progress(phase, done, total, text).

    Returns:
        {"name": of the search, "judged": how many candidates this process judged}.

    Raises:
        UserError: no such database or search, or models and data that are not the search's.
        KeyboardInterrupt: passed on; the candidate under way goes to another worker.
    """
    tell = progress or (lambda phase, done, total, text: None)
    storage = Storage(study, create=False)
    name = name or _only(storage)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def evaluator(stage: str, head: Mapping[str, Any], space: Space):
        recipe = SearchRecipe.from_mapping(head["recipe"], overrides)
        _check_paths_alone(head["options"], options(recipe, None))
        folder = Path(out or head["directory"])
        where, theirs = head["supernets"][stage]
        place = where and folder / where  # an absolute path stays as it is
        if place and not place.is_dir():
            raise UserError(
                f"the supernet {place} is not on this machine: give the search's run directory, as "
                "it is seen here, with --out"
            )
        spec = next(one for one in recipe.search if one.name == stage)
        found = evaluation(recipe, spec, place, folder / "work", device, tell)
        if fingerprint(found.made) != theirs:
            raise UserError(
                f"stage {stage}: models or data of this machine are not those of the search: give "
                "the same files"
            )
        return found

    def told(stage: str, record: Mapping[str, Any], done: int, total: int) -> None:
        tell(stage, done, total, verdict(record))

    with freed_memory_kept():
        judged = work(
            storage, evaluator, name, progress=told, say=lambda line: tell("waiting", 0, 1, line)
        )
    return {"name": name, "judged": judged}


def _check_paths_alone(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises a UserError where more than the place of files differs: qualities must compare."""
    for key in sorted({*theirs, *ours}):
        path = key.split(".")[0] in _PLACES and key.rpartition(".")[2] in _PATHS
        if theirs.get(key) != ours.get(key) and not path:
            raise UserError(
                f"{key} is {theirs.get(key)} in the search: a worker may only change where files "
                f"are ({', '.join(_PATHS)})"
            )


def _only(storage: Storage) -> str:
    """The name of the search in a database."""
    names = storage.names()
    heads = [name for name in names if "." not in name and storage.notes(name).get("stages")]
    if len(heads) == 1:
        return heads[0]
    if not heads:
        raise UserError(f"no search in {storage.place}: start one with fastffn search")
    raise UserError(f"{storage.place} has several searches: name one of {', '.join(heads)}")
