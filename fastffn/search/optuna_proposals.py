"""Optuna's samplers as proposal methods, where all that is searched are stacks and ratios.

A sampler works on parameters whose choices are the same in every trial: "layer0.stack" and
"layer0.ratio", the places in the layer's sorted lists, are such; functions, which a grammar grows
without end, are not. So these methods want a space whose functions are given. Every proposal builds
a study in memory from the history, with the merit as the one value (which of several objectives
counts how much is the merit's business), and asks a sampler that was seeded by the study's rng:
nothing is kept in between, so a search that resumes proposes the same.

A sampler knows nothing of the budget. What it asks for outside is told as failed, which leaves no
trace in its model, and it draws again. Why not Optuna's constraints: they let a sampler learn a
border that is known exactly here, and the learning costs candidates.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random
from typing import Any

from ..errors import UserError
from ..expr import Gene
from .budget import Shape
from .merit import Evaluated
from .space import Candidate, Space
from .storage import import_optuna, quiet

_ASKS = 64  # draws of the sampler before chance takes over


class OptunaProposal(ABC):
    """Candidates that an Optuna sampler asks for; a subclass says which.

    Args:
        space: with `functions`.
        warmup: random members, evenly among those in the budget, until that many are finished.

    Raises:
        UserError: the space has no functions; or Optuna is missing.
    """

    def __init__(self, space: Space, warmup: int):
        if space.functions is None:
            raise UserError(
                "Optuna's samplers (tpe, nsga2) search stacks and ratios only: freeze functions "
                "before, or propose by evolution or partition"
            )
        if warmup < 1:
            raise UserError("tpe, nsga2: warmup and population must be at least 1")
        self.space = space
        self.warmup = warmup
        self._optuna = import_optuna()
        self._exprs = [Gene.parse(text, space.base).expr for text in space.functions]
        self._choices: dict[str, list[Any]] = {}
        for layer, shapes in enumerate(space.costs):
            for name in ("stack", "ratio"):
                found = {getattr(shape, name) for shape in shapes}
                self._choices[f"layer{layer}.{name}"] = sorted(found)
        self._distributions = {
            name: self._optuna.distributions.IntDistribution(0, len(values) - 1)
            for name, values in self._choices.items()
        }

    def propose(self, history: Sequence[Evaluated], rng: Random) -> Candidate:
        if len(history) < self.warmup:
            return self.space.random(rng)
        known = {seen.candidate.fingerprint for seen in history}
        with quiet(self._optuna):
            study = self._study(history, self._sampler(rng.randrange(2**32)))
            for _ in range(_ASKS):
                trial = study.ask(self._distributions)
                study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                candidate = self._candidate(trial.params)
                if candidate is not None and candidate.fingerprint not in known:
                    return candidate
        return self.space.random(rng)

    @abstractmethod
    def _sampler(self, seed: int) -> Any: ...

    def _attributes(self, place: int) -> dict[str, Any]:
        """System attributes that the sampler expects of the history's trial at this place."""
        return {}

    def _study(self, history: Sequence[Evaluated], sampler: Any) -> Any:
        study = self._optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(
            self._optuna.create_trial(
                params=self._params(seen.candidate),
                distributions=self._distributions,
                value=seen.merit,
                system_attrs=self._attributes(place),
            )
            for place, seen in enumerate(history)
        )
        return study

    def _params(self, candidate: Candidate) -> dict[str, int]:
        return {
            f"layer{layer}.{name}": self._choices[f"layer{layer}.{name}"].index(getattr(gene, name))
            for layer, gene in enumerate(candidate.genes)
            for name in ("stack", "ratio")
        }

    def _candidate(self, params: dict[str, int]) -> Candidate | None:
        """The member with these parameters, or None if it is none."""
        chosen = {name: values[params[name]] for name, values in self._choices.items()}
        genes = [
            Gene(chosen[f"layer{n}.stack"], chosen[f"layer{n}.ratio"], expr, self.space.base)
            for n, expr in enumerate(self._exprs)
        ]
        shapes = [Shape(gene.stack, gene.ratio, gene.gated) for gene in genes]
        if any(s not in known for s, known in zip(shapes, self.space.costs, strict=True)):
            return None
        return self.space.in_budget(genes)


class TPEProposal(OptunaProposal):
    """Tree-structured Parzen estimators (Bergstra et al., 2011; multivariate)."""

    def __init__(self, space: Space, warmup: int = 10):
        super().__init__(space, warmup)

    def _sampler(self, seed: int) -> Any:
        return self._optuna.samplers.TPESampler(
            n_startup_trials=0, multivariate=True, constant_liar=False, seed=seed
        )


class NSGA2Proposal(OptunaProposal):
    """NSGA-II (Deb et al., 2002); the first generation is random members.

    Args:
        population: size of a generation.
    """

    def __init__(self, space: Space, population: int = 10):
        super().__init__(space, population)
        self.population = population

    def _sampler(self, seed: int) -> Any:
        return self._optuna.samplers.NSGAIISampler(population_size=self.population, seed=seed)

    def _attributes(self, place: int) -> dict[str, Any]:
        key = self._optuna.samplers.NSGAIISampler._get_generation_key()
        return {key: place // self.population}

    def _study(self, history: Sequence[Evaluated], sampler: Any) -> Any:
        study = super()._study(history, sampler)
        for generation in range(1, len(history) // self.population + 1):
            sampler.get_parent_population(study, generation)  # kept; else a recursion finds them
        return study
