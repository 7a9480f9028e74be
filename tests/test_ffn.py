"""The op `ffn` against torch: values, gradients, recomputation, slices, autocast, memory, FLOPs."""

import itertools

import pytest
import torch
from ffn_checks import GENES, operands
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_accurate
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastffn import FFN, ElasticFFN, UserError
from fastffn.expr import PUBLISHED
from fastffn.functional import ffn
from fastffn.ops import ffn_interpreted, ffn_reference

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RECOMPUTE = ("none", "activation", "all")


def run(leaves, gene, dropout=0.0, recompute="none", seed=5):
    x, up, up_bias, gate, gate_bias, *others = leaves
    seed = torch.tensor([seed], device=x.device) if dropout else None
    return ffn(
        x, gene, up, up_bias, *others, gate, gate_bias,
        dropout=dropout, recompute=recompute, seed=seed,
    )  # fmt: skip


def oracle(leaves, gene, dropout=0.0, seed=5):
    seed = torch.tensor([seed], device=leaves[0].device) if dropout else None
    return ffn_reference.ffn(*leaves, seed, gene, leaves[1].shape[0], dropout, 1e-5)


def gradients(y, leaves, grad):
    return torch.autograd.grad(y, [x for x in leaves if x is not None], grad)


def copies(leaves, dtype=None):
    return [
        None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_()
        for x in leaves
    ]


