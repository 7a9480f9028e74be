"""The winner as a graph: what is drawn, and that nothing touches anything."""

from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from fastffn.expr import PUBLISHED, Gene
from fastffn.figures import save
from fastffn.search.drawing import winner
from fastffn.search.gene_graph import layered
from fastffn.search.grammar import Grammar
from fastffn.search.space import DEFAULT_PRIMITIVES

GATED = "2x1/4 down(mul(swish(gate(x)), up(x)))"


def _kinds(gene: Gene) -> Counter:
    graph = layered(gene, 384)
    return Counter(node.kind for nodes in graph.levels.values() for node in nodes)


def test_nodes_of_a_gated_gene():
    graph = layered(Gene.parse(GATED), 384)
    labels = [[node.label for node in graph.levels[level]] for level in range(7)]
    assert labels[0] == ["x"]
    assert sorted(labels[1]) == ["gate 384→96", "up 384→96"]
    assert sorted(labels[2]) == ["", "swish"], "the edge from up to mul passes the level of swish"
    assert labels[3:] == [["mul"], ["down 96→384"], ["+"], ["LayerNorm"]]


def test_a_wider_operand_shows_which_columns_are_used():
    graph = layered(Gene.parse("1x1/2 mul(down(relu(mul(up(x), x))), x)"), 384)
    labels = {(edge.path[0].label, edge.path[-1].level): edge.label for edge in graph.edges}
    (inner,) = (label for label in labels.values() if label)
    assert inner == "[:192]", "inside; outside all columns are used"


def test_equal_parts_are_one_node():
    assert _kinds(Gene.parse("1x1 down(mul(swish(gate(tanh(x))), up(tanh(x))))"))["function"] == 3
    twice = layered(Gene.parse("1x1 add(down(gelu(up(x))), add(x, x))"), 384)
    ports = [edge.port for edge in twice.edges if edge.path[-1].level == 1]
    assert sorted(ports) == [-1, 0, 1], "x enters add from both sides, and up in the middle"


def test_boxes_keep_their_distance_and_edges_rise():
    grammar, rng = Grammar(DEFAULT_PRIMITIVES, (3, 7), 20), Random(5)
    for _ in range(40):
        expr = grammar.random(rng, rng.random() < 0.5, True)
        graph = layered(Gene(1, 1, expr), 384)
        for nodes in graph.levels.values():
            for left, right in pairwise(nodes):
                assert right.place - left.place >= left.half + right.half + 0.1
        for edge in graph.edges:
            levels = [node.level for node in edge.path]
            assert levels == list(range(levels[0], levels[-1] + 1))


def test_a_chain_is_straight():
    graph = layered(PUBLISHED[0], 540)
    places = {round(node.place, 6) for nodes in graph.levels.values() for node in nodes}
    assert len(places) == 1


def _texts(drawn) -> list[str]:
    return [text.get_text() for ax in drawn.axes for text in ax.texts]


def test_layers_in_a_row_share_a_picture():
    pytest.importorskip("matplotlib")
    genes = [gene for gene in PUBLISHED for _ in range(2)]
    texts = _texts(winner(genes, 360, "a title"))
    assert "a title" in texts and "layers 0 to 1" in texts and "layers 10 to 11" in texts
    assert texts.count("LayerNorm") == 6 and "×4" in texts
    assert "4 units, ratio 1/2\n1.05M parameters" in texts, "of both layers"
    assert len(_texts(winner(PUBLISHED, 540))) < len(texts) + 12


@pytest.mark.parametrize("kind, head", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_text_lies_inside_the_picture(tmp_path, kind, head):
    pytest.importorskip("matplotlib")
    drawn = winner([*PUBLISHED, Gene.parse(GATED)] * 2, 384, "twelve layers and two")
    path = save(drawn, tmp_path / f"winner.{kind}")
    assert path.read_bytes().startswith(head)
    drawn.canvas.draw()
    for text in drawn.axes[0].texts:
        box = text.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= drawn.bbox.width, text
        assert 0 <= box.y0 and box.y1 <= drawn.bbox.height, text
