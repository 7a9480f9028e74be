"""Proposal methods: given what was evaluated so far, which candidate next.

A method is an object with `propose(history, rng) -> Candidate`. `history` holds the finished
candidates, oldest first, with quality and merit; `rng` is the only source of chance, so a search
that resumes proposes what it would have proposed without the interruption. A method may propose a
candidate that is known already: the study asks again.

What a recipe says is a name or a mapping, {method: partition, exploration: 0.3}: the options are
the keyword arguments of the method's class.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Protocol

from ..distill.recipe_fields import choice, convert
from ..errors import UserError
from .evolution import EvolutionProposal
from .merit import Evaluated
from .optuna_proposals import NSGA2Proposal, TPEProposal
from .partition import PartitionProposal
from .space import Candidate, Space


class Proposal(Protocol):
    """What a study asks for candidates."""

    def propose(self, history: Sequence[Evaluated], rng: Random) -> Candidate: ...


class RandomProposal:
    """Members of the space at random, whatever was seen."""

    def __init__(self, space: Space):
        self.space = space

    def propose(self, history: Sequence[Evaluated], rng: Random) -> Candidate:
        return self.space.random(rng)


METHODS = {
    "random": RandomProposal,
    "evolution": EvolutionProposal,
    "partition": PartitionProposal,
    "tpe": TPEProposal,
    "nsga2": NSGA2Proposal,
}


def proposal(method: str | Mapping[str, Any] | Proposal, space: Space) -> Proposal:
    """The method that a name or a mapping describes; an object is taken as it is.

    Args:
        method: a name of `METHODS`, or {"method": name} with options beside it.

    Raises:
        UserError: an unknown name or option, an option of the wrong type or out of range, or a
            space that the method cannot search.
    """
    if not isinstance(method, str | Mapping):
        return method
    made, options = described(method)
    return made(space, **options)


def described(method: str | Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """The class and the options of a method; whether their values make sense, the class knows.

    Raises:
        UserError: an unknown name or option, or an option of the wrong type.
    """
    options = {"method": method} if isinstance(method, str) else dict(method)
    name = options.pop("method", None)
    if name not in METHODS:
        close = difflib.get_close_matches(str(name), METHODS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown proposal method {name!r}; known: {', '.join(METHODS)}{hint}")
    known = {
        option.name: option.annotation
        for option in inspect.signature(METHODS[name]).parameters.values()
        if option.name != "space"
    }
    for key in options:
        if key not in known:
            raise UserError(f"proposal method {name}: unknown option {key!r}: {choice(key, known)}")
    taken = {key: convert(known[key], value, (name, key)) for key, value in options.items()}
    return METHODS[name], taken