def check(gene, leaves, dropout=0.0, recompute="none"):
    """Value and gradients by the oracle rule."""
    same, exact = copies(leaves), copies(leaves, torch.float64)
    y, want, true = run(leaves, gene, dropout, recompute), oracle(same, gene, dropout), None
    true = oracle(exact, gene, dropout)
    assert y.dtype == want.dtype and y.shape == want.shape
    assert_accurate(y, true, want, f"{gene}: y")
    grad = torch.randn(y.shape, dtype=torch.float64, device=y.device).to(y.dtype)
    triples = zip(
        gradients(y, leaves, grad),
        gradients(true, exact, grad.double()),
        gradients(want, same, grad),
        strict=True,
    )
    for i, (got, truth, other) in enumerate(triples):
        assert got.dtype == other.dtype
        assert_accurate(got, truth, other, f"{gene}: gradient {i}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GENES)
def test_every_kind_of_gene(name, dtype, device):
    gene = GENES[name]
    check(gene, operands(gene, 37, 180, 135, dtype, device), dropout=0.1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hidden, width", [(1, 1), (7, 3), (135, 45), (540, 270), (384, 1536)])
def test_odd_widths(hidden, width, device):
    check(GENES["epilogue"], operands("", 20, hidden, width, torch.float32, device))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_shapes(data):
    """In float64, where no sample is too small to tell a defect from rounding."""
    gene = data.draw(st.sampled_from(list(GENES.values())))
    width = data.draw(st.sampled_from([1, 7, 16, 33]))
    hidden = width + data.draw(st.sampled_from([0, 1, 15]))
    rows = data.draw(st.sampled_from([0, 1, 2, 65]))
    seed = data.draw(st.integers(0, 99))
    leaves = operands(gene, rows, hidden, width, torch.float64, seed=seed)
    dropout, recompute = (
        data.draw(st.sampled_from([0.0, 0.25])),
        data.draw(st.sampled_from(RECOMPUTE)),
    )
    same = copies(leaves)
    y, want = run(leaves, gene, dropout, recompute), oracle(same, gene, dropout)
    torch.testing.assert_close(y, want, rtol=1e-8, atol=1e-8)
    grad = torch.randn(y.shape, dtype=torch.float64)
    pairs = zip(gradients(y, leaves, grad), gradients(want, same, grad), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", GENES)
def test_several_slabs_equal_one(name, monkeypatch):
    gene = GENES[name]
    leaves = operands(gene, 300, 24, 16, torch.float64)
    grad = torch.randn(300, 24, dtype=torch.float64)
    y = run(leaves, gene, 0.2)
    whole = [y, *gradients(y, leaves, grad)]
    monkeypatch.setattr(ffn_interpreted, "_MIN_ROWS", 64)
    monkeypatch.setattr(ffn_interpreted, "_SLAB_BYTES", 0)
    y = run(leaves, gene, 0.2)
    for got, want in zip([y, *gradients(y, leaves, grad)], whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GENES)
def test_recomputation_changes_no_bit(name, dtype, device, monkeypatch):
    monkeypatch.setattr(ffn_interpreted, "_MIN_ROWS", 64)
    monkeypatch.setattr(ffn_interpreted, "_SLAB_BYTES", 0)
    gene, results = GENES[name], []
    for recompute in RECOMPUTE:
        leaves = operands(gene, 200, 48, 33, dtype, device)
        y = run(leaves, gene, 0.1, recompute)
        results.append([y, *gradients(y, leaves, y.detach())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def kept_floats(module, x):
    """Numbers per row that autograd keeps for the backward, parameters aside; a memory once."""
    storages = {}
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    assert y.requires_grad
    return sum(storages.values()) / x.element_size() / x.shape[0]


class Eager(torch.nn.Module):
    """The published blocks in plain torch."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        for block in self.blocks:
            for unit in block.units:
                weights = [unit.up.weight, unit.up.bias, None, None, unit.down.weight]
                weights += [unit.down.bias, unit.norm.weight, unit.norm.bias, None]
                gene = str(block.gene.expr)
                x = ffn_reference.ffn(x, *weights, gene, block.width, 0.0, 1e-5)
        return x


def test_what_autograd_keeps():
    """Counted, of the six published blocks: at most 0.65 and 0.27 of what torch keeps."""
    x = torch.randn(64, 540, requires_grad=True)
    kept = {}
    for recompute in RECOMPUTE:
        blocks = [FFN(540, gene, dropout=0.0, recompute=recompute) for gene in PUBLISHED]
        kept[recompute] = kept_floats(torch.nn.Sequential(*blocks), x)
    eager = kept_floats(Eager(torch.nn.ModuleList(blocks)), x)
    inputs, units = 12 * 540, 12  # x of each unit, and mean and deviation besides
    products = sum(gene.stack * (gene.width(540) + 540) for gene in PUBLISHED)
    activations = sum(gene.stack * gene.width(540) for gene in PUBLISHED)
    assert kept["all"] == inputs + 2 * units
    assert kept["activation"] == kept["all"] + products
    assert kept["none"] == kept["activation"] + activations
    assert kept["activation"] <= 0.65 * eager and kept["all"] <= 0.27 * eager


def test_flops_are_counted():
    def count(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    leaves = operands("gate", 10, 8, 6, torch.float32)
    gene = GENES["gated"]
    product = 2 * 10 * 8 * 6
    with torch.no_grad():
        assert count(lambda: run(leaves, gene)) == 3 * product
    assert count(lambda: run(leaves, gene).sum().backward()) == 9 * product
    assert count(lambda: run(leaves, gene, recompute="all").sum().backward()) == 12 * product
    assert count(lambda: oracle(leaves, gene).sum().backward()) == 9 * product


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_is_as_accurate_as_torchs(device):
    gene = GENES["x in the epilogue"]
    leaves = operands(gene, 40, 48, 24, torch.float32, device)
    same, exact = copies(leaves), copies(leaves, torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, want = run(leaves, gene), oracle(same, gene)
    assert y.dtype == want.dtype == torch.float32
    true, grad = oracle(exact, gene), torch.randn(40, 48, device=device)
    assert_accurate(y, true, want)
    for got, exactly, other in zip(
        gradients(y, leaves, grad),
        gradients(true, exact, grad.double()),
        gradients(want, same, grad),
        strict=True,
    ):
        assert got.dtype == other.dtype
        assert_accurate(got, exactly, other)


def test_checkpointing_draws_the_same_mask():
    block = FFN(48, "2x1 tanh(down(gelu(up(x))))", dropout=0.3).double()
    x = torch.randn(9, 48, dtype=torch.float64, requires_grad=True)
    grads = []
    for wrap in (lambda f, a: f(a), lambda f, a: checkpoint(f, a, use_reentrant=False)):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(wrap(block, x).square().sum(), [x, *block.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["everything", "plain"])
def test_gradcheck(name):
    gene = GENES[name]
    leaves = operands(gene, 3, 5, 4, torch.float64)
    present = [i for i, x in enumerate(leaves) if x is not None]

    def function(*some):
        every = [None] * 9
        for i, x in zip(present, some, strict=True):
            every[i] = x
        return run(every, gene, 0.2)

    assert torch.autograd.gradcheck(function, [leaves[i] for i in present])


@pytest.mark.parametrize("name", ["everything", "plain"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_opcheck(name, recompute):
    gene = GENES[name]
    leaves = operands(gene, 6, 8, 5, torch.float32)
    seed = torch.tensor([3])
    arguments = (*leaves, seed, gene, [5], 0.1, 1e-5, recompute)
    torch.library.opcheck(torch.ops.fastffn.ffn.default, arguments)


def test_torch_compile_takes_a_block_whole():
    block = FFN(48, "2x1/2 tanh(down(gelu(up(x))))", dropout=0.0)
    x = torch.randn(4, 9, 48, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True)
    y, want = compiled(x), block(x)
    assert torch.equal(y, want)
    leaves = [x, *block.parameters()]
    pairs = zip(
        torch.autograd.grad(y.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_second_gradients_are_refused():
    """A gradient penalty must raise, not lie."""
    leaves = operands("", 4, 8, 5, torch.float32)
    y = run(leaves, GENES["plain"])
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)


def test_nan_and_overflow_propagate_as_torchs():
    gene = GENES["plain"]
    leaves = operands(gene, 5, 16, 9, torch.float16)
    with torch.no_grad():
        leaves[0][1, 3], leaves[0][2, 2] = float("nan"), float("inf")
        leaves[0][3] = 6e4  # its products overflow
        y, want = run(leaves, gene), oracle(leaves, gene)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isfinite(), want.isfinite())
    assert y.isnan().any() and y.isfinite().any()


def test_bitwise_equal_on_any_number_of_threads():
    """Of what is ours; torch's products are left out by widths of one."""
    block = FFN(540, "1x1/540 tanh(down(gelu(up(x))))", dropout=0.4)
    x = torch.randn(300, 540, requires_grad=True)
    results = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(2)
        y = block(x)
        results.append([y, *torch.autograd.grad(y.sum(), [block.units[0].norm.weight])])
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operands_that_are_absent_or_strided():
    """Each optional operand may be None; vectors may have strides."""
    gene = GENES["gated"]
    whole = operands(gene, 30, 20, 12, torch.float64)
    optional = (2, 4, 6, 7, 8)  # biases, and the norm's weight and bias
    for absent in [(i,) for i in optional] + [optional]:
        leaves = [None if i in absent else x for i, x in enumerate(whole)]
        want, same = None, copies(leaves)
        y, want = run(leaves, gene), oracle(same, gene)
        torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
        grad = torch.randn_like(y)
        pairs = zip(gradients(y, leaves, grad), gradients(want, same, grad), strict=True)
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    strided = [
        x.detach().repeat_interleave(2)[::2] if x.dim() == 1 else x.detach().t().contiguous().t()
        for x in copies(whole, torch.float32)
    ]
    dense = [x.contiguous() for x in strided]
    torch.testing.assert_close(run(strided, gene), run(dense, gene), rtol=1e-5, atol=1e-5)


def test_values_that_memory_does_not_show():
    leaves = [x if x is None else x.detach() for x in operands("", 9, 16, 8, torch.float32)]
    negative = torch.complex(torch.zeros(9, 16), -leaves[0]).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(
        run([negative, *leaves[1:]], GENES["plain"]), run(leaves, GENES["plain"])
    )
    x = leaves[0].requires_grad_()
    zero = torch._efficientzerotensor((9, 16))
    (grad,) = torch.autograd.grad(run(leaves, GENES["plain"]), x, zero)
    assert grad.abs().max() == 0


def test_an_output_may_be_changed_in_place():
    block, x = FFN(16, "1x1 down(gelu(up(x)))", dropout=0.0), torch.randn(3, 16)
    y = block(x)
    want = y.detach() + 1
    y += 1
    y.sum().backward()
    assert torch.equal(y, want) and block.units[0].up.weight.grad is not None
    elastic = ElasticFFN(16, 1, 16, dropout=0.0)
    for y in elastic.forward_many(x, ["1x1 down(gelu(up(x)))", "1x1/2 down(tanh(up(x)))"]):
        y.mul_(2)


def test_compiled_training_on_transposed_operands():
    leaves = operands("", 9, 16, 8, torch.float32)
    x = leaves[0].detach().view(3, 3, 16).transpose(0, 1).requires_grad_()
    up = leaves[1].detach().t().contiguous().t().requires_grad_()
    leaves = [x, up, *leaves[2:]]
    y = run(leaves, GENES["plain"])
    compiled = torch.compile(lambda *a: run(a, GENES["plain"]))
    pairs = zip(
        gradients(y.square().sum(), leaves, None),
        gradients(compiled(*leaves).square().sum(), leaves, None),
        strict=True,
    )
    for got, want in pairs:
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("where", ["norm_weight", "norm_bias"])
def test_a_wider_norm(where):
    leaves = operands("", 9, 16, 8, torch.float32)
    index = {"norm_weight": 7, "norm_bias": 8}[where]
    leaves[index] = leaves[index].detach().double().requires_grad_()
    exact = copies(leaves, torch.float64)
    y, want = run(leaves, GENES["plain"]), oracle(exact, GENES["plain"])
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    mine = gradients(y, leaves, torch.ones_like(y))
    assert mine[index - 2].dtype == torch.float64  # the gate's two are absent


def test_a_trace_depends_on_its_input():
    block = FFN(16, "1x1 down(gelu(up(x)))", dropout=0.0).eval()
    traced = torch.jit.trace(block, torch.randn(3, 16))
    x = torch.randn(5, 16)
    torch.testing.assert_close(traced(x), block(x))


@pytest.mark.parametrize(
    "name, module",
    [
        ("norm", torch.nn.LayerNorm((3, 16))),
        ("up", torch.nn.Linear(16, 16, bias=False)),
        ("down", torch.nn.Sequential(torch.nn.Linear(16, 16))),
    ],
)
def test_replaced_modules_do_what_they_do(name, module):
    block = FFN(16, "1x1 tanh(down(gelu(up(x))))", dropout=0.0)
    setattr(block.units[0], name, module)
    unit, x = block.units[0], torch.randn(2, 3, 16)
    a = torch.nn.functional.gelu(unit.up(x), approximate="tanh")
    torch.testing.assert_close(block(x), unit.norm(x + torch.tanh(unit.down(a))))


def test_a_norm_vector_that_does_not_fit_is_torchs_error():
    block = FFN(640, "1x1 down(gelu(up(x)))", dropout=0.0)
    block.units[0].norm.weight = torch.nn.Parameter(torch.ones(16))
    with pytest.raises(RuntimeError, match="weight"):
        block(torch.randn(2, 640))


def test_a_replacement_that_does_not_fit_is_torchs_error():
    block = FFN(640, "1x1 down(gelu(up(x)))", dropout=0.0)
    block.units[0].norm = torch.nn.LayerNorm(16)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        block(torch.randn(2, 640))


def test_hooks_on_the_modules_see_their_calls():
    block = FFN(16, "1x1 down(gelu(up(x)))", dropout=0.0)
    x = torch.randn(3, 16)
    want, seen = block(x), []
    block.units[0].down.register_forward_hook(lambda *a: seen.append(1))
    torch.testing.assert_close(block(x), want)
    assert seen == [1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(3, 5)}, "does not go into up"),
        ({"down": torch.ones(3, 4)}, r"down is \[3, 4\], expected \[4, 6\]"),
        ({"gate": torch.ones(6, 4)}, "exactly if"),
        ({"down": torch.ones(4, 6, dtype=torch.bfloat16)}, "they are one type"),
        ({"x": torch.ones(3, 4, dtype=torch.int32)}, "int32"),
        ({"recompute": "some"}, "expected one of none, activation, all"),
        ({"dropout": 1.0}, "probability"),
        ({"seed": torch.ones(1)}, "expected int64"),
        ({"seed": torch.tensor(1)}, r"expected int64 \[1\]"),
        ({"up_bias": torch.ones(6).double()}, "they are one type"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "x": torch.ones(3, 4),
        "gene": GENES["plain"],
        "up": torch.ones(6, 4),
        "up_bias": None,
        "down": torch.ones(4, 6),
        "down_bias": None,
        "norm_weight": None,
        "norm_bias": None,
    }
    assert ffn(**arguments).shape == (3, 4)
    with pytest.raises(UserError, match=message):
        ffn(**(arguments | change))


def test_mixed_types_need_autocast():
    block = FFN(16, "1x1 down(gelu(up(x)))", dropout=0.0)
    with pytest.raises(UserError, match="autocast"):
        block(torch.randn(3, 16, dtype=torch.bfloat16))


def test_every_executor(served_by):
    for gene, recompute in itertools.product(("epilogue", "everything"), ("none", "all")):
        leaves = operands(GENES[gene], 21, 40, 20, torch.float32)
        check(GENES[gene], leaves, 0.1, recompute)
