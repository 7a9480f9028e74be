"""csrc's Encoder: packed weights, products in three precisions, whole encoders over ragged texts.

Of the same text a result has the same bits whatever texts are beside it and however many threads
compute it: a row's sums run in one order, which its own text decides. Layers with a window are the
exception, for texts that are longer than it: their queries are taken in blocks, which share keys,
and where a block begins depends on the threads.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import BINARY, UNARY, assert_accurate
from packed_checks import (
    ROUNDINGS,
    Embeddings,
    Maker,
    Model,
    embedded,
    formula,
    packed,
    run,
)

from fastffn.errors import UserError
from fastffn.models import EfficientBertConfig, EfficientBertModel
from fastffn.ops import backend
from fastffn.serve.packing import NotPackable, Packed

ISAS = ["avx512", "avx2", "baseline"]
PLAIN = "down(gelu_erf(up(x)))"
GATED = "down(mul(gelu(up(x)), gate(x)))"
NAN, INF = float("nan"), float("inf")
hypothesis_settings = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=ISAS)
def isa(request, isa_by_name):
    if request.param not in backend.cpp()[0].available_isas():
        pytest.skip(f"csrc does not run on {request.param} here")
    isa_by_name(request.param)
    return request.param


@pytest.fixture(params=["bfloat16", "int8"])
def rounded(request):
    if not backend.cpp()[0].multiplies(request.param):
        pytest.skip(f"this processor does not multiply {request.param}")
    return request.param


@pytest.fixture(params=list(ROUNDINGS))
def precision(request):
    if not backend.cpp()[0].multiplies(request.param):
        pytest.skip(f"this processor does not multiply {request.param}")
    return request.param


def starts_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def texts(lengths, width, seed=0):
    """What the layers begin with, and starts."""
    generator = torch.Generator().manual_seed(seed + 100)
    return torch.randn(sum(lengths), width, generator=generator), starts_of(lengths)


def check(model, x, starts, threads=1, bias=None, what=""):
    out = run(packed(model), starts, x, threads, bias)
    exact = formula(model, x.double(), starts, bias)
    same = formula(model, x, starts, bias)
    # Of few numbers the largest errors of two orders of the same sums differ by chance.
    floor = 3e-6 * max(1.0, exact.abs().max().item() if exact.numel() else 1.0)
    assert_accurate(out, exact, same, what, floor)
    return out


def genes(width, hidden):
    """Every place where an elementwise part can stand, with every primitive."""
    unary = st.sampled_from(UNARY)
    binary = st.sampled_from(BINARY)
    prologue = st.just("x") | unary.map("{}(x)".format) | binary.map("{}(x, tanh(x))".format)
    products = prologue.map("up({})".format)
    middle = st.tuples(unary, products).map("{0[0]}({0[1]})".format) | st.tuples(
        binary, unary, prologue
    ).map("{0[0]}({0[1]}(up({0[2]})), gate({0[2]}))".format)
    if width <= hidden:
        middle |= st.tuples(binary, unary).map("{0[0]}({0[1]}(up(x)), x)".format)
    second = middle.map("down({})".format)
    return (
        second
        | st.tuples(unary, second).map("{0[0]}({0[1]})".format)
        | st.tuples(binary, second).map("{0[0]}({0[1]}, x)".format)
    )


# -- float32 -------------------------------------------------------------------------------------


@hypothesis_settings
@given(data=st.data())
def test_equals_the_formula(isa, data):
    size = data.draw(st.integers(1, 23) | st.sampled_from([32, 45, 64]), label="head size")
    heads = data.draw(st.integers(1, 3), label="heads")
    hidden = size * heads
    lengths = data.draw(st.lists(st.integers(0, 60) | st.integers(0, 3), max_size=5))
    maker = Maker(data.draw(st.integers(0, 9)), whole=data.draw(st.booleans(), label="whole"))
    model = Model(hidden, heads)
    for _ in range(data.draw(st.integers(1, 2), label="layers")):
        units = []
        for _ in range(data.draw(st.integers(1, 3), label="stack")):
            width = data.draw(st.integers(1, 70), label="width")
            units.append((width, data.draw(genes(width, hidden), label="gene")))
        model.layers.append(maker.layer(hidden, heads, units))
    bias = None
    if data.draw(st.booleans(), label="bias"):
        longest = max([1, *lengths]) + data.draw(st.integers(0, 2))
        bias = torch.randn(heads, longest, longest)
    x, starts = texts(lengths, hidden)
    check(model, x, starts, data.draw(st.integers(1, 5), label="threads"), bias)


@pytest.mark.parametrize("primitive", UNARY)
def test_every_primitive(isa, primitive):
    made = Maker(3)
    gene = f"{primitive}(down({primitive}(up({primitive}(x)))))"
    check(Model(33, 3, [made.layer(33, 3, [(50, gene)])]), *texts([5, 0, 17], 33))


@pytest.mark.parametrize("width", range(1, 71))
def test_every_width_of_a_product(width):
    """Panels that are full, empty but for one column, and one alone; all three instruction sets."""
    module, before = backend.cpp()[0], backend.cpp()[0].isa()
    model = Model(width, 1, [Maker(width).layer(width, 1, [(71 - width, PLAIN), (70, GATED)])])
    x, starts = texts([3, 14], width)
    try:
        for isa in module.available_isas():
            module.select_isa(isa)
            check(model, x, starts, what=isa)
    finally:
        module.select_isa(before)


def test_the_published_shapes(isa):
    maker = Maker(1)
    units = [(135, "mul(down(gelu(up(x))), x)"), (270, "tanh(down(gelu(up(x))))"), (540, PLAIN)]
    model = Model(540, 12, [maker.layer(540, 12, units)])
    check(model, *texts([1, 0, 96, 0], 540), threads=2)


@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 25, 95, 96, 97, 191, 193, 300])
def test_rows_around_tiles_and_blocks(rows):
    model = Model(36, 2, [Maker(2).layer(36, 2, [(20, PLAIN)])])
    check(model, *texts([rows], 36), threads=2)
    check(model, *texts([1] * min(rows, 50), 36), threads=3)


def test_weights_that_layers_share():
    maker = Maker(5)
    model = Model(20, 2, [maker.layer(20, 2, [(30, PLAIN)]) for _ in range(2)], order=[0, 1, 0, 0])
    check(model, *texts([7, 3], 20))


def pre_norm_model(hidden=36, heads=3, window=9, longest=300):
    """Norms before, none in the first layer; rotations; a window in the second layer."""
    maker = Maker(6)
    units = [(50, GATED)], [(30, "mul(down(tanh(up(relu(x)))), x)"), (20, PLAIN)]
    layers = [maker.layer(hidden, heads, each) for each in units]
    layers[0].norm = None
    angles = torch.arange(longest)[:, None] * 0.7 ** torch.arange(hidden // heads // 2)
    for layer in layers:
        layer.cosines, layer.sines = angles.cos(), angles.sin()
    layers[1].window = window
    return Model(hidden, heads, layers, last=maker.norm(hidden))


@pytest.mark.parametrize("window", [-1, 0, 1, 9, 97])
@pytest.mark.parametrize("lengths", [[0, 1, 9, 10, 11, 30, 0], [250], [97, 96, 130]], ids=str)
def test_norms_before_rotations_and_windows(isa, lengths, window):
    check(pre_norm_model(window=window), *texts(lengths, 36), threads=3)


def test_a_layer_without_units():
    check(Model(20, 2, [Maker().layer(20, 2, [])]), *texts([7, 3], 20))


def test_no_texts_no_tokens_and_no_layers():
    encoder = packed(Model(20, 2, [Maker().layer(20, 2, [(30, PLAIN)])]))
    for lengths in ([], [0], [0, 0, 0]):
        x, starts = texts(lengths, 20)
        assert run(encoder, starts, x, threads=4).shape == (0, 20)
    x, starts = texts([2, 3], 20)
    assert torch.equal(run(packed(Model(20, 2)), starts, x), x)


# -- the same bits -------------------------------------------------------------------------------

LENGTHS = [0, 40, 1, 0, 97, 13, 130, 5, 0]


def some_model(hidden=52, heads=4):
    maker = Maker(7)
    units = [(70, GATED), (30, "mul(down(tanh(up(x))), x)")]
    return Model(hidden, heads, [maker.layer(hidden, heads, units) for _ in range(2)])


@pytest.mark.parametrize("lengths", [LENGTHS, [211], [1], [150, 20], [9] * 40], ids=str)
def test_threads_do_not_change_a_bit(precision, lengths):
    model = some_model()
    encoder, bias = packed(model, precision), torch.randn(4, 211, 211)
    x, starts = texts(lengths, model.hidden)
    for biased in (None, bias):
        one = run(encoder, starts, x, 1, biased)
        for threads in (2, 3, 4, 5, 64):
            assert torch.equal(run(encoder, starts, x, threads, biased), one), threads


def test_other_texts_do_not_change_a_bit(isa):
    for precision in ROUNDINGS:
        if not backend.cpp()[0].multiplies(precision):
            continue
        model = some_model()
        encoder = packed(model, precision)
        x, starts = texts(LENGTHS, model.hidden)
        together = run(encoder, starts, x, 2)
        for first, last in pairwise(starts):
            alone = run(encoder, starts_of([int(last - first)]), x[first:last])
            assert torch.equal(alone, together[first:last]), precision


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_bad_number_stays_in_its_text(precision, bad, threads):
    model = some_model()
    encoder = packed(model, precision)
    x, starts = texts(LENGTHS, model.hidden)
    clean = run(encoder, starts, x, threads)
    row = int(starts[4]) + 50
    x[row, 3] = bad
    out = run(encoder, starts, x, threads)
    mine = slice(int(starts[4]), int(starts[5]))
    assert out[mine].isnan().all()
    out[mine] = clean[mine]
    assert torch.equal(out, clean)


# -- bfloat16 and int8 ---------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 5, 16, 31, 70, 135, 540])
def test_rounds_as_it_says(rounded, width):
    """Nearer to the same rounding in torch than that is to exact numbers, by far.

    Not equal: a number that lies between two of the few may fall to either side.
    """
    hidden = 4 * min(width, 64)
    maker = Maker(width)
    model = Model(hidden, 2, [maker.layer(hidden, 2, [(width, GATED), (2 * width, PLAIN)])])
    x, starts = texts([40, 0, 1, 150], hidden)
    out = run(packed(model, rounded), starts, x, 2).double()
    same = formula(model, x.double(), starts, precision=rounded)
    exact = formula(model, x.double(), starts)
    distance, rounding = (out - same).square().mean().sqrt(), (same - exact).square().mean().sqrt()
    assert distance < 0.1 * rounding, (distance, rounding)
    assert rounding < {"bfloat16": 0.02, "int8": 0.05}[rounded]


def test_int8_of_whole_numbers_is_exact():
    """Weights of -127 .. 127 and rows over 0 .. 255 are what they are in 8 bits."""
    if not backend.cpp()[0].multiplies("int8"):
        pytest.skip("this processor does not multiply int8")
    hidden, maker = 37, Maker(2)
    model = Model(hidden, 1, [maker.layer(hidden, 1, [])])
    layer = model.layers[0]
    layer.scale = 0.0  # attention is the mean over the text, of one token: its value
    whole = torch.Generator().manual_seed(0)
    for part in (*layer.qkv, layer.output):
        part.weight.zero_()
    layer.qkv[2].weight.copy_(torch.eye(hidden) * 127)
    layer.output.weight.copy_(torch.randint(-126, 127, (hidden, hidden), generator=whole))
    layer.output.weight[:, 0] = 127
    x = torch.randint(-100, 156, (6, hidden), generator=whole).float()
    x[:, 0], x[:, 1] = -100, 155
    layer.qkv[2].bias, layer.output.bias = None, None
    starts = starts_of([1] * 6)
    out = run(packed(model, "int8"), starts, x)
    assert_accurate(out, formula(model, x.double(), starts), formula(model, x, starts), floor=1e-5)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-10, 1e10, 1e18])
def test_extreme_weights(precision, size):
    """Down to nothing, and up to where the sums' squares in a norm are still finite."""
    model = some_model()
    for layer in model.layers:
        for unit in layer.units:
            unit.down.weight.mul_(size)
            unit.down.bias.mul_(size)
    x, starts = texts([9, 30], model.hidden)
    out = run(packed(model, precision), starts, x)
    exact = formula(model, x.double(), starts, precision=precision)
    assert out.isfinite().all()
    assert (out - exact).abs().max() < {"float32": 1e-3, "bfloat16": 0.2, "int8": 0.7}[precision]


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-37, 1e-25])
def test_rows_of_next_to_nothing(precision, size):
    """What a row is divided by, to have it in 8 bits, is no number that is too small for it."""
    model = some_model()
    x, starts = texts([9, 30], model.hidden)
    x *= size
    out = run(packed(model, precision), starts, x)
    exact = formula(model, x.double(), starts, precision=precision)
    assert (out - exact).abs().max() < {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.3}[precision]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_weight_is_not_hidden(precision, bad):
    model = some_model()
    model.layers[1].units[1].down.weight[5, 2] = bad
    x, starts = texts([9, 30], model.hidden)
    assert run(packed(model, precision), starts, x).isnan().all()


