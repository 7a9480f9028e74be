"""The whole feed-forward block: fastffn, eager torch and torch.compile; and a supernet's step.

Six layers: the published EfficientBERT genes, twelve units of hidden width 540; and BERT's own FFN
at hidden width 384, intermediate width 1536. Without dropout, so that the outputs can be compared.
"""

import itertools
import random
import statistics

import pytest
import torch
from torch import nn

from fastffn import FFN, ElasticFFN, Gene
from fastffn.expr import PRIMITIVES, PUBLISHED
from fastffn.ops import backend, ffn_reference
from fastffn.ops.matmul import linear

from .harness import check_outputs, compiled, first_call, floor_seconds, interleave, works_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BERT = Gene.parse("1x1 down(gelu_erf(up(x)))", base=4)
MODELS = {"EfficientBERT 540": (540, PUBLISHED), "BERT 384/1536": (384, (BERT,) * 6)}


def eager(blocks: nn.ModuleList):
    """The same weights in plain torch."""

    def run(x, *_):
        for block in blocks:
            text = str(block.gene.expr)
            for unit in block.units:
                gate = unit.gate
                x = ffn_reference.ffn(
                    x, unit.up.weight, unit.up.bias,
                    None if gate is None else gate.weight, None if gate is None else gate.bias,
                    unit.down.weight, unit.down.bias, unit.norm.weight, unit.norm.bias, None,
                    text, block.width, 0.0, unit.norm.eps,
                )  # fmt: skip
        return x

    return run


def fused(blocks: nn.ModuleList):
    def run(x, *_):
        for block in blocks:
            x = block(x)
        return x

    return run


def products(blocks: nn.ModuleList):
    """The matrix products alone, by the library that fastffn uses: nobody's output, a measure."""

    def run(x, *_):
        for block in blocks:
            for unit in block.units:
                a = linear(x, unit.up.weight, unit.up.bias)
                x = linear(a, unit.down.weight, unit.down.bias)
        return x

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [128, 1024, 8192, pytest.param(32768, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("direction", ["inference", "training"])
@pytest.mark.parametrize("model", MODELS)
def test_ffn(benchmark, model, direction, rows, dtype, device):
    if rows > 8192 and device == "cpu":
        pytest.skip("a size for GPUs")
    torch._dynamo.reset()
    torch.manual_seed(0)
    hidden, genes = MODELS[model]
    training = direction == "training"
    blocks = nn.ModuleList(FFN(hidden, gene, dropout=0.0) for gene in genes).to(device, dtype)
    x = torch.randn(rows, hidden).to(device, dtype).requires_grad_(training)
    inputs = [x, *blocks.parameters()]
    grad = torch.randn(rows, hidden).to(device, dtype) if training else None
    plain = eager(blocks)
    functions = {"fastffn": fused(blocks), "eager": plain, **compiled(plain, device)}

    wide = nn.ModuleList(FFN(hidden, gene, dropout=0.0) for gene in genes).to(device).double()
    wide.load_state_dict(blocks.state_dict())
    leaves = [x.detach().double().requires_grad_(training), *wide.parameters()]
    exact = works_of({"exact": eager(wide)}, leaves, grad.double() if training else None)["exact"]
    works = works_of(functions, inputs, grad)
    first = check_outputs(works, exact)
    if not training:
        works |= works_of({"products alone": products(blocks)}, inputs, None)
    flops = sum(4 * block.gene.stack * rows * hidden * block.width for block in blocks)
    floor = floor_seconds(device, dtype, flops=flops * (3 if training else 1))
    benchmark.group = f"{model}, {direction}, {rows} rows, {dtype}, {device}"
    interleave(benchmark, works, "fastffn", 3.0, floor, first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1024, 8192])
def test_supernet_step(benchmark, rows, device):
    """The largest gene and three narrower ones, forward and backward into the weights' `grad`."""
    torch.manual_seed(0)
    genes = [
        "1x1 tanh(down(gelu(up(x))))",
        "1x1/2 elu(down(relu(up(x))))",
        "1x1/3 down(swish(up(x)))",
        "1x1/4 sigmoid(down(gelu(up(x))))",
    ]
    block = ElasticFFN(540, 1, 540, dropout=0.0).to(device)
    unit = block.units[0]
    x = torch.randn(rows, 540, device=device)
    texts, widths = [str(Gene.parse(g).expr) for g in genes], [540, 270, 180, 135]

    def backward(outputs):
        block.zero_grad()
        sum(y.square().sum() for y in outputs).backward()
        return tuple(p.grad for p in block.parameters())

    def sliced():
        weights = [unit.up.weight, unit.up.bias, None, None, unit.down.weight, unit.down.bias]
        weights += [unit.norm.weight, unit.norm.bias, None]
        pairs = zip(texts, widths, strict=True)
        return [ffn_reference.ffn(x, *weights, text, width, 0.0, 1e-5) for text, width in pairs]

    works = {
        "forward_many": lambda: backward(block.forward_many(x, genes)),
        "one by one": lambda: backward([block(x, gene) for gene in genes]),
        "eager": lambda: backward(sliced()),
    }
    benchmark.group = f"supernet step of four genes, {rows} rows, 540, fp32, {device}"
    interleave(benchmark, works, "forward_many")


def unseen_genes(seed: int = 0):
    generator = random.Random(seed)
    unary = [name for name, primitive in PRIMITIVES.items() if primitive.arity == 1]
    while True:
        a, b, c = (generator.choice(unary) for _ in range(3))
        joint = generator.choice(["add", "mul", "max"])
        yield f"1x1/2 {a}(down({joint}({b}(up(x)), {c}(x))))"


@pytest.mark.parametrize("device", DEVICES)
def test_first_step_of_a_new_gene(benchmark, device):
    """From a gene's text to its output and gradients, with the weights at hand."""
    block = ElasticFFN(540, 1, 540, dropout=0.0).to(device)
    unit = block.units[0]
    x = torch.randn(1024, 540, device=device, requires_grad=True)
    leaves = [x, *(p for name, p in unit.named_parameters())]

    def fused(gene):
        with backend.interpreted():
            return torch.autograd.grad(block(x, gene).sum(), leaves)

    def step(gene):
        text = str(Gene.parse(gene).expr)

        def run(x):
            weights = [unit.up.weight, unit.up.bias, None, None, unit.down.weight]
            weights += [unit.down.bias, unit.norm.weight, unit.norm.bias, None]
            return ffn_reference.ffn(x, *weights, text, 270, 0.0, 1e-5)

        return torch.autograd.grad(torch.compile(run)(x).sum(), leaves)

    fresh = unseen_genes()
    for gene in itertools.islice(fresh, 3):  # the first calls of a process start threads
        fused(gene)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        step(next(fresh))
        slow = [first_call(lambda: step(next(fresh))) for _ in range(3)]
    fast = [first_call(lambda: fused(next(fresh))) for _ in range(50)]
    benchmark.group = f"text of a new gene to its gradients, (1024, 540), fp32, {device}"
    benchmark.pedantic(lambda: fused(next(fresh)), rounds=20)
    ours, rival = statistics.median(fast), statistics.median(slow)
    benchmark.extra_info.update(
        median_ms={"fastffn": 1e3 * ours, "torch.compile": 1e3 * rival},
        ratio={"torch.compile": rival / ours},
        rounds=50,
        threads=torch.get_num_threads(),
    )
