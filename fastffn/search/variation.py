"""Changes to whole candidates: mutation and crossover that stay in the space and in the budget."""

from random import Random

from ..expr import Gene
from .budget import Shape
from .space import Candidate, Space

_TRIES = 20


def mutate(space: Space, candidate: Candidate, rng: Random) -> Candidate:
    """A member one or two changes away from `candidate`.

    A change is a new function, or a new stack and ratio, in one layer, or an exchange of shapes
    between two layers (under a narrow budget often the only one that fits). If none is found, a
    random member.
    """
    moves = [] if space.functions is not None else [_function]
    moves += [] if space.shapes is not None else [_shape, _exchange]
    for _ in range(_TRIES if moves else 0):
        genes: list[Gene] | None = list(candidate.genes)
        for _ in range(1 + (rng.random() < 0.3)):
            genes = genes and rng.choice(moves)(space, genes, rng)
        changed = genes and space.in_budget(genes)
        if changed and changed.fingerprint != candidate.fingerprint:
            return changed
    return space.random(rng)


def cross(space: Space, first: Candidate, second: Candidate, rng: Random) -> Candidate:
    """A member that takes each layer from one of its parents; one layer's function may be of both.

    If no mixture meets the budget, a mutation of `first`.
    """
    parents = {first.fingerprint, second.fingerprint}
    for _ in range(_TRIES):
        genes = [rng.choice(pair) for pair in zip(first.genes, second.genes, strict=True)]
        if space.functions is None and rng.random() < 0.3:
            layer = rng.randrange(space.num_layers)
            gene, other = genes[layer], rng.choice((first, second)).genes[layer]
            expr = space.grammar(layer).cross(gene.expr, other.expr, rng, space.narrow(gene.ratio))
            genes[layer] = gene if expr is None else gene.with_(expr=expr)
        if tuple(genes) in (first.genes, second.genes):
            continue
        child = space.in_budget(genes)
        if child and child.fingerprint not in parents:
            return child
    return mutate(space, first, rng)


def _function(space: Space, genes: list[Gene], rng: Random) -> list[Gene] | None:
    layer = rng.randrange(len(genes))
    gene = genes[layer]
    expr = space.grammar(layer).mutate(gene.expr, rng, space.narrow(gene.ratio))
    return None if expr is None else _with(genes, layer, gene.with_(expr=expr))


def _shape(space: Space, genes: list[Gene], rng: Random) -> list[Gene] | None:
    layer = rng.randrange(len(genes))
    return _reshaped(space, genes, layer, rng.choice(list(space.costs[layer])), rng)


def _exchange(space: Space, genes: list[Gene], rng: Random) -> list[Gene] | None:
    if len(genes) < 2:
        return None
    first, second = rng.sample(range(len(genes)), 2)
    shapes = [Shape(genes[i].stack, genes[i].ratio, genes[i].gated) for i in (first, second)]
    changed = _reshaped(space, genes, first, shapes[1], rng)
    return changed and _reshaped(space, changed, second, shapes[0], rng)


def _reshaped(
    space: Space, genes: list[Gene], layer: int, shape: Shape, rng: Random
) -> list[Gene] | None:
    """The layer with another shape; with a new function where the old one cannot have it."""
    gene, narrow = genes[layer], space.narrow(shape.ratio)
    if shape not in space.costs[layer]:
        return None
    expr = gene.expr
    if gene.gated != shape.gated or ("x" in gene.segments.middle.inputs and not narrow):
        if space.functions is not None:
            return None
        expr = space.grammar(layer).random(rng, shape.gated, narrow)
        if expr is None:
            return None
    return _with(genes, layer, gene.with_(stack=shape.stack, ratio=shape.ratio, expr=expr))


def _with(genes: list[Gene], layer: int, gene: Gene) -> list[Gene]:
    return [*genes[:layer], gene, *genes[layer + 1 :]]
