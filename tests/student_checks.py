"""What the tests of students share: heads, tiny models with them, and comparison of outputs."""

import dataclasses

import torch
from encoders import batch, config

from fastffn.distill.heads import Head

NONE = Head("none")
TWO = Head("classification", ("no", "yes"))
HEADED = [TWO, Head("regression"), Head("qa"), Head("tokens", ("O", "B", "I"))]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a recipe's ModelSpec holds."""

    layers_of: str | None = None
    like: str | None = None
    efficientbert: dict | None = None
    supernet: dict | None = None
    layers: object = None
    how: str | None = None
    config: dict | None = None
    dtype: str | None = None


def headed(kind, head, **changes):
    """A random model with a head, its weights large enough for outputs to differ."""
    torch.manual_seed(0)
    values = head.configured(config(kind, **changes))
    model = head.auto_class(values).from_config(values)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    return model.eval()


def outputs(model):
    with torch.no_grad():
        found = model(**batch())
    return {name: found[name] for name in found.keys() if torch.is_tensor(found[name])}


def same(a, b):
    a, b = outputs(a), outputs(b)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)
