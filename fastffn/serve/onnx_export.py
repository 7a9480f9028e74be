"""A model as an ONNX graph, in float32 or with products in int8.

The graph is made by `torch.onnx.export` from `torch.export`, in the portable form of fastffn's ops:
it holds operations of the standard alone ("" domain), whoever's runtime runs it. Batch and length
are free. Attention is written out (`eager`): the graph of torch's fused attention has a test for
NaN and a choice over every score besides, which cost a third more nodes and 5% of the time in
onnxruntime, for the sake of texts without a single token.

int8 is onnxruntime's dynamic quantization: weights of products are int8 by output column, their
other operand is quantized as it comes. It needs no data. MatMulInteger and DynamicQuantizeLinear
are of the standard too.
"""

import contextlib
import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..ops import backend
from .interface import (
    SENTENCE,
    Interface,
    Plain,
    difference,
    evaluating,
    of_tokens,
    on_device,
    probes,
    random_batch,
)
from .onnx_session import open_session, require, run

FILE, FILE_INT8 = "model.onnx", "model_int8.onnx"
TOLERANCE = 1e-4  # between torch and onnxruntime, in float32
_STANDARD = ("", "ai.onnx")
_IN_ONE_FILE = 2**31 - 2**24  # bytes of weights: a protobuf ends at 2 GiB
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def write(
    model: nn.Module, interface: Interface, folder: Path, quantize: str | None = None
) -> dict[str, Any]:
    """Writes model.onnx, or with quantize="int8" model_int8.onnx, and checks it on onnxruntime.

    Returns:
        "opset", and "difference": the largest one from torch in float32 (see
        `interface.difference`); with int8 also "int8": see `_compared`.

    Raises:
        UserError: a package is missing, the model cannot be written as a graph, or the graph's
            outputs are not torch's.
    """
    require(*PACKAGES)
    import onnx_ir.passes.common

    if next(model.parameters()).dtype != torch.float32:
        model = copy.deepcopy(model).float()
    with contextlib.ExitStack() as stack:
        place = folder
        if quantize is not None:  # float32 only to start from
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        program = _traced(model, interface)
        clear = onnx_ir.passes.common.ClearMetadataAndDocStringPass()
        clear(program.model)  # each node's lines of source and their paths on this machine
        size = sum(parameter.numel() * 4 for parameter in model.parameters())
        program.save(str(place / FILE), external_data=size > _IN_ONE_FILE)
        report = {"opset": _checked(place / FILE)}
        session = open_session(place / FILE)
        report["difference"] = _verified(session, model, interface)
        if quantize is not None:
            _quantize(place / FILE, folder / FILE_INT8, size > _IN_ONE_FILE)
            _checked(folder / FILE_INT8)
            report[quantize] = _compared(session, open_session(folder / FILE_INT8), interface)
    return report


def _traced(model: nn.Module, interface: Interface) -> Any:
    from torch.onnx.errors import OnnxExporterError

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=interface.positions)
    example = on_device(random_batch(interface, [min(7, interface.longest), 3]), model)
    with _written_out(model), evaluating(model), backend.portable(), _silent():
        try:
            return torch.onnx.export(
                Plain(model, interface).eval(),
                (),
                kwargs=example,
                output_names=interface.outputs,
                dynamic_shapes={name: {0: batch, 1: length} for name in example},
                dynamo=True,
                verbose=False,
            )
        except OnnxExporterError as error:
            said = str(error).strip().split("\n", 1)[0]
            raise UserError(
                f"{type(model).__name__} cannot be written as an ONNX graph: {said}"
            ) from error


@contextlib.contextmanager
def _written_out(model: nn.Module) -> Iterator[None]:
    """Within it attention is products and a softmax, instead of torch's fused function."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the exporters' notes on deprecated Python and on packages that play no part."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _checked(file: Path) -> int:
    """The opset of a graph that has operations of the standard alone."""
    import onnx

    graph = onnx.load(file, load_external_data=False)
    foreign = {node.domain for node in graph.graph.node} - set(_STANDARD)
    foreign |= {function.domain for function in graph.functions}
    if foreign:
        raise UserError(f"{file.name} has operations of {', '.join(sorted(foreign))}")
    return next(each.version for each in graph.opset_import if each.domain in _STANDARD)


def _verified(session: Any, model: nn.Module, interface: Interface) -> float:
    worst = 0.0
    plain = Plain(model, interface)
    with evaluating(model):
        for batch in probes(interface):
            expected = plain(**on_device(batch, model))
            gap = difference(run(session, batch), expected, batch["attention_mask"])
            worst = max(worst, gap)
    if worst > TOLERANCE:
        raise UserError(
            f"the ONNX graph of {type(model).__name__} differs from torch by {worst:.1e}, "
            f"{TOLERANCE:.0e} is allowed: it is not written"
        )
    return worst


def _quantize(source: Path, target: Path, external: bool) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(source)
    # The quantizer turns weights of Gemm around, and stumbles over what is noted of their shapes.
    del graph.graph.value_info[:]
    with _silent():
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # onnxruntime advises through the root logger
        try:
            quantize_dynamic(
                graph,
                target,
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=external,
                extra_options={"MatMulConstBOnly": True},  # attention's scores stay float32
            )
        finally:
            root.setLevel(level)


def _compared(exact: Any, rounded: Any, interface: Interface) -> dict[str, float]:
    """What int8 changes, on random texts.

    Returns:
        "cosine": the mean over rows between both outputs, "difference": as in float32; of a head
        also "agreement": the share of rows with the same class (position, of question answering).
    """
    lengths = [4 + 7 * k % max(1, min(interface.longest, 64) - 4) for k in range(32)]
    batch = random_batch(interface, [min(length, interface.longest) for length in lengths], seed=1)
    expected, found = run(exact, batch), run(rounded, batch)
    mask = batch["attention_mask"]
    report = {"difference": difference(found, expected, mask)}
    expected, found = of_tokens(expected, mask), of_tokens(found, mask)
    name = SENTENCE if SENTENCE in expected else interface.outputs[0]
    right, ours = expected[name], found[name]
    report["cosine"] = torch.cosine_similarity(ours, right, dim=-1).mean().item()
    if "logits" in name and right.shape[-1] > 1:
        report["agreement"] = (ours.argmax(-1) == right.argmax(-1)).float().mean().item()
    return report