# -- embeddings ----------------------------------------------------------------------------------


def table(before, trigram, after, kinds, hidden=20, width=6):
    maker, sum_width = Maker(4), width if after or not before else hidden
    word_width = 7 if before else sum_width
    if not before and not after:
        word_width = sum_width = hidden
    return Embeddings(
        words=maker.normal(50, word_width),
        positions=maker.normal(40, sum_width),
        segments=maker.normal(3, sum_width) if kinds else None,
        before=maker.linear(word_width * (3 if trigram else 1), sum_width) if before else None,
        trigram=trigram,
        after=maker.linear(sum_width, hidden) if after else None,
        norm=maker.norm(sum_width),
    )


@pytest.mark.parametrize("kinds", [False, True])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(
    "before, trigram, after",
    [(False, False, False), (True, False, False), (True, True, False), (False, False, True)]
    + [(True, True, True)],
)
def test_embeddings(precision, before, trigram, after, holes, kinds):
    lengths = [0, 5, 1, 19, 0, 12]
    starts, rows = starts_of(lengths), sum(lengths)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(50, (rows,), generator=generator)
    places = segments = None
    if holes:
        places = torch.cat([torch.arange(n) + torch.arange(n) // 3 for n in lengths])
    if kinds:
        segments = torch.randint(3, (rows,), generator=generator)
    model = Model(20, 2, embeddings=table(before, trigram, after, kinds))
    out = run(packed(model, precision), starts, 20, 2, ids=ids, places=places, kinds=segments)
    exact, single = (
        embedded(model, starts, ids, places, segments, precision, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    floor = 0.02 if precision == "bfloat16" else 3e-6
    assert_accurate(out, exact, single, floor=floor)


@pytest.mark.parametrize(
    "what, value, names",
    [("ids", 50, "token 50"), ("ids", -1, "token -1"), ("places", 40, "position 40")]
    + [("places", -1, "position -1"), ("kinds", 3, "segment 3"), ("kinds", -7, "segment -7")],
)
def test_what_the_tables_do_not_have(what, value, names):
    encoder = packed(Model(20, 2, embeddings=table(False, False, False, True)))
    starts = starts_of([4, 3])
    tokens = {name: torch.zeros(7, dtype=torch.long) for name in ("ids", "places", "kinds")}
    tokens[what][5] = value
    with pytest.raises(IndexError, match=names):
        run(encoder, starts, 20, **tokens)


def test_texts_beyond_the_positions():
    encoder = packed(Model(20, 2, embeddings=table(False, False, False, False)))
    run(encoder, starts_of([40]), 20, ids=torch.zeros(40, dtype=torch.long))
    with pytest.raises(IndexError, match="position 40: the model has 40"):
        run(encoder, starts_of([3, 41]), 20, ids=torch.zeros(44, dtype=torch.long))
    with pytest.raises(IndexError, match="position 8: the model has 8"):
        run(encoder, starts_of([3, 9]), torch.zeros(12, 20), bias=torch.zeros(2, 8, 8))


def test_tokens_without_tables_and_starts_that_fall():
    encoder = packed(Model(20, 2))
    with pytest.raises(ValueError, match="no embeddings"):
        run(encoder, starts_of([3]), 20, ids=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="starts fall"):
        run(encoder, torch.tensor([0, 5, 3]), torch.zeros(3, 20))


def test_what_does_not_fit_together():
    module, layer = backend.cpp()[0], Maker().layer(20, 2, [(10, "down(mul(up(x), x))")])
    for sizes in [(20, 3, 6), (0, 1, 0), (600, 2, 300)]:
        with pytest.raises(ValueError, match="encoder: heads"):
            module.Encoder(*sizes, "float32", False)
    with pytest.raises(ValueError, match="precision is float32"):
        module.Encoder(20, 2, 10, "float16", False)
    wide = Maker().unit(20, 30, PLAIN)
    wide.gene = "down(mul(up(x), x))"  # x has 20 columns, up(x) 30
    layer.units.append(wide)
    with pytest.raises(ValueError, match="narrower"):
        packed(Model(20, 2, [layer]))


def test_an_encoder_of_another_instruction_set(rounded, isa_by_name):
    encoder = packed(some_model(), rounded)
    x, starts = texts([4], 52)
    isa_by_name("baseline")
    assert not backend.cpp()[0].multiplies(rounded)
    with pytest.raises(ValueError, match="another instruction set"):
        run(encoder, starts, x)
    with pytest.raises(ValueError, match="does not multiply"):
        packed(some_model(), rounded)


# -- Packed --------------------------------------------------------------------------------------


def tiny():
    torch.manual_seed(0)
    genes = ["2x1 down(gelu(up(x)))", "1x2 down(mul(gelu(up(x)), gate(x)))"]
    config = EfficientBertConfig(
        vocab_size=50,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        genes=genes,
        embedding_size=7,
        max_position_embeddings=30,
    )
    return EfficientBertModel(config).eval()


def test_errors_are_the_users(isa):
    made = Packed(tiny())
    starts = starts_of([3, 2])
    ids = torch.tensor([1, 2, 3, 4, 50])
    with pytest.raises(UserError, match="token 50: the model has 50; does the tokenizer"):
        made.run(torch.empty(5, 20), starts, ids)
    ids[4] = 5
    out = torch.empty(5, 20)
    made.run(out, starts, ids)  # after an error it goes on
    with torch.no_grad():
        want = [made_of(ids[:3]), made_of(ids[3:])]
    torch.testing.assert_close(out, torch.cat(want), atol=1e-5, rtol=1e-4)


def made_of(ids):
    return tiny()(ids[None]).last_hidden_state[0]


def test_heads_that_are_too_wide():
    config = EfficientBertConfig(
        vocab_size=50,
        hidden_size=300,
        num_hidden_layers=1,
        num_attention_heads=1,
        genes=["1x1/10 down(gelu(up(x)))"],
    )
    with pytest.raises(NotPackable, match="wider than 256"):
        Packed(EfficientBertModel(config))


def test_no_extension(monkeypatch):
    monkeypatch.setattr(backend, "cpp", lambda: (None, "not built"))
    with pytest.raises(NotPackable, match="not built"):
        Packed(tiny())
