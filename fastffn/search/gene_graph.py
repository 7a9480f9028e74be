"""A gene as a layered graph with places: what `drawing` draws, without drawing anything.

The nodes are placed as in layered graph drawing (Sugiyama, Tagawa, Toda 1981): a node's level is
its longest path from x, edges over several levels get a point on each, the order on a level comes
from the mean place of its neighbours, and the places are then the closest ones to straight lines
that keep their distance (pool adjacent violators). All lengths are inches, so that boxes and
letters have one size in every picture.

Why not graphviz: it is a program that has to be installed, for graphs of twenty nodes.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..expr import Expr, Gene

CIRCLE = 0.135  # radius of x and +
_LETTER, _MARGIN, _LEAST = 0.068, 0.2, 0.72  # a box's width: of a letter, around, at least
_GAP = 0.18  # between neighbours
_SWEEPS = 12


@dataclass(eq=False)
class Node:
    """A box, or a point where a long edge crosses a level; `level` counts from x upwards."""

    kind: str  # "x", "linear", "function", "plus", "norm", "point"
    level: int
    label: str = ""
    width: int = 0  # features of its value
    narrows: int = 0  # sign: a linear map's output against its input
    place: float = 0.0  # of its middle, from any origin
    spine: bool = False  # on a path from x through a linear map
    below: list["Node"] = field(default_factory=list)
    above: list["Node"] = field(default_factory=list)

    @property
    def half(self) -> float:
        """Half of the room that it takes."""
        if self.kind == "point":
            return 0.0
        if self.kind in ("x", "plus"):
            return CIRCLE
        return max(_LEAST, _LETTER * len(self.label) + _MARGIN) / 2


@dataclass
class Edge:
    """From the first to the last of the nodes that it passes."""

    path: list[Node]
    label: str = ""  # which columns of a wider operand are used
    port: int = 0  # where it enters: -1 left, 0 in the middle, 1 right


@dataclass
class Graph:
    """Nodes by level, from x upwards and from left to right, and what joins them."""

    levels: dict[int, list[Node]]
    edges: list[Edge]
    source: Node
    plus: Node


def layered(gene: Gene, hidden: int) -> Graph:
    """The gene's graph with sum and norm above it, long edges already cut at every level."""
    inner = gene.width(hidden)
    known: dict[Expr, Node] = {}
    ends: list[tuple[Node, Node]] = []

    def visit(expr: Expr) -> Node:
        if expr in known:
            return known[expr]
        if expr.is_leaf:
            node = Node("x", 0, "x", hidden)
        else:
            args = [visit(arg) for arg in expr.args]
            level = 1 + max(arg.level for arg in args)
            taken = min(arg.width for arg in args)
            if expr.op in ("up", "gate", "down"):
                given = hidden if expr.op == "down" else inner
                label = f"{expr.op} {taken}→{given}"
                node = Node("linear", level, label, given, (given > taken) - (given < taken))
                node.spine = True
            else:
                node = Node("function", level, expr.op, taken)
                node.spine = any(arg.spine for arg in args)
            ends.extend((arg, node) for arg in args)
        known[expr] = node
        return node

    root = visit(gene.expr)
    plus = Node("plus", root.level + 1, "+", hidden)
    norm = Node("norm", root.level + 2, "LayerNorm", hidden)
    plus.spine = norm.spine = True
    ends += [(root, plus), (plus, norm)]

    levels: dict[int, list[Node]] = defaultdict(list)
    for node in dict.fromkeys([*known.values(), plus, norm]):
        levels[node.level].append(node)
    edges = []
    for low, high in ends:
        points = [Node("point", level) for level in range(low.level + 1, high.level)]
        for point in points:
            levels[point.level].append(point)
        path = [low, *points, high]
        for first, second in pairwise(path):
            first.above.append(second)
            second.below.append(first)
        sliced = high.kind == "function" and low.width > high.width
        edges.append(Edge(path, f"[:{high.width}]" if sliced else ""))
    graph = Graph(dict(sorted(levels.items())), edges, known[Expr.leaf("x")], plus)
    _order(graph)
    _place(graph)
    for node in known.values():
        ends_here = [edge for edge in edges if edge.path[-1] is node]
        if len(ends_here) == 2:
            left, right = sorted(ends_here, key=lambda edge: edge.path[-2].place)
            left.port, right.port = -1, 1
    return graph


def _order(graph: Graph) -> None:
    """Orders every level by the mean place of its neighbours; keeps the fewest crossings seen."""
    best = None
    for sweep in range(_SWEEPS):
        upwards = sweep % 2 == 0
        for level in sorted(graph.levels, reverse=not upwards):
            nodes = graph.levels[level]

            def mean(node: Node, upwards: bool = upwards) -> float:
                near = node.below if upwards else node.above
                return sum(other.place for other in near) / len(near) if near else node.place

            nodes.sort(key=mean)
            for place, node in enumerate(nodes):
                node.place = place - (len(nodes) - 1) / 2
        found = _crossings(graph)
        if best is None or found < best[0]:
            best = found, {level: list(nodes) for level, nodes in graph.levels.items()}
    graph.levels = best[1]


def _crossings(graph: Graph) -> int:
    count = 0
    for nodes in graph.levels.values():
        pairs = [(node.place, other.place) for node in nodes for other in node.above]
        count += sum(
            (a - c) * (b - d) < 0 for at, (a, b) in enumerate(pairs) for c, d in pairs[at + 1 :]
        )
    return count


def _place(graph: Graph) -> None:
    """Places in inches: near the neighbours' mean, in order, without touching."""
    for nodes in graph.levels.values():
        _spread(nodes, [0.0] * len(nodes))
    for sweep in range(2 * _SWEEPS):  # the last one goes up: what has one operand stands above it
        upwards = sweep % 2 == 1
        for level in sorted(graph.levels, reverse=not upwards):
            nodes, wanted = graph.levels[level], []
            for node in nodes:
                near = node.below if upwards else node.above
                pulls = [_pull(node, other) for other in near]
                total = sum(w * other.place for w, other in zip(pulls, near, strict=True))
                wanted.append(total / sum(pulls) if near else node.place)
            _spread(nodes, wanted)


def _pull(node: Node, other: Node) -> float:
    """How much an edge should be straight: the spine most, then edges over several levels."""
    if node.spine and other.spine:
        return 12.0
    return 4.0 if {node.kind, other.kind} == {"point"} else 1.0


def _spread(nodes: Sequence[Node], wanted: Sequence[float]) -> None:
    """The places closest to the wanted ones (least squares) that keep order and distance."""
    offsets = [0.0]
    for left, right in pairwise(nodes):
        offsets.append(offsets[-1] + left.half + right.half + _GAP)
    blocks: list[tuple[float, int]] = []  # mean and number of places that move together
    for want, offset in zip(wanted, offsets, strict=True):
        mean, size = want - offset, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (mean * size + before * count) / (size + count), size + count
        blocks.append((mean, size))
    means = [mean for mean, size in blocks for _ in range(size)]
    for node, mean, offset in zip(nodes, means, offsets, strict=True):
        node.place = mean + offset
