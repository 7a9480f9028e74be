"""Runs a recipe: its stages one after the other, resumable at any moment.

    report = run("minilmv2", out="runs/mini", overrides=["teacher=DIR", "data.general.text=a.txt"])

The run directory:

    recipe.yaml                 the recipe as resolved, which can be run again
    state.json                  finished stages with their results
    stages/01-general/          weights of a finished stage (projections too) and its log
    tensorboard/                curves of every loss
    work/                       checkpoints, teacher outputs; removed at the end
    student/                    the result: safetensors, configuration and tokenizer
    report.json                 what was done, on what, how long each part took, and the scores

The same call on a directory that holds an unfinished run of the same recipe goes on where that one
was, and ends with the same weights, bit for bit on a CPU. torchrun makes it several processes;
`batch_size` is that of all together, so that the result does not depend on their number but for
rounding.
"""

import importlib.metadata
import json
import logging
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastffn
from fastffn.distill.checkpoints import writing
from fastffn.distill.outputs import model_fingerprint
from fastffn.distill.preparation import Prepared, prepare
from fastffn.distill.processes import Processes
from fastffn.distill.recipe import Recipe, read
from fastffn.distill.stages import StageRun
from fastffn.errors import UserError
from fastffn.files import write_text_atomic
from fastffn.rundir import RunDirectory, atomic_directory

logger = logging.getLogger(__name__)

_CONTENTS = ("stages", "tensorboard", "student", "students", "recipe.yaml", "report.json")
_VERSIONS = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")
_HOW_NOT_WHAT = ("name", "description", "checkpoint_seconds")  # may differ when a run is resumed


def run(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    progress: Callable[[str, float, float, str], None] | None = None,
) -> dict[str, Any]:
    """Runs what is not finished yet and returns the report.

    Args:
        recipe: a `Recipe`, the path of one, or the name of a shipped one.
        out: the run directory; None: runs/<name of the recipe>.
        overrides: texts "key.sub=value", see `recipe.read`.
        fresh: start over where `out` holds another or a finished run.
        progress: called as progress(phase, done, total, text).

    Returns:
        The report as plain data, which report.json holds too.

    Raises:
        UserError: bad input, before anything is trained; a loss that is not finite.
        KeyboardInterrupt: passed on; the same call resumes.
    """
    if not isinstance(recipe, Recipe):
        recipe = read(recipe, overrides)
    elif overrides:
        raise UserError("overrides are for recipes that are read: change the Recipe instead")
    out = Path(out or Path("runs") / recipe.name)
    progress = progress or (lambda phase, done, total, text: None)
    processes = Processes()
    # Until a checkpoint or the teacher's outputs are there, nothing is lost with another recipe.
    begun = [*(out / "work").glob("*/checkpoint-*"), *(out / "work").glob("outputs-*")]
    free = () if begun else ("data",)
    options = flat(recipe.to_mapping())
    directory = RunDirectory(out, options, fresh, _CONTENTS, free, writes=processes.first)
    if directory.finished:
        if processes.first:
            shutil.rmtree(directory.work, ignore_errors=True)  # of a run killed at its very end
        progress("report", 1, 1, f"finished before: {out} (--fresh starts over)")
        return directory.report
    progress("loading", 0, 1, "models and data")
    made = prepare(recipe, progress)
    progress("loading", 1, 1, "models and data")
    stages = _stage_runs(directory, made, processes)
    _same_inputs(directory, made)
    if processes.first:
        write_text_atomic(out / "recipe.yaml", recipe.to_yaml())
    processes.wait()  # until what another recipe has left is removed
    results = _train(directory, made, stages, progress)
    report = _report(made, processes, results)
    if processes.first:
        with writing(out):
            _save_students(directory, made)
        write_text_atomic(out / "report.json", json.dumps(report, indent=1) + "\n")
    directory.finish(report)
    processes.done()
    return report


