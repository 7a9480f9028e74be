"""Made-up qualities of genes, and a search without a study around it, for tests of proposals."""

import math
from collections.abc import Callable
from dataclasses import replace
from random import Random

from fastffn.search import Space
from fastffn.search.merit import Evaluated, merits, values

SPACE = Space(hidden_size=120, num_layers=3, params=(60_000, 160_000))
SHAPES = replace(SPACE, functions=("down(gelu(up(x)))",) * 3)  # only stacks and ratios are searched


def quality(genes) -> float:
    """Each layer wants a function and a width, short functions, and not its neighbour's stack."""
    wanted = (("gelu", 120), ("tanh", 60), ("swish", 40))
    score = 0.0
    for layer, (gene, (op, width)) in enumerate(zip(genes, wanted, strict=True)):
        ops = [node.op for node in gene.expr.walk()]
        score += 0.5 * (op in ops) - 0.05 * abs(len(ops) - 4)
        score -= abs(math.log(gene.stack * gene.width(120) / width)) * 0.3
        if layer and genes[layer - 1].stack == gene.stack:
            score -= 0.1
    return score


def search(
    method,
    space: Space,
    truth: Callable,
    trials: int,
    seed: int,
    objectives: tuple[str, ...] = ("quality",),
) -> list[Evaluated]:
    """What a study does, in memory: proposals until so many different candidates are judged."""
    found: dict[str, Evaluated] = {}
    while len(found) < trials:
        history = list(found.values())
        if len(objectives) > 1:
            seen = [values(h.candidate, h.quality, objectives) for h in history]
            merit = merits(seen, objectives)
            history = [h._replace(merit=m) for h, m in zip(history, merit, strict=True)]
        rng = Random(f"{seed} {len(found)}")
        candidate = method.propose(history, rng)
        while candidate.fingerprint in found:
            candidate = method.propose(history, rng)
        found[candidate.fingerprint] = Evaluated(candidate, truth(candidate.genes))
    return list(found.values())
