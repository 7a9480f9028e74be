"""FFN and ElasticFFN against a composition of torch's own functions that knows no segments."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from fastffn.errors import UserError
from fastffn.expr import PUBLISHED, Gene
from fastffn.layers import FFN, ElasticFFN

GATED = "2x1/2 down(mul(swish(gate(x)), up(x)))"
EXTRA = (
    GATED,
    "1x1/3 mul(down(max(gelu_erf(up(tanh(x))), x)), sigmoid(x))",
    "3x1/4 add(x, down(mul(add(up(x), tanh(x)), x)))",
    "1x2 down(elu(up(x)))",
)
GENES = tuple(map(str, PUBLISHED)) + EXTRA

TORCH = {
    "gelu": lambda a: F.gelu(a, approximate="tanh"),
    "gelu_erf": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "swish": F.silu,
    "add": torch.add,
    "mul": torch.mul,
    "max": torch.maximum,
}


def value(node, x, unit, width):
    """The gene's tree evaluated node by node, unequal widths cut to the smaller."""
    if node.is_leaf:
        return x
    args = [value(arg, x, unit, width) for arg in node.args]
    if node.op in ("up", "gate"):
        layer = getattr(unit, node.op)
        return args[0] @ layer.weight[:width].T + layer.bias[:width]
    if node.op == "down":
        return args[0] @ unit.down.weight[:, :width].T + unit.down.bias
    narrow = min(arg.shape[-1] for arg in args)
    return TORCH[node.op](*(arg[..., :narrow] for arg in args))


def composed(module, x, gene):
    gene = Gene.parse(gene) if isinstance(gene, str) else gene
    for unit in list(module.units)[: gene.stack]:
        y = value(gene.expr, x, unit, gene.width(module.hidden_size))
        x = F.layer_norm(x + y, x.shape[-1:], unit.norm.weight, unit.norm.bias, unit.norm.eps)
    return x