def _same_inputs(directory: RunDirectory, made: Prepared) -> None:
    """What a resumed run is made from must be what it began with."""
    now = {f"data.{name}": data.fingerprint for name, data in made.data.items()}
    now |= {name: model_fingerprint(made.models[name]) for name in made.origins}
    before = directory.phase("data", lambda: now)
    for name in now:
        if before.get(name) != now[name]:
            raise UserError(
                f"{name} is not what the run in {directory.path} began with: restore it, or start "
                "over with --fresh"
            )


def _stage_runs(directory: RunDirectory, made: Prepared, processes) -> dict[str, StageRun]:
    """The stages by their names in the run directory; those to come are checked, and the space."""
    helpers: dict = {}
    stages = {}
    for number, stage in enumerate(made.recipe.enabled):
        name = f"{number + 1:02d}-{stage.name}"
        folder, work = directory.path / "stages" / name, directory.work / name
        stages[name] = StageRun(made, stage, number, folder, work, processes, helpers)
    for name, run in stages.items():
        if name in directory.seconds() and (wrong := run.damage()):
            logger.error("%s is not used (%s): the stage is trained again", run.folder, wrong)
            directory.forget(name)
    left = [run for name, run in stages.items() if name not in directory.seconds()]
    for run in left:
        run.check()
    if processes.first:
        _check_space(directory.path, [run.bytes() for run in left])
    return stages


def _check_space(path: Path, sizes: Sequence[int]) -> None:
    """Weights of each stage stay; of the one that trains three checkpoints may be there at a time,
    two whole ones and the one that is being written, with Adam's two averages."""
    needed = sum(sizes) + 9 * max(sizes, default=0)
    at = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(at).free
    if free < needed:
        raise UserError(
            f"weights and checkpoints need {needed / 2**30:.1f} GiB in {path}, "
            f"{free / 2**30:.1f} GiB are free: make room, or choose another directory"
        )


def _train(directory, made, stages: Mapping[str, StageRun], progress) -> dict[str, dict]:
    results = {}
    for number, (name, run) in enumerate(stages.items()):
        made.rebuild(number)
        if name in directory.seconds():
            run.restore()
            progress(run.stage.name, 1, 1, "finished before")
        found = directory.phase(name, lambda run=run: run.train(progress))
        run.clean()
        results[run.stage.name] = {"seconds": directory.seconds()[name], **found}
    return results


def _save_students(directory: RunDirectory, made: Prepared) -> None:
    last = made.recipe.enabled[-1].student
    for name in last:
        path = directory.path / "student" if len(last) == 1 else directory.path / "students" / name
        with atomic_directory(path) as folder:
            made.models[name].save_pretrained(folder)
            made.tokenizers[name].save_pretrained(folder)


def _report(made: Prepared, processes: Processes, results: Mapping[str, Any]) -> dict[str, Any]:
    recipe = made.recipe
    last = recipe.enabled[-1]
    models = {name: made.models[name] for name in (*last.student, last.teacher) if name}
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "precision": recipe.precision,
        "models": made.origins,
        "parameters": {
            name: sum(p.numel() for p in model.parameters()) for name, model in models.items()
        },
        "metrics": results[last.name]["metrics"],
        "stages": dict(results),
        "device": device_name(processes.device),
        "processes": processes.count,
        "versions": versions(),
    }


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Of fastffn, Python and what a run stands on."""
    found = {name: importlib.metadata.version(name) for name in (*_VERSIONS, *more)}
    return {"fastffn": fastffn.__version__, "python": platform.python_version(), **found}


def device_name(device: torch.device) -> str:
    """What a run ran on, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe as dotted keys, so that a difference can be named; without how it is run."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if not prefix and key in _HOW_NOT_WHAT:
            continue
        if isinstance(value, list) and value and all(isinstance(x, Mapping) for x in value):
            value = {str(x.get("name", k)): x for k, x in enumerate(value)}
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
