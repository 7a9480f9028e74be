"""The genes of an encoder drawn as graphs: what one unit of each layer computes.

Every gene is a column that is read upwards, from x to LayerNorm: linear maps are trapezoids with
their widths, the rest are rounded boxes, the residual runs past on the right. Units that are
stacked are drawn as cards behind each other. Layers in a row with one gene share a picture.

Lengths are inches; `gene_graph` says where the nodes stand.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

from ..expr import Gene, gene_cost
from ..figures import BLACK, BLUE, GREY, amount, figure
from .gene_graph import CIRCLE, Edge, Node, layered

_HEIGHT, _PITCH = 0.27, 0.47  # of a box, from level to level
_PORT, _SLICE = 0.13, 0.34  # from a box's middle to its operands' ends, width of a slice's label
_PAD, _RESIDUAL, _CARD = 0.18, 0.22, 0.055  # inside a frame, its channel, from card to card
_CAPTION, _BETWEEN, _ROW = 0.68, 0.34, 12.6  # below a frame, between frames, a row's width
_MAX_CARDS = 5
_LINEAR, _FUNCTION, _NORM = "#cfe6f3", "#fdf0d5", "#d3eee4"


def winner(genes: Sequence[Gene], hidden_size: int, title: str = "") -> Any:
    """The figure of an encoder's genes, first layer at the top left.

    Args:
        genes: one per layer.
        hidden_size: H, the width of x.
        title: a line above the figure.

    Raises:
        UserError: no matplotlib, or a gene that no layer of this width can have.
    """
    panels = []
    for gene, group in groupby(enumerate(genes), key=lambda pair: pair[1]):
        layers = [layer for layer, _ in group]
        panels.append(_Panel(gene, hidden_size, layers))
    rows = _rows(panels)
    width = max(_row_width(row) for row in rows) + 2 * _PAD
    width = max(width, 0.095 * len(title) + 0.5, 5.4)
    heights = [max(panel.height for panel in row) + _CAPTION + 0.1 for row in rows]
    top, foot = (0.42 if title else 0.1), 0.42
    height = top + sum(heights) + foot
    drawn = figure(width, height, layout=None)
    ax = drawn.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    if title:
        ax.text(_PAD, height - 0.18, title, fontsize=11, weight="bold", va="top", color=BLACK)
    bottom = height - top
    for row, tall in zip(rows, heights, strict=True):
        bottom -= tall
        left = (width - _row_width(row)) / 2
        for panel in row:
            panel.draw(ax, left, bottom + _CAPTION)
            left += panel.width + _BETWEEN
    note = (
        "One unit: y = LayerNorm(x + Dropout(f(x))). Units follow each other with weights of "
        "their own."
    )
    if width < 6.5:
        note = note.replace(". ", ".\n")
    ax.text(width / 2, foot / 2, note, fontsize=7.5, ha="center", va="center", color=GREY)
    return drawn


def _rows(panels: Sequence["_Panel"]) -> list[list["_Panel"]]:
    """Panels in rows of about equal numbers, no row wider than a page."""
    count = 1
    while True:
        size = -(-len(panels) // count)
        rows = [list(panels[at : at + size]) for at in range(0, len(panels), size)]
        if count >= len(panels) or max(map(_row_width, rows)) <= _ROW:
            return rows
        count += 1


def _row_width(row: Sequence["_Panel"]) -> float:
    return sum(panel.width for panel in row) + _BETWEEN * (len(row) - 1)


# -- drawing -------------------------------------------------------------------------------------


class _Panel:
    """One gene's frame: its size in inches, and how to draw it."""

    def __init__(self, gene: Gene, hidden: int, layers: Sequence[int]):
        self.gene = gene
        self.graph = layered(gene, hidden)
        self.cards = min(gene.stack, _MAX_CARDS) - 1
        nodes = [node for nodes in self.graph.levels.values() for node in nodes]
        low = min(node.place - node.half for node in nodes)
        slices = [_slice_place(edge) for edge in self.graph.edges if edge.label]
        right = [node.place + node.half for node in nodes]
        high = max(right + [place + _SLICE * side for place, side in slices])
        low = min([low] + [place + _SLICE * side for place, side in slices])
        self.shift = _PAD - low
        self.frame = max(high - low + 2 * _PAD + _RESIDUAL, 1.35)
        self.residual = high + 0.7 * _RESIDUAL
        self.width = self.frame + self.cards * _CARD
        self.inside = max(node.level for node in nodes) * _PITCH + _HEIGHT + 2 * _PAD
        self.height = self.inside + self.cards * _CARD + 0.17
        first, last = layers[0], layers[-1]
        self.name = f"layer {first}" if first == last else f"layers {first} to {last}"
        units = f"{gene.stack} unit{'s' * (gene.stack > 1)}"
        size = len(layers) * gene_cost(gene, hidden).params
        self.details = f"{units}, ratio {gene.ratio}\n{amount(size)} parameters"

    def draw(self, ax: Any, left: float, bottom: float) -> None:
        """Draws the frame with its lower left corner there, the caption below it."""
        from matplotlib.patches import FancyBboxPatch

        for card in range(self.cards, -1, -1):
            corner = left + card * _CARD, bottom + card * _CARD
            style = "round,pad=0,rounding_size=0.09"
            look = {"facecolor": "white", "edgecolor": "#999999", "linewidth": 0.9}
            ax.add_patch(FancyBboxPatch(corner, self.frame, self.inside, style, **look))
        if self.gene.stack > 1:
            at = left + self.frame - 0.07, bottom + self.inside - 0.06
            text = f"×{self.gene.stack}"
            ax.text(*at, text, fontsize=10, weight="bold", ha="right", va="top", color=BLACK)

        origin = left + self.shift, bottom + _PAD + _HEIGHT / 2
        top = max(self.graph.levels)
        (norm,) = self.graph.levels[top]
        self._arrow(ax, [_at(norm, origin), (norm.place + origin[0], bottom + self.height)], 0)
        x = _at(self.graph.source, origin)
        self._arrow(ax, [(x[0], bottom - 0.16), x], CIRCLE)
        for edge in self.graph.edges:
            self._edge(ax, edge, origin)
        self._bypass(ax, origin)
        for nodes in self.graph.levels.values():
            for node in nodes:
                _box(ax, node, *_at(node, origin))
        middle = left + self.frame / 2
        ax.text(middle, bottom - 0.2, self.name, fontsize=9, weight="bold", ha="center", va="top")
        ax.text(
            *(middle, bottom - 0.37, self.details),
            **{"fontsize": 7.5, "ha": "center", "va": "top", "color": GREY, "linespacing": 1.2},
        )

    def _edge(self, ax: Any, edge: Edge, origin: tuple[float, float]) -> None:
        places = [_at(node, origin) for node in edge.path]
        x, y = places[-1]
        places[-1] = x + _PORT * edge.port, y
        self._arrow(ax, places, CIRCLE if edge.path[-1].kind == "plus" else _HEIGHT / 2)
        if edge.label:
            place, side = _slice_place(edge)
            align = "left" if side > 0 else "right"
            at = place + origin[0], y - _PITCH / 2
            ax.text(*at, edge.label, fontsize=6.5, color=GREY, ha=align, va="center", zorder=4)

    def _arrow(self, ax, places, end: float) -> None:
        """A smooth line through the places; its head ends `end` inches below the last."""
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path

        (x, y) = places[-1]
        places = [*places[:-1], (x, y - end)]
        points, codes = [places[0]], [Path.MOVETO]
        for (x0, y0), (x1, y1) in pairwise(places):
            middle = (y0 + y1) / 2
            points += [(x0, middle), (x1, middle), (x1, y1)]
            codes += [Path.CURVE4] * 3
        _line(ax, FancyArrowPatch, Path(points, codes))

    def _bypass(self, ax, origin) -> None:
        """The residual: from x past everything into the sum."""
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path

        (x, y), (end, top) = _at(self.graph.source, origin), _at(self.graph.plus, origin)
        right, bend = self.residual + origin[0], 0.12
        points = [
            *[(x, y), (right - bend, y), (right, y), (right, y + bend)],
            *[(right, top - bend), (right, top), (right - bend, top), (end + CIRCLE, top)],
        ]
        curve = [Path.LINETO, Path.CURVE3, Path.CURVE3]
        codes = [Path.MOVETO, *curve, *curve, Path.LINETO]
        _line(ax, FancyArrowPatch, Path(points, codes), color="#999999")


