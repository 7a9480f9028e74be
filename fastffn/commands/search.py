"""`fastffn search`: architecture searches from the command line.

fastffn search RECIPE [key=value ...] [--out DIR] [--storage URL] [--fresh]
fastffn search RECIPE --compare random,evolution [--seeds 0 1 2]      methods on equal budgets
fastffn search --list | --show-recipe NAME
fastffn search worker --study URL_OR_DIR [--name NAME] [--out DIR] [key=value ...]   helps one
fastffn search show URL_OR_DIR [--out DIR]                             what it has found so far
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastffn.commands.distill import listed
from fastffn.errors import UserError

TWO_WORDS = ("search worker", "search show")


def add(commands: Any, add_command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the three commands; `add_command` is `fastffn.cli`'s way to add one."""
    text = "search the FFNs of a small encoder by a recipe: a shipped one by name, or a file"
    search = add_command(commands, "search", _search, text, _resume_search)
    add = search.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a name, or a YAML file")
    _add_overrides(search, "search.coarse.trials=20")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="run directory; an interrupted search resumes from it (default: below runs/)",
    )
    add(
        "--storage",
        metavar="URL",
        help="database of the candidates, for workers on many machines, such as "
        "postgresql://user@host/name (default: a file in the run directory)",
    )
    add("--fresh", action="store_true", help="forget what an earlier search left in DIR")
    add(
        "--compare",
        type=_names,
        metavar="METHOD,METHOD",
        help="compare these methods of proposing, with equal budgets, in the first stage",
    )
    add("--seeds", nargs="+", type=int, metavar="S", help="of --compare (default: 0 1 2)")
    shown = search.add_mutually_exclusive_group()
    shown.add_argument("--list", action="store_true", help="list the shipped recipes")
    shown.add_argument("--show-recipe", metavar="NAME", help="print a recipe's file")

    text = "judge candidates of a search that another process has started"
    worker = add_command(commands, TWO_WORDS[0], _worker, text, _resume_worker)
    add = worker.add_argument
    _add_overrides(worker, "data.general.text=/here/wiki.txt.gz: paths of this machine")
    where = "the search's database, or its run directory"
    add("--study", required=True, metavar="URL_OR_DIR", help=where)
    add("--name", metavar="NAME", help="of the search, where the database has several")
    add("--out", type=Path, metavar="DIR", help="the search's run directory on this machine")

    text = "show what a search has found so far: table and pictures"
    show = add_command(commands, TWO_WORDS[1], _show, text)
    show.add_argument("place", metavar="URL_OR_DIR", help=where)
    show.add_argument(
        "--out", type=Path, metavar="DIR", help="of the pictures (default: the run directory)"
    )


def _add_overrides(command: argparse.ArgumentParser, example: str) -> None:
    text = f"changes a value of the recipe, such as {example}"
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


# -- the search ----------------------------------------------------------------------------------


def _search(arguments: argparse.Namespace) -> int:
    if arguments.list or arguments.show_recipe:
        if arguments.recipe:
            said = f"--list and --show-recipe run nothing: leave {arguments.recipe} out"
            raise UserError(said)
        print(_listed() if arguments.list else _text(arguments.show_recipe))
        return 0
    if arguments.recipe is None:
        raise UserError("no recipe given: name one, see fastffn search --list, or give a file")
    _check_compare(arguments)
    _quiet(arguments)
    from fastffn.progress import Progress
    from fastffn.search import engine
    from fastffn.search.recipe import read

    recipe = read(arguments.recipe, arguments.overrides)
    compared = arguments.compare
    if arguments.out is None:
        arguments.out = Path("runs") / recipe.name
    if compared:
        from fastffn.search import compare

        seeds = tuple(arguments.seeds or (0, 1, 2))
        with Progress() as progress:
            found = engine.compare(recipe, arguments.out, compared, seeds, progress=progress)
        print(compare.table(found))
        return 0
    options = {"storage": arguments.storage, "fresh": arguments.fresh}
    with Progress() as progress:
        report = engine.run(recipe, arguments.out, progress=progress, **options)
    print("\n".join(summary(report, arguments.out)))
    return 0


