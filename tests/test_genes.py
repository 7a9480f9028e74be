"""Genes: spellings, segments, widths, refusals, cost."""

from fractions import Fraction

import pytest

from fastffn import ExprError, Gene, UserError
from fastffn.expr import PLAIN, PUBLISHED, gene_cost

EFFICIENTBERT = [  # as published, layer 1 to 6
    "tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2))",
    "elu(linear2_1(gelu(linear2_1(x,wb1)),wb2))",
    "sigmoid(linear1_2(relu(linear1_2(x,wb1)),wb2))",
    "linear2_2(gelu(linear2_2(max(x,tanh(x)),wb1)),wb2)",
    "linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2)",
    "leaky_relu(linear2_3(gelu(linear2_3(x,wb1)),wb2))",
]


def test_published_genes_import_and_print():
    assert tuple(map(Gene.parse, EFFICIENTBERT)) == PUBLISHED
    assert [(gene.stack, gene.width(540)) for gene in PUBLISHED] == [
        (4, 270),
        (2, 540),
        (1, 270),
        (2, 270),
        (1, 270),
        (2, 180),
    ]
    for gene in PUBLISHED:
        assert Gene.parse(str(gene)) == gene
    assert str(PUBLISHED[3]) == "2x1/2 down(gelu(up(max(x, tanh(x)))))"


def test_segments():
    gene = Gene.parse("1x1/2 mul(tanh(down(max(relu(up(gelu(x))), x))), x)")
    segments = gene.segments
    assert str(segments.prologue) == "gelu(x)"
    assert str(segments.middle) == "max(relu(z1), x)"
    assert str(segments.epilogue) == "mul(tanh(z2), x)"
    gated = Gene.parse("1x2/3 down(mul(swish(gate(x)), up(x)))", base=4)
    assert gated.gated and str(gated.segments.middle) == "mul(swish(zg), z1)"
    assert gated.width(384) == 1024 and gated.ratio == Fraction(2, 3)


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("down(gelu(x))", 0, "up(...) is missing"),
        ("up(gelu(x))", 0, "down(...) is missing"),
        ("down(up(x))", 0, "linear of a linear"),
        ("2x1/2 down(up(x))", 6, "linear of a linear"),
        ("down(gelu(up(up(x))))", 13, "up stands more than once"),
        ("add(down(gelu(up(x))), down(x))", 23, "down stands more than once"),
        ("1x1/2 tanh(down(geloo(up(x))))", 16, "unknown operation 'geloo'"),
        ("1x1/2 down(gelu(up(y)))", 19, "'y' is unknown"),
        ("1x1/0 down(gelu(up(x)))", 4, "divisor must be positive"),
        ("0x1 down(gelu(up(x)))", 0, "stack must be positive"),
        ("1x0 down(gelu(up(x)))", 2, "ratio must be positive"),
        ("1x1down(gelu(up(x)))", 3, "a blank is missing"),
        ("1x1 ", 4, "the expression is missing"),
        ("down(gelu(up(x)\n))x", 18, "ended before 'x'"),
        ("down(mul(up(x), gate(tanh(x))))", 16, "same argument"),
        ("add(up(x), down(gelu(x)))", 4, "inside down"),
        ("down(gelu(up(x))", 4, "never closed"),
        ("linear2_1(gelu(linear2_2(x,wb1)),wb2)", 0, "cannot mix"),
    ],
)
def test_refusals_point_at_the_character(text, position, message):
    with pytest.raises(ExprError) as caught:
        Gene.parse(text)
    assert message in str(caught.value) and caught.value.text == text
    assert caught.value.position == position


def test_bad_numbers_are_refused():
    with pytest.raises(UserError, match="must be positive"):
        PLAIN.with_(stack=0)
    with pytest.raises(UserError, match="inner width of 0"):
        Gene.parse("1x1/9 down(gelu(up(x)))").width(8)
    mixed = Gene.parse("1x4 down(mul(up(x), x))")
    with pytest.raises(UserError, match="no wider than x"):
        mixed.width(8)
    assert mixed.with_(ratio=Fraction(1, 2)).width(8) == 4


def test_fingerprint_sees_function_width_and_stack():
    one = Gene.parse("1x1/2 down(mul(gelu(up(x)), x))")
    assert Gene.parse("1x1/2 down(mul(x, gelu(up(x))))").fingerprint() == one.fingerprint()
    assert Gene.parse("1x1/64 down(gelu(up(x)))").fingerprint()  # as narrow as a search may get
    others = [one.with_(stack=2), one.with_(ratio=Fraction(1, 3)), *PUBLISHED, PLAIN]
    assert len({gene.fingerprint() for gene in [one, *others]}) == len(others) + 1


def test_cost_counts_weights_biases_and_norms():
    cost = gene_cost(Gene.parse("2x1/2 down(gelu(up(x)))"), 540)
    assert cost.params == 2 * (540 * 270 + 270 + 270 * 540 + 540 + 2 * 540)
    assert cost.macs == 2 * 2 * 540 * 270
    assert (cost + cost).macs == 2 * cost.macs
    gated = gene_cost(Gene.parse("1x1 down(mul(swish(gate(x)), up(x)))"), 12)
    assert gated.params == 3 * 12 * 12 + 3 * 12 + 24 and gated.macs == 3 * 144