def randomised(module):
    """Large enough weights that every part of the block moves the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * (0.3 if parameter.dim() > 1 else 0.5) + (parameter.dim() == 1))
    return module


@pytest.mark.parametrize("hidden", [12, 36])
@pytest.mark.parametrize("gene", GENES)
def test_forward_and_gradients(gene, hidden):
    module = randomised(FFN(hidden, gene, dropout=0.0).double())
    x = torch.randn(2, 5, hidden, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, hidden, dtype=torch.float64)
    inputs = [x, *module.parameters()]
    got, want = module(x), composed(module, x, gene)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad((got * weight).sum(), inputs)
    theirs = torch.autograd.grad((want * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gene", PUBLISHED, ids=str)
def test_published_widths(gene):
    """At 540 the widths are 540, 270 and 180; none of the rows is aligned."""
    module = FFN(540, gene, dropout=0.0)
    assert module.width == 540 * gene.ratio and len(module.units) == gene.stack
    x = torch.randn(3, 540)
    want = composed(module.double(), x.double(), gene)
    got = module.float()(x)
    assert (got - want).abs().max() < 2e-5 * want.abs().max()


def test_quarter_width():
    module = FFN(540, "1x1/4 down(mul(relu(up(x)), x))", dropout=0.0).double()
    assert module.units[0].up.weight.shape == (135, 540)
    x = torch.randn(2, 540, dtype=torch.float64)
    torch.testing.assert_close(module(x), composed(module, x, module.gene))


@pytest.mark.parametrize("recompute", ["activation", "all"])
@pytest.mark.parametrize("gene", [GENES[0], GENES[4], GATED])
def test_recompute_changes_memory_only(gene, recompute):
    def run(mode):
        torch.manual_seed(3)
        module = FFN(24, gene, dropout=0.3, recompute=mode)
        x = torch.randn(4, 24, requires_grad=True)
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = module(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
        return y, gradients, sum(kept.values())

    y, gradients, kept = run("none")
    same_y, same_gradients, less = run(recompute)
    assert torch.equal(y, same_y)
    for a, b in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert less < kept


def test_dropout_only_in_training():
    module = FFN(16, "1x1 down(gelu(up(x)))", dropout=0.5)
    x = torch.randn(8, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    torch.testing.assert_close(module(x), composed(module, x, module.gene))


def test_autocast():
    module = FFN(24, GENES[4], dropout=0.0)
    x = torch.randn(5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, module(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("gene", GENES)
def test_elastic_equals_extracted(gene):
    elastic = randomised(ElasticFFN(12, max_stack=4, max_width=24, gated=True, dropout=0.0))
    x = torch.randn(3, 12)
    extracted = elastic.extract(gene)
    assert torch.equal(elastic(x, gene), extracted(x))
    torch.testing.assert_close(extracted(x), composed(elastic, x, gene), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        extracted.units[0].up.weight.zero_()
    assert elastic.units[0].up.weight.ne(0).all(), "extract shares memory with the supernet"


def test_elastic_gradients_of_unused_weights():
    elastic = ElasticFFN(12, max_stack=3, max_width=10, dropout=0.0)
    elastic(torch.randn(4, 12), "2x1/2 down(gelu(up(x)))").square().mean().backward()
    for unit in elastic.units[:2]:
        for used, unused in (
            (unit.up.weight.grad[:6], unit.up.weight.grad[6:]),
            (unit.up.bias.grad[:6], unit.up.bias.grad[6:]),
            (unit.down.weight.grad[:, :6], unit.down.weight.grad[:, 6:]),
        ):
            assert used.ne(0).any() and unused.eq(0).all()
    assert all(parameter.grad is None for parameter in elastic.units[2].parameters())


def test_elastic_current_gene():
    elastic = ElasticFFN(12, max_stack=2, max_width=12, dropout=0.0)
    x = torch.randn(3, 12)
    with pytest.raises(UserError, match="set_gene"):
        elastic(x)
    with pytest.raises(UserError, match="expected a Gene or its text, got list"):
        elastic(x, [1])
    elastic.set_gene("2x1/3 down(relu(up(x)))")
    assert torch.equal(elastic(x), elastic(x, "2x1/3 down(relu(up(x)))"))
    with pytest.raises(UserError, match="max_stack"):
        elastic.set_gene("3x1 down(gelu(up(x)))")
    with pytest.raises(UserError, match="max_width"):
        elastic.set_gene("1x2 down(gelu(up(x)))")
    with pytest.raises(UserError, match="gated=True"):
        elastic.set_gene(GATED)
    assert str(elastic.gene).startswith("2x1/3")


@pytest.mark.parametrize(
    "change, name",
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 1.5}, "hidden_size"),
        ({"gene": 3}, "gene"),
        ({"gene": "1x1 down(relu(mul(x, up(x)))"}, "never closed"),
        ({"gene": "1x2 down(mul(x, up(x)))"}, "gene"),
        ({"gene": "1x1/40 down(relu(up(x)))"}, "gene"),
        ({"dropout": 1}, "dropout"),
        ({"layer_norm_eps": 0}, "layer_norm_eps"),
        ({"recompute": "some"}, "recompute"),
    ],
)
def test_bad_arguments(change, name):
    with pytest.raises(UserError, match=name):
        FFN(**({"hidden_size": 12, "gene": "1x1 down(gelu(up(x)))"} | change))


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(2, 11), r"x: expected \[..., 12\], got \[2, 11\]"),
        (torch.tensor(1.0), r"x: expected \[..., 12\], got \[\]"),
        (torch.ones(2, 12, dtype=torch.long), "x: expected a floating-point tensor"),
    ],
)
def test_bad_input(x, message):
    gene = "1x1 down(gelu(up(x)))"
    with pytest.raises(UserError, match=message):
        FFN(12, gene)(x)
    with pytest.raises(UserError, match=message):
        ElasticFFN(12, 1, 12)(x, gene)


@pytest.mark.parametrize("as_object", [False, True])
def test_elastic_compiles_whole(as_object):
    torch._dynamo.reset()
    elastic = randomised(ElasticFFN(12, max_stack=2, max_width=12, gated=True, dropout=0.0))
    x = torch.randn(3, 12)
    compiled = torch.compile(elastic, fullgraph=True, backend="aot_eager")
    for text in ("2x1/3 down(tanh(gelu(up(x))))", "1x1 tanh(down(gelu(up(x))))", GATED):
        gene = Gene.parse(text) if as_object else text
        torch.testing.assert_close(compiled(x, gene), elastic(x, text))
        elastic.set_gene(gene)
        torch.testing.assert_close(compiled(x), elastic(x, text))


def test_modules_are_called_at_full_width():
    """Forward hooks count, and what replaces a linear map is used; both by FFN and ElasticFFN."""
    for module in (FFN(12, GATED), ElasticFFN(12, 2, 6, gated=True)):
        module.eval()
        called = []
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(
                    lambda m, i, o, seen=called, name=name: seen.append(name)
                )
        x = torch.randn(3, 12)
        arguments = (GATED,) if isinstance(module, ElasticFFN) else ()
        before = module(x, *arguments)
        parts = ("up", "gate", "down")
        assert called == [f"units.{k}.{part}" for k in (0, 1) for part in parts]
        adapted = module.units[1].gate
        module.units[1].gate = torch.nn.Sequential(adapted, torch.nn.Tanh())
        assert not torch.equal(module(x, *arguments), before)


def test_dynamic_quantisation():
    torch.manual_seed(0)
    module = FFN(32, "2x1 tanh(down(gelu(up(x))))", dropout=0.0).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another home of its quantisation
        quantised = torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear})
    assert "quantized" in type(quantised.units[0].up).__module__
    x = torch.randn(5, 32)
    got, want = quantised(x), module(x)
    assert 0 < (got - want).abs().max() < 0.05 * want.abs().max()
