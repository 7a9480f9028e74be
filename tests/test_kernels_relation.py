"""The relation kernels against the definition: interpreted here, for real on a GPU."""

import functools

import interpreter
import pytest
import relation_checks as checks
import torch

from fastffn.kernels import relation, tiles

DIVERGENCES = checks.DIVERGENCES
BOTH = pytest.mark.parametrize("itself", [False, True], ids=["general", "self"])


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def check(request):
    """Calls a function of `relation_checks` where its kernels run, with the device first."""
    if request.param == "cuda":
        return lambda function, *args, **kwargs: function("cuda", *args, **kwargs)
    return lambda function, *args, **kwargs: interpreter.call(
        functools.partial(function, "cpu", *args, **kwargs)
    )


@BOTH
@pytest.mark.parametrize("mask", [None, *checks.MASKS])
def test_masks(check, mask, itself):
    check(checks.agrees, "kl", mask=mask, itself=itself)


@BOTH
@pytest.mark.parametrize("mask", [None, "holes", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_divergences(check, divergence, mask, itself):
    check(checks.agrees, divergence, mask=mask, itself=itself)


@BOTH
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision(check, divergence, itself):
    check(checks.agrees, divergence, dtype=torch.float16, itself=itself)
    check(checks.agrees, divergence, teacher_dtype=torch.float16, itself=itself)


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16(divergence, itself):
    """The interpreter has no product of bf16."""
    checks.agrees("cuda", divergence, (2, 150, 3, 8, 16), torch.bfloat16, itself=itself)


@BOTH
@pytest.mark.parametrize("poison", [torch.inf, 1e30])
def test_padding_is_not_read(check, poison, itself):
    check(checks.agrees, "kl", mask="holes", poison=poison, itself=itself)


@BOTH
@pytest.mark.parametrize(
    ("width", "teacher_width"), [(4, 6), (6, 12), (8, 8), (12, 16), (16, 4), (45, 64), (128, 45)]
)
def test_head_widths(check, width, teacher_width, itself):
    for dtype in (torch.float32, torch.float16):
        check(checks.agrees, "kl", (1, 19, 2, width, teacher_width), dtype, itself=itself)


@BOTH
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("length", [0, 1, 2, 17])
def test_lengths(check, length, divergence, itself):
    check(checks.agrees, divergence, (2, length, 1, 8, 4), itself=itself, mask="left")


@BOTH
def test_several_tiles(check, itself):
    """Whole ones, one that is not, and blocks of padding."""
    for length in (64, 65, 129):
        check(checks.agrees, "kl", (2, length, 1, 8, 4), itself=itself)


def test_no_examples(check):
    check(checks.agrees, "kl", (0, 7, 2, 8, 8))


@BOTH
@pytest.mark.parametrize("size", [4.0, 9.0, 15.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_scores(check, divergence, size, itself):
    """Scores up to +-50, 300 and 1000; heads whose maxima are more than 64 powers of two apart."""
    check(checks.agrees, divergence, (2, 37, 2, 8, 8), size=size, itself=itself)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_keys_out_of_reach(check, divergence):
    check(checks.keys_out_of_reach, divergence)


@BOTH
@pytest.mark.parametrize(
    "layout", ["fused", "pitched", "shifted", "stepped", "length first", "width first"]
)
def test_layouts(check, layout, itself):
    check(checks.agrees, "kl", layout=layout, itself=itself)
    check(checks.agrees, "kl", teacher_layout=layout, itself=itself, dtype=torch.float16)
    check(checks.agrees, "kl", out_layout=layout, itself=itself)


def test_one_example_for_all(check):
    check(checks.agrees, "kl", layout="one example", mask=None)


@BOTH
@pytest.mark.parametrize("weights", ["one", "rows"])
def test_weights_of_stride_0(check, weights, itself):
    for divergence in DIVERGENCES:
        check(checks.agrees, divergence, weights=weights, itself=itself)


@pytest.mark.parametrize("wanted", [("a",), ("b",)])
def test_one_gradient(check, wanted):
    check(checks.agrees, "kl", wanted=wanted)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bad_values_show(check, divergence):
    check(checks.bad_values_show, divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_far_tokens(tmp_path, divergence):
    interpreter.call(checks.far_tokens, "cpu", str(tmp_path / "memory"), divergence)


def test_tiles():
    """As small as a short sequence; fewer keys where rows are long or much is held at a time."""
    assert tiles.relation(5, 64, 3, True) == tiles.RelationTile(16, 16, 1, 3, 0)
    assert tiles.relation(512, 64, 3, True) == tiles.RelationTile(64, 64, 4, 3, 0)
    assert tiles.relation(512, 64, 6, True).keys == 32
    assert tiles.relation(512, 512, 3, True).keys == 32
    assert tiles.relation(512, 1024, 3, False) == tiles.RelationTile(32, 32, 8, 2, 16)


def test_wrong_operands_are_refused():
    a, t = torch.empty(2, 5, 8), torch.empty(2, 5, 16)
    rows, stats = torch.empty(2, 2, 5), torch.empty(4, 2, 2, 5)
    forward = functools.partial(relation.plan_forward, heads=2, scale=1.0, scale_t=1.0)
    good = {"real": None, "divergence": "kl", "rows": rows, "stats": stats}
    with pytest.raises(ValueError, match="divergence 'js'"):
        forward(a, a, t, t, **(good | {"divergence": "js"}))
    with pytest.raises(ValueError, match="self relation"):
        forward(a, a, t, None, **good)
    with pytest.raises(ValueError, match="do not divide"):
        forward(a, a, t, t, **(good | {"heads": 3}))
    with pytest.raises(ValueError, match="b is"):
        forward(a, t, t, t, **good)
    with pytest.raises(ValueError, match="float64"):
        forward(a.double(), None, t, None, **good)
    with pytest.raises(ValueError, match="real is"):
        forward(a, a, t, t, **(good | {"real": torch.ones(2, 5)}))
    with pytest.raises(ValueError, match="rows must be"):
        forward(a, a, t, t, **(good | {"rows": rows[:1]}))
    with pytest.raises(ValueError, match="stats must be"):
        forward(a, a, t, t, **(good | {"stats": stats[:2]}))
    backward = functools.partial(relation.plan_backward, a, None, t, None, None, 2, 1.0, 1.0)
    with pytest.raises(ValueError, match="one gradient"):
        backward("kl", stats, rows, a, a)
    with pytest.raises(ValueError, match="needs the stats"):
        backward("kl", None, rows, a, None)


def test_losses(check):
    check(checks.losses)