def _check_compare(arguments: argparse.Namespace) -> None:
    """Refuses what would say nothing, and methods that do not exist."""
    if arguments.compare is None:
        if arguments.seeds:
            raise UserError("--seeds are of --compare: for one search give seed=S")
        return
    for name in ("storage", "fresh"):
        if getattr(arguments, name):
            raise UserError(f"--{name} is of a search: leave it out with --compare")
    from fastffn.distill.recipe_fields import choice
    from fastffn.search.proposals import METHODS

    for name in arguments.compare:
        if name not in METHODS:
            raise UserError(f"--compare: {name} is unknown: {choice(name, METHODS)}")
    if len(set(arguments.compare)) < 2:
        raise UserError("--compare: give at least two methods, such as random,evolution")


def summary(report: Mapping[str, Any], out: Path) -> list[str]:
    """What a search has found, in lines."""
    lines = [_of_stage(stage) for stage in report["stages"]]
    best = report["best"]
    costs = [f"{best['params']:,} parameters", f"{best['macs']:,} MACs per token"]
    if best.get("latency") is not None:
        costs.append(f"{best['latency'] / 1000:.2f} ms")
    lines.append(f"best: quality {best['quality']:.4f} with {', '.join(costs)}")
    lines += [f"  layer {layer}: {gene}" for layer, gene in enumerate(report["genes"])]
    if len(report["objectives"]) > 1:
        named = " and ".join(report["objectives"])
        lines.append(f"{len(report['front'])} candidates are on the front of {named}")
    lines.append(
        f"{out} has genes.yaml, the student's recipe and report.json; fastffn search show {out} "
        f"draws them, fastffn distill {out / 'student.yaml'} trains the student"
    )
    return lines


def _of_stage(stage: Mapping[str, Any]) -> str:
    left = {name: stage.get(name, 0) for name in ("pruned", "diverged", "given_up")}
    ended = "".join(f", {n} {name.replace('_', ' ')}" for name, n in left.items() if n)
    if stage.get("reasons"):
        ended += f" ({stage['reasons'][0]}); the same command tries these again"
    judged = stage["finished"] + sum(left.values())
    return (
        f"stage {stage['name']}: {judged} candidates in {stage['seconds']:.0f} s, "
        f"{stage['candidates_per_minute']:.1f} a minute{ended}"
    )


def _resume_search(arguments: argparse.Namespace) -> str:
    out = arguments.out
    if out is None or not out.is_dir() or not any(out.iterdir()):
        return " before anything was done; run the same command again"
    return f": {out} keeps what is done; run the same command again to resume"


# -- others --------------------------------------------------------------------------------------


def _worker(arguments: argparse.Namespace) -> int:
    _quiet(arguments)
    from fastffn.progress import Progress
    from fastffn.search import worker

    options = {name: getattr(arguments, name) for name in ("out", "overrides", "name")}
    with Progress() as progress:
        report = worker.run(arguments.study, progress=progress, **options)
    print(f"the search is finished; {report['judged']} candidates were judged here")
    return 0


def _resume_worker(arguments: argparse.Namespace) -> str:
    return ": the candidate under way goes back to the search; run the same command to help again"


def _show(arguments: argparse.Namespace) -> int:
    _quiet(arguments)
    from fastffn.search import show

    show.show(arguments.place, out=arguments.out)
    return 0


def _quiet(arguments: argparse.Namespace) -> None:
    if not arguments.debug:
        from fastffn.quiet import quiet

        quiet()


def _text(name: str) -> str:
    from fastffn.search.recipe import locate

    return locate(name).read_text(encoding="utf-8").rstrip()


def _listed() -> str:
    from fastffn.search.recipe import shipped

    return listed(shipped())
