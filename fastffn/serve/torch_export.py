"""A model as a program of `torch.export`: one file that torch runs without fastffn.

    program = torch.export.load("model.pt2").module()
    program(input_ids=..., attention_mask=...)["logits"]

The graph is in aten, torch's own operations; batch and length are free. It keeps the type of the
weights.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..ops import backend
from .interface import Interface, Plain, difference, evaluating, on_device, probes, random_batch

FILE = "model.pt2"
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}  # halves: as rounding goes
_HALF = 5e-2


def write(model: nn.Module, interface: Interface, folder: Path) -> dict[str, Any]:
    """Writes model.pt2 and checks it.

    Returns:
        "difference": the largest one from the model itself (see `interface.difference`).

    Raises:
        UserError: the model cannot be traced, or the program's outputs are not the model's.
    """
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=interface.positions)
    example = on_device(random_batch(interface, [min(7, interface.longest), 3]), model)
    with evaluating(model), backend.portable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(
                Plain(model, interface).eval(),
                (),
                example,
                dynamic_shapes={name: {0: batch, 1: length} for name in example},
            )
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            said = str(error).strip().split("\n", 1)[0]
            raise UserError(f"{type(model).__name__} cannot be traced: {said}") from error
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    foreign = sorted(str(op) for op in called if getattr(op, "namespace", "aten") != "aten")
    if foreign:
        raise UserError(f"the program of {type(model).__name__} calls {', '.join(foreign)}")
    torch.export.save(program, folder / FILE)
    return {"difference": _verified(folder / FILE, model, interface)}


def _verified(file: Path, model: nn.Module, interface: Interface) -> float:
    worst, program, plain = 0.0, torch.export.load(file).module(), Plain(model, interface)
    with evaluating(model):
        for batch in probes(interface):
            inputs = on_device(batch, model)
            gap = difference(program(**inputs), plain(**inputs), batch["attention_mask"])
            worst = max(worst, gap)
    allowed = _TOLERANCES.get(next(model.parameters()).dtype, _HALF)
    if worst > allowed:
        raise UserError(
            f"the program of {type(model).__name__} differs from it by {worst:.1e}, {allowed:.0e} "
            "is allowed: it is not written"
        )
    return worst
