"""Evolution: mutations and crossings of the best candidates seen so far."""

from collections.abc import Sequence
from random import Random

from ..errors import UserError
from .merit import Evaluated
from .space import Candidate, Space
from .variation import cross, mutate


class EvolutionProposal:
    """Mutations and crossings of the best seen so far.

    Parents are winners of tournaments among the `population` of largest merit; with several
    objectives these are the front and what is nearest to it. Why the best of all and not the latest
    (regularised evolution, arXiv 1802.01548): a search of tens or hundreds of candidates cannot
    afford to forget, and judging is repeatable enough not to chase luck.

    Args:
        population: how many of the best may become parents.
        tournament: how many of them are drawn for each parent; the best of these wins.
        crossover: chance of a child of two parents; otherwise one parent is mutated.
        explore: chance of a random member, so that the search can leave a bad neighbourhood.
        warmup: random members until that many are finished.

    Raises:
        UserError: a number below 1, or a chance outside 0 to 1.
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
        best = sorted(history, key=lambda seen: -seen.merit)[: self.population]
        first = self._parent(best, rng)
        if len(best) > 1 and rng.random() < self.crossover:
            second = self._parent([seen for seen in best if seen.candidate != first], rng)
            return cross(self.space, first, second, rng)
        return mutate(self.space, first, rng)

    def _parent(self, best: Sequence[Evaluated], rng: Random) -> Candidate:
        drawn = rng.sample(range(len(best)), min(self.tournament, len(best)))
        return best[min(drawn)].candidate  # `best` is in order
