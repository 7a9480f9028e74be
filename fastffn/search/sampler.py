"""Candidates as Optuna sees them: stack and ratio of every layer are parameters of its trials.

A trial comes with its genes and these parameters, so that Optuna's dashboard, importances and
plots work on a search; the sampler therefore samples nothing. It signs each trial for this process
the moment that it is taken, before the first heartbeat: a worker that dies right then is found too.

Why functions are no parameters: a categorical parameter must name its choices beforehand, and
refuses others later.
"""

from collections.abc import Sequence

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler

from ..expr import Gene
from . import liveness
from .ledger import OWNER
from .space import Space


class GeneSampler(BaseSampler):
    """Optuna's sampler of a study.

    Attributes:
        distributions: "layer0.stack" (integers) and "layer0.ratio" (texts) and so on, each with
            what the space allows that layer; the same for all trials of a study.
    """

    def __init__(self, space: Space):
        self.distributions: dict[str, BaseDistribution] = {}
        for layer, shapes in enumerate(space.costs):
            stacks = sorted({shape.stack for shape in shapes})
            ratios = [str(ratio) for ratio in sorted({shape.ratio for shape in shapes})]
            self.distributions[f"layer{layer}.stack"] = CategoricalDistribution(stacks)
            self.distributions[f"layer{layer}.ratio"] = CategoricalDistribution(ratios)

    def params(self, genes: Sequence[Gene]) -> dict[str, int | str]:
        """The parameters of a candidate, with the keys of `distributions`."""
        found: dict[str, int | str] = {}
        for layer, gene in enumerate(genes):
            found[f"layer{layer}.stack"] = gene.stack
            found[f"layer{layer}.ratio"] = str(gene.ratio)
        return found

    def before_trial(self, study, trial) -> None:
        study._storage.set_trial_user_attr(trial._trial_id, OWNER, liveness.signature())

    def infer_relative_search_space(self, study, trial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study, trial, search_space) -> dict[str, int | str]:
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution):
        raise RuntimeError(f"{param_name}: a candidate's parameters come with its trial")
