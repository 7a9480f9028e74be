"""Encoders of transformers as they are and patched, eager and compiled: inference and training.

BERT-base and the six layers of all-MiniLM-L6-v2, random weights, sdpa attention, texts without
padding. A training step is forward and backward, gradients of all parameters, no optimiser: without
dropout, and with the dropout that BERT trains with, whose outputs are compared without it, since
the masks are others.
"""

import copy
import math

import pytest
import torch
from torch import nn

import fastffn

from .harness import check_outputs, compiled, floor_seconds, interleave, works_of

transformers = pytest.importorskip("transformers")

GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
MODELS = {"BERT-base": {}, "all-MiniLM-L6": MINILM}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIRECTIONS = ("inference", "training", "training with dropout")
CPU_SIZES = {  # batch, length
    "BERT-base": ((1, 128), (8, 128)),
    "all-MiniLM-L6": ((1, 128), (8, 128), (32, 128)),
}
GPU_SIZES = ((32, 128), (256, 128))


def _has_gradient(name: str) -> bool:
    """A bias of the keys moves all scores of a query alike: its gradient is rounding."""
    return not name.endswith("key.bias")


class Encoders:
    """One set of weights, run in every way.

    Args:
        sizes: of transformers' BertConfig.
    """

    def __init__(self, sizes: dict, batch: int, length: int, dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        config = transformers.BertConfig(**sizes)
        model = transformers.BertModel(config, add_pooling_layer=False)
        self.model = self._without_dropout(model).to(device, dtype).eval()
        self.patched = fastffn.patch(self._sharing(self.model))
        self.ids = torch.randint(1, config.vocab_size, (batch, length), device=device)
        self.grad = torch.randn(batch, length, config.hidden_size).to(device, dtype)
        self.device, self.dtype = device, dtype

    def functions(self) -> dict:
        eager, ours = self._runs(self.model), self._runs(self.patched)
        made = {"fastffn": ours, "eager": eager, **compiled(eager, self.device)}
        both = compiled(ours, self.device)
        return made | {name.replace("torch.compile", "both"): f for name, f in both.items()}

    def works(self, training: bool) -> dict:
        """By contender: the output, or the gradients of the parameters."""
        return works_of(self.functions(), self._leaves(self.model), self._upstream(training))

    def exact(self, training: bool):
        """The same in double precision."""
        wide = copy.deepcopy(self.model).double()
        grad = self._upstream(training)
        grad = None if grad is None else grad.double()
        return works_of({"exact": self._runs(wide)}, self._leaves(wide), grad)["exact"]

    def drop(self, share: float) -> None:
        """Dropout from now on."""
        for module in (*self.model.modules(), *self.patched.modules()):
            if isinstance(module, nn.Dropout):
                module.p = share
        self.model.train(share > 0)
        self.patched.train(share > 0)

    def flops(self) -> int:
        """Of the products with weights, in a forward."""
        rows = self.ids.numel()
        linears = (m for m in self.model.modules() if isinstance(m, nn.Linear))
        return sum(2 * rows * linear.weight.numel() for linear in linears)

    def _runs(self, model: nn.Module):
        return lambda *_: model(self.ids).last_hidden_state

    def _upstream(self, training: bool):
        return self.grad if training else None

    @staticmethod
    def _leaves(model: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in model.named_parameters() if _has_gradient(name)]

    @staticmethod
    def _sharing(model: nn.Module) -> nn.Module:
        return copy.deepcopy(model, {id(p): p for p in model.parameters()})

    @staticmethod
    def _without_dropout(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model


def measure(
    benchmark, sizes: dict, batch: int, length: int, dtype, direction: str, device: str
) -> None:
    """One case, outputs first; `benchmark` as in `interleave`."""
    torch._dynamo.reset()
    training = direction != "inference"
    encoders = Encoders(sizes, batch, length, dtype, device)
    works = encoders.works(training)
    first = check_outputs(works, encoders.exact(training))
    if direction == "training with dropout":
        encoders.drop(0.1)
    floor = floor_seconds(device, dtype, flops=encoders.flops() * (3 if training else 1))
    interleave(benchmark, works, "fastffn", 6.0, floor, first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", sorted({*GPU_SIZES, *sum(CPU_SIZES.values(), ())}, key=math.prod))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_patch(benchmark, model, direction, size, dtype, device):
    if size not in (CPU_SIZES[model] if device == "cpu" else GPU_SIZES):
        pytest.skip("a size for the other device or model")
    benchmark.group = f"{model}, {direction}, {size[0]} x {size[1]}, {dtype}, {device}"
    measure(benchmark, MODELS[model], *size, DTYPES[dtype], direction, device)
