"""Proposal methods: given what was evaluated so far, which candidate next.

A method is an object with `propose(history, rng) -> Candidate`. `history` holds the finished
candidates with their quality, oldest first; `rng` is the only source of chance, so a search that
resumes proposes what it would have proposed without the interruption. A method may propose a
candidate that is known already: the study asks again.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple, Protocol

from ..errors import UserError
from .space import Candidate, Space
from .variation import cross, mutate


class Evaluated(NamedTuple):
    """A finished candidate; more quality is better."""

    candidate: Candidate
    quality: float


class Proposal(Protocol):
    """What a study asks for candidates."""

    def propose(self, history: Sequence[Evaluated], rng: Random) -> Candidate: ...


class RandomProposal:
    """Members of the space at random, whatever was seen."""

    def __init__(self, space: Space):
        self.space = space

    def propose(self, history: Sequence[Evaluated], rng: Random) -> Candidate:
        return self.space.random(rng)


class EvolutionProposal:
    """Mutations and crossings of the best seen so far.

    Parents are winners of tournaments among the `population` best. Why the best of all and not the
    latest (regularised evolution): a search of tens or hundreds of candidates cannot afford to
    forget, and judging is repeatable enough not to chase luck.

    Args:
        population: how many of the best may become parents.
        tournament: how many of them are drawn for each parent; the best of these wins.
        crossover: chance of a child of two parents; otherwise one parent is mutated.
        explore: chance of a random member, so that the search can leave a bad neighbourhood.
        warmup: random members until that many are finished.
    """

    def __init__(
        self,
        space: Space,
        population: int = 8,
        tournament: int = 4,
        crossover: float = 0.3,
        explore: float = 0.05,
        warmup: int = 8,
    ):
        if min(population, tournament, warmup) < 1:
            raise UserError("evolution: population, tournament and warmup must be at least 1")
        if min(crossover, explore) < 0 or max(crossover, explore) > 1:
            raise UserError("evolution: crossover and explore are chances between 0 and 1")
        self.space = space
        self.population = population
        self.tournament = tournament
        self.crossover = crossover
        self.explore = explore
        self.warmup = warmup

    def propose(self, history: Sequence[Evaluated], rng: Random) -> Candidate:
        if len(history) < self.warmup or rng.random() < self.explore:
            return self.space.random(rng)
        best = sorted(history, key=lambda seen: -seen.quality)[: self.population]
        first = self._parent(best, rng)
        if len(best) > 1 and rng.random() < self.crossover:
            second = self._parent([seen for seen in best if seen.candidate != first], rng)
            return cross(self.space, first, second, rng)
        return mutate(self.space, first, rng)

    def _parent(self, best: Sequence[Evaluated], rng: Random) -> Candidate:
        drawn = rng.sample(range(len(best)), min(self.tournament, len(best)))
        return best[min(drawn)].candidate  # `best` is in order


METHODS = {"random": RandomProposal, "evolution": EvolutionProposal}


def proposal(method: str | Proposal, space: Space) -> Proposal:
    """The method of that name with its defaults; an object is taken as it is.

    Raises:
        UserError: unknown name.
    """
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise UserError(f"unknown proposal method {method!r}; known: {known}")
    return METHODS[method](space)
