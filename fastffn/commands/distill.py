"""`fastffn distill` and `fastffn finetune`: recipes from the command line.

fastffn distill RECIPE [key=value ...] [--out DIR] [--fresh]
fastffn distill --list | --show NAME
fastffn finetune MODEL TASK [key=value ...]     the recipe finetune, with its two values given
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastffn.errors import UserError


def add(commands: Any, add_command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds both commands; `add_command` is `fastffn.cli`'s way to add one."""
    text = "run a distillation recipe: a shipped one by name, or a file"
    distill = add_command(commands, "distill", _distill, text, _resume)
    distill.add_argument("recipe", nargs="?", metavar="RECIPE", help="a name, or a YAML file")
    _add_common(distill)
    shown = distill.add_mutually_exclusive_group()
    shown.add_argument("--list", action="store_true", help="list the shipped recipes")
    shown.add_argument("--show", metavar="NAME", help="print a recipe's file: all it can be given")

    text = "fine-tune a model on a task: what teachers and baselines are made by"
    finetune = add_command(commands, "finetune", _finetune, text, _resume)
    finetune.add_argument("model", metavar="MODEL", help="a directory or a hub name")
    finetune.add_argument("task", metavar="TASK", help="a known task, such as sst2, or a YAML file")
    _add_common(finetune)
    finetune.add_argument(
        "--data-dir",
        metavar="DIR",
        help="the task's files, or the folder above them (default: FASTFFN_DATA, else the hub)",
    )


def _add_common(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="changes a value of the recipe, such as stages.general.steps=200",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="run directory; an interrupted run resumes from it (default: below runs/)",
    )
    add("--fresh", action="store_true", help="forget what an earlier run left in DIR")


def _distill(arguments: argparse.Namespace) -> int:
    if arguments.list or arguments.show:
        if arguments.recipe:
            raise UserError(f"--list and --show run nothing: leave {arguments.recipe} out")
        print(_listed() if arguments.list else _text(arguments.show))
        return 0
    if arguments.recipe is None:
        raise UserError("no recipe given: name one, see fastffn distill --list, or give a file")
    return _run(arguments, arguments.recipe, arguments.overrides, "")


def _finetune(arguments: argparse.Namespace) -> int:
    # As YAML text, so that a folder called 1e4 stays one.
    given = [f"student.load={_quoted(arguments.model)}"]
    given.append(f"data.task.task={_quoted(arguments.task)}")
    if arguments.data_dir is not None:
        given.append(f"data.task.dir={_quoted(arguments.data_dir)}")
    return _run(
        arguments, "finetune", [*given, *arguments.overrides], f"-{Path(arguments.task).stem}"
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _run(arguments: argparse.Namespace, name: str, overrides: list[str], suffix: str) -> int:
    if not arguments.debug:
        from fastffn.quiet import quiet

        quiet()
    from fastffn import distill
    from fastffn.distill.processes import is_first
    from fastffn.distill.recipe import read
    from fastffn.progress import Progress

    recipe = read(name, overrides)
    if arguments.out is None:
        arguments.out = Path("runs") / f"{recipe.name}{suffix}"
    options = {"out": arguments.out, "fresh": arguments.fresh}
    if not is_first():  # one of several processes speaks
        distill.run(recipe, **options)
        return 0
    with Progress() as progress:
        report = distill.run(recipe, progress=progress, **options)
    print("\n".join(summary(report, arguments.out)))
    return 0


def summary(report: Mapping[str, Any], out: Path) -> list[str]:
    """What a run has found, in lines."""
    sizes = report["parameters"]
    lines = [line for name, stage in report["stages"].items() for line in _of_stage(name, stage)]
    for name, metrics in report["metrics"].items():
        values = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        lines.append(f"{name}: {values}")
    lines.append(", ".join(f"{name}: {size:,} parameters" for name, size in sizes.items()))
    lines.append(f"{out} has the student, the recipe as it was run, and report.json")
    return lines


def _of_stage(name: str, stage: Mapping[str, Any]) -> list[str]:
    """How long a step took, part by part, and what did not learn."""
    parts = stage["seconds_by_part"]
    total = sum(parts.values())
    lines = []
    if total > 0:
        shares = ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in parts.items())
        lines.append(f"stage {name}: {stage['steps']} steps in {stage['seconds']:.0f} s: {shares}")
    if frozen := stage["frozen"]:
        more = f" and {len(frozen) - 2} more" if len(frozen) > 2 else ""
        named = ", ".join(frozen[:2]) + more
        lines.append(f"stage {name}: not reached by its losses, so left as they were: {named}")
    return lines


def _resume(arguments: argparse.Namespace) -> str:
    if arguments.out is None or not (arguments.out / "state.json").exists():
        return " before anything was done; run the same command again"
    return f": {arguments.out} keeps what is done; run the same command again to resume"


def _text(name: str) -> str:
    from fastffn.distill.recipe import locate

    return locate(name).read_text(encoding="utf-8").rstrip()


def _listed() -> str:
    from fastffn.distill.recipe import shipped

    return listed(shipped())


def listed(recipes: Mapping[str, Path]) -> str:
    """Recipes by name, each with the first sentence of its description."""
    from fastffn.distill.recipe_yaml import parse_file

    found = {name: parse_file(path)[0]["description"] for name, path in recipes.items()}
    width = max(map(len, found))
    return "\n".join(f"{name:{width}}  {_sentence(text)}" for name, text in found.items())


def _sentence(text: str) -> str:
    return f"{text.partition('. ')[0].rstrip('.')}."
