"""The learned partition: a tree of classifiers that says where good candidates live.

EfficientBERT (arXiv 2109.07222) searches as LaNAS does (Wang et al., arXiv 1906.06832): what was
judged is split at the median of merit, a classifier learns to tell the better half from the worse
by the candidates' features, and each half is split again. A leaf of this binary tree is a region of
the space; a proposal is a candidate that every classifier on the way to the chosen leaf sends
there. Which leaf is an upper confidence bound's choice: at every node the child with the larger

    value + exploration * sqrt(2 ln N / n)

where `value` is the mean rank (0 to 1) of the child's samples, n how many of them came after the
random warm-up, and N the same of the node. The original has no second term; with it (UCB1, as in
LA-MCTS, arXiv 2007.00708) a region that was always passed over gets its turn.

Ranks and not values, so that one exploration means the same for accuracies and for losses. Counted
after the warm-up, because a split at the median gives both halves equally many samples: only what
the search went for tells a neglected half from a favoured one. Equal merits are no trouble (the
original stops with an error): where the median is the least value, the halves part above it, and
what cannot be parted stays a leaf.

The classifiers are logistic regressions, where the original tunes boosted trees anew each time:
with tens of samples and hundreds of features it is the penalty that matters, and a fit takes
milliseconds.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from ..errors import UserError
from .features import features
from .merit import Evaluated
from .space import Candidate, Space
from .variation import cross, mutate

_DRAWS = 32  # candidates to choose a proposal from
_CHANCE = 0.2  # the part of them that are random members; the others are variations of the best
_PARENTS = 0.25  # the part of the history, from the best down, that is varied
_CROSSED = 0.3  # the part of the variations that have two parents
_PENALTY = 0.1  # scikit-learn's C, of standardised features


class Region(NamedTuple):
    """A node of the tree.

    Attributes:
        value: mean rank of its samples, 0 (worst of all) to 1.
        visits: how many of its samples came after the warm-up.
        classifier: predicts True for the better child; None in a leaf.
        children: the worse and the better one; empty in a leaf.
    """

    value: float
    visits: int
    classifier: Any = None
    children: tuple["Region", ...] = ()

    def path(self, exploration: float) -> list[tuple[Any, int]]:
        """The classifiers down to the chosen leaf, each with the number of the chosen child."""
        if not self.children:
            return []
        total = 2 * math.log(max(self.visits, 1))
        worse, better = (
            child.value + exploration * math.sqrt(total / max(child.visits, 1))
            for child in self.children
        )
        side = int(better >= worse)
        return [(self.classifier, side), *self.children[side].path(exploration)]


class PartitionProposal:
    """Candidates from the region that the classifiers call best.

    Drawn are variations of the best quarter and some random members; of those that are new the one
    that the classifiers on the path are together surest of is proposed. Why not the first that all
    of them accept, as in the original: drawing costs nothing beside judging.

    Args:
        exploration: weight of the bound's second term; 0 is the original, which always goes for the
            better half, 1 is UCB1's own. Tens of candidates are too few to spend on exploring; what
            a little of it changes begins with hundreds.
        warmup: random members until that many are finished.
        leaf: a region splits only if both halves keep that many samples; so the tree gets one level
            deeper whenever the samples double. (The original splits once up to 400, twice up to
            800: leaves of 200.)
        refit: the classifiers are trained anew after every so many candidates (the original: 10).

    Raises:
        UserError: a number that is out of range, or scikit-learn is missing.
    """

    def __init__(
        self,
        space: Space,
        exploration: float = 0.1,
        warmup: int = 10,
        leaf: int = 5,
        refit: int = 1,
    ):
        if exploration < 0:
            raise UserError("partition: exploration must not be negative")
        if min(warmup, leaf, refit) < 1:
            raise UserError("partition: warmup, leaf and refit must be at least 1")
        _import_sklearn()
        self.space = space
        self.exploration = exploration
        self.warmup = warmup
        self.leaf = leaf
        self.refit = refit
        self._fitted: tuple[list[tuple[str, float]], Region] | None = None

    def propose(self, history: Sequence[Evaluated], rng: Random) -> Candidate:
        if len(history) < self.warmup:
            return self.space.random(rng)
        tree = self._tree(history[: len(history) - len(history) % self.refit])
        known = {seen.candidate.fingerprint for seen in history}
        best = sorted(history, key=lambda seen: -seen.merit)[: int(_PARENTS * len(history)) + 2]
        parents = [seen.candidate for seen in best]
        drawn = [self._draw(parents, rng) for _ in range(_DRAWS)]
        fresh = [candidate for candidate in drawn if candidate.fingerprint not in known] or drawn
        return self._surest(fresh, tree.path(self.exploration))

    def _draw(self, parents: Sequence[Candidate], rng: Random) -> Candidate:
        if rng.random() < _CHANCE:
            return self.space.random(rng)
        if len(parents) > 1 and rng.random() < _CROSSED:
            return cross(self.space, *rng.sample(parents, 2), rng)
        return mutate(self.space, rng.choice(parents), rng)

    def _surest(self, drawn: Sequence[Candidate], path: Sequence[tuple[Any, int]]) -> Candidate:
        """The candidate with the largest product of the probabilities along the path."""
        rows = [features(self.space, candidate) for candidate in drawn]
        doubt = [0.0] * len(drawn)  # minus the logarithm of the product
        for classifier, side in path:
            margins = classifier.decision_function(rows).tolist()
            doubt = [d + _doubt(m if side else -m) for d, m in zip(doubt, margins, strict=True)]
        return drawn[min(range(len(drawn)), key=doubt.__getitem__)]

    def _tree(self, history: Sequence[Evaluated]) -> Region:
        """The tree of this history; the last one is kept."""
        key = [(seen.candidate.fingerprint, seen.merit) for seen in history]
        if self._fitted is None or self._fitted[0] != key:
            order = sorted(seen.merit for seen in history)
            samples = [
                _Sample(
                    features(self.space, seen.candidate),
                    bisect_left(order, seen.merit) / max(len(order) - 1, 1),
                    number >= self.warmup,
                )
                for number, seen in enumerate(history)
            ]
            self._fitted = key, self._region(samples)
        return self._fitted[1]

    def _region(self, samples: Sequence["_Sample"]) -> Region:
        value = math.fsum(sample.rank for sample in samples) / max(len(samples), 1)
        visits = sum(sample.searched for sample in samples)
        good = _better_half([sample.rank for sample in samples])
        if min(sum(good), len(good) - sum(good)) < self.leaf:
            return Region(value, visits)
        classifier = _classifier().fit([sample.row for sample in samples], good)
        children = tuple(
            self._region([s for s, mine in zip(samples, good, strict=True) if mine == side])
            for side in (False, True)
        )
        return Region(value, visits, classifier, children)


class _Sample(NamedTuple):
    row: list[float]
    rank: float
    searched: bool


def _doubt(margin: float) -> float:
    """-log(sigmoid(margin)), where exp would overflow too."""
    return max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))


def _better_half(ranks: Sequence[float]) -> list[bool]:
    """Which are at least the (upper) median, or, where that is the least of them, above it."""
    if not ranks:
        return []
    ordered = sorted(ranks)
    median = ordered[len(ordered) // 2]
    if median == ordered[0]:
        return [rank > median for rank in ranks]
    return [rank >= median for rank in ranks]


def _classifier() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=_PENALTY, max_iter=1000))


def _import_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError(
            "the learned partition needs scikit-learn, which is not installed: "
            "pip install 'fastffn[search]'"
        ) from None
