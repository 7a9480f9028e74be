"""What a search begins with: its options, checks while nothing is trained yet, its supernets.

What a recipe's file alone can know, `recipe_checks` has refused before; here models and data are
there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastffn.distill.engine import flat
from fastffn.distill.preparation import Prepared
from fastffn.distill.processes import Processes
from fastffn.distill.stages import StageRun
from fastffn.distill.teacher import locate
from fastffn.errors import UserError
from fastffn.search.evaluation import check_score, rest_of, used
from fastffn.search.proposals import proposal
from fastffn.search.recipe import SUPERNET, SearchRecipe
from fastffn.search.recipe_checks import check_fits
from fastffn.search.space import Space, frozen
from fastffn.search.storage import import_optuna, without_password


def options(recipe: SearchRecipe, storage: str | None) -> dict[str, Any]:
    """What decides the result; more trials and time may be given when a search is resumed."""
    values = recipe.to_mapping()
    del values["minutes"]
    for stage in values["search"]:
        del stage["trials"]
    return flat(values) | {"storage": storage and without_password(storage)}


def check_storage(storage: str | None) -> None:
    """Raises a UserError where a database is no URL, or optuna is not installed."""
    import_optuna()
    if storage is not None and "://" not in storage:
        raise UserError(
            f"storage {storage} is no URL such as postgresql://user@host/name: for a file leave it "
            "out, the run directory has one"
        )


def check_loaded(load: str | None) -> None:
    """Raises a UserError where the model that is loaded as the supernet is none."""
    if load is None:
        return
    config = locate(load, SUPERNET)[0] / "config.json"
    if not config.is_file() or not json.loads(config.read_text(encoding="utf-8")).get("supernet"):
        raise UserError(
            f"models.supernet.load: {load} is no supernet: give the folder of one, such as "
            "supernets/coarse/student of a search"
        )


def completed(values: Mapping[str, Any], supernet: nn.Module) -> dict[str, Any]:
    """The space's values with what the supernet says."""
    config = supernet.config
    base = {"hidden_size": config.hidden_size, "base": config.ffn_base}
    base |= {"num_layers": config.num_hidden_layers} | dict(values)
    params, macs = rest_of(supernet, base["num_layers"])
    return {"rest_params": params, "rest_macs": macs} | base


def check_size(space: Space, config: Any) -> None:
    """Raises a UserError where a space is not one of the supernet's, whose configuration it is."""
    check_fits(space, config.supernet)
    for name, theirs in (("hidden_size", config.hidden_size), ("base", config.ffn_base)):
        if getattr(space, name) != theirs:
            raise UserError(f"space.{name} is {getattr(space, name)}, the supernet's is {theirs}")
    if space.num_layers > config.num_hidden_layers:
        raise UserError(
            f"space.num_layers is {space.num_layers}, the supernet has {config.num_hidden_layers}"
        )


def check_members(space: Space, recipe: SearchRecipe) -> None:
    """Raises a UserError where a space has no member, or one of the recipe's seeds is none."""
    space.smallest()
    for number, genes in enumerate(recipe.seeds or ()):
        try:
            space.candidate(genes)
        except UserError as error:
            raise UserError(f"seeds[{number}]: {error}") from None


def check_stages(recipe: SearchRecipe, space: Space, made: Prepared, nowhere: Path) -> None:
    """Raises a UserError for the first stage, of distillation or of the search, that cannot run.

    Args:
        space: of the recipe; has members.
        made: with all stages of the distillation.
        nowhere: a folder; nothing is written there.
    """
    for number, stage in enumerate(made.recipe.enabled):
        StageRun(made, stage, number, nowhere, nowhere, Processes(), {}).check()
    numbers = {stage.name: number for number, stage in enumerate(made.recipe.enabled)}
    for stage in recipe.search:
        used(recipe, stage)
        here = space if stage.freeze is None else frozen(space, space.smallest(), stage.freeze)
        try:
            proposal(stage.proposals, here)
        except UserError as error:
            raise UserError(f"search.{stage.name}.proposals: {error}") from None
        if stage.score.metric == "loss":
            number = numbers[stage.score.stage]
            check_score(stage, made.module(made.recipe.enabled[number], number))
