"""Architecture search: which feed-forward network each layer gets, under a budget.

    space = Space(hidden_size=384, num_layers=3, params=1_000_000)
    result = run(space, evaluate, "runs/search")      # evaluate(genes) -> quality, more is better
    result.genes, result.front

Optuna, which keeps the candidates, is imported when a study is made.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .coarse_to_fine import STAGES, SearchResult, Stage, StageProgress, coarse_to_fine
from .proposals import (
    METHODS,
    Evaluated,
    EvolutionProposal,
    Proposal,
    RandomProposal,
    proposal,
)
from .space import Candidate, Space
from .study import Evaluate, Study, front

__all__ = [
    "METHODS",
    "STAGES",
    "Candidate",
    "Evaluated",
    "EvolutionProposal",
    "Proposal",
    "RandomProposal",
    "SearchResult",
    "Space",
    "Stage",
    "Study",
    "coarse_to_fine",
    "front",
    "proposal",
    "run",
]

_KEYS = ("space", "stages", "seed", "name", "seeds")


def run(
    recipe: Mapping[str, Any] | Space,
    evaluate: Evaluate,
    storage: str | Path | None = None,
    progress: StageProgress | None = None,
    retry: bool = False,
    **overrides: Any,
) -> SearchResult:
    """Searches as the recipe says, coarse to fine; resumes what `storage` holds.

    Args:
        recipe: a space, or a mapping with "space" (see `Space.from_dict`) and optionally "stages"
            (mappings with the fields of `Stage`), "seed", "name" and "seeds".
        evaluate: takes the genes, one per layer; returns the quality, where more is better.
        storage: run directory, database URL, or None for memory only.
        progress: called after each candidate (see `coarse_to_fine`).
        retry: candidates that earlier runs gave up, as their processes ended, are tried again.
        overrides: replace the recipe's entries. "seeds": lists of gene texts, one per layer, judged
            first; without it the plain gelu genes in the budget, the four largest.

    Raises:
        UserError: unknown keys, a seed that is no member, and as `coarse_to_fine`.
    """
    entries = {**({"space": recipe} if isinstance(recipe, Space) else recipe), **overrides}
    unknown = [key for key in entries if key not in _KEYS]
    if unknown:
        raise UserError(f"search: unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}")
    if "space" not in entries:
        raise UserError("search: the recipe has no space")
    space = entries["space"]
    space = space if isinstance(space, Space) else Space.from_dict(space)
    stages = [_stage(stage) for stage in entries.get("stages", STAGES)]
    seeds = entries.get("seeds")
    seeds = space.plain()[:4] if seeds is None else [space.candidate(genes) for genes in seeds]
    return coarse_to_fine(
        space,
        evaluate,
        storage,
        stages,
        seeds,
        seed=entries.get("seed", 0),
        name=entries.get("name", "search"),
        progress=progress,
        retry=retry,
    )


def _stage(values: Stage | Mapping[str, Any]) -> Stage:
    if isinstance(values, Stage):
        return values
    try:
        return Stage(**values)
    except TypeError:
        raise UserError(
            f"search: {dict(values)} is no stage: give name, trials, random, freeze"
        ) from None