def _slice_place(edge: Edge) -> tuple[float, int]:
    """Where the label of an edge's last part begins, and to which side it goes on."""
    before, end = (node.place for node in edge.path[-2:])
    side = 1 if before >= end else -1
    return (end + before) / 2 + side * 0.12, side


def _at(node: Node, origin: tuple[float, float]) -> tuple[float, float]:
    return node.place + origin[0], node.level * _PITCH + origin[1]


def _line(ax, patch, path, color: str = "#555555") -> None:
    ax.add_patch(
        patch(
            path=path, arrowstyle="-|>,head_length=3,head_width=1.6", color=color, linewidth=0.9,
            shrinkA=0, shrinkB=0, joinstyle="round", capstyle="butt", zorder=2, fill=False,
        )
    )  # fmt: skip


def _box(ax, node: Node, x: float, y: float) -> None:
    from matplotlib.patches import Circle, FancyBboxPatch, Polygon

    if node.kind == "point":
        return
    look = {"edgecolor": BLACK, "linewidth": 0.8, "zorder": 3}
    w, h = node.half, _HEIGHT / 2
    if node.kind in ("x", "plus"):
        ax.add_patch(Circle((x, y), CIRCLE, facecolor="white", **look))
    elif node.kind == "linear":
        low, high = (w, w - 0.09) if node.narrows < 0 else (w - 0.09, w)
        if not node.narrows:
            low = high = w
        corners = [(x - low, y - h), (x + low, y - h), (x + high, y + h), (x - high, y + h)]
        ax.add_patch(Polygon(corners, facecolor=_LINEAR, **(look | {"edgecolor": BLUE})))
    else:
        fill = _NORM if node.kind == "norm" else _FUNCTION
        style = "round,pad=0,rounding_size=0.1"
        ax.add_patch(FancyBboxPatch((x - w, y - h), 2 * w, 2 * h, style, facecolor=fill, **look))
    size = 9.5 if node.kind == "plus" else 7.8
    ax.text(x, y, node.label, fontsize=size, ha="center", va="center", color=BLACK, zorder=4)
