"""Measures the latency table of a search space on the target device (`latency_table` uses it).

Everything is timed interleaved in one run, in inference mode, as in `evaluate.latency`: each round
runs every part twice, in an order of its own, and times the second: a model that serves runs call
after call, and after another part it would find the caches filled by that (8 per cent more for a
whole model). A part's time is that of its best tenth of rounds, and not the median: differences of
times are wanted, some of a few per cent, and where other processes have their share of the machine,
a long part is nearly always interrupted and a short one hardly ever. On one thread of a CPU that
thread's own time is taken, which stands still meanwhile.
What is timed is a stack of `UNITS` units with weights of their own: one unit alone would find its
weights in the nearest cache and pay for a call and a synchronisation by itself.

An operation is timed as a chain of `CHAIN` of it after `down`, in the narrowest unit, where it is
the largest part; what a model has besides its feed-forward networks, as the whole model minus these
networks run one after the other.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UserError
from ..expr import PRIMITIVES, Expr, Gene
from ..layers import FFN
from .grammar import Z2, X, assemble, plain
from .latency_table import LatencyTable, Target, unit_key

if TYPE_CHECKING:
    from .space import Space

__all__ = ["LatencyTable", "Target", "measure"]

UNITS = 4
CHAIN = 4
_LEAST_ROUNDS = 5
_PROLOGUE, _NARROWEST = "prologue", "narrowest"  # names of what is timed, beside widths and
_MODEL, _FFNS = "model", "feed-forward networks"  # operations

Progress = Callable[[int, int], None]


def measure(
    space: "Space",
    target: Target | None = None,
    model: nn.Module | None = None,
    progress: Progress | None = None,
    rounds: int = 100,
    seconds: float = 20.0,
) -> LatencyTable:
    """The latency table of all widths and operations that a space allows.

    Args:
        target: where; None: `space.target`.
        model: an EfficientBert model or supernet of the space's depth and width, any head; what it
            has besides its feed-forward networks is measured too. A supernet may be deeper: as many
            layers count as candidates have. None: that counts as 0. It is copied and stays as it
            is.
        progress: called after each round with their number and `rounds`.
        rounds, seconds: so many rounds, fewer where that takes longer (but not below five).

    Raises:
        UserError: a device that is not there, or a model that does not fit the space or target.
    """
    target = space.target if target is None else target
    device, dtype = _device(target.device), getattr(torch, target.dtype)
    parts = _parts(space)
    tokens = (target.batch_size, target.length)
    x = torch.randn(*tokens, space.hidden_size, generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype)
    modules = {name: FFN(space.hidden_size, gene) for name, gene in parts.items()}
    if model is not None:
        model = _plain_model(space, target, model)
        modules[_MODEL] = model
        modules[_FFNS] = nn.Sequential(*(layer.ffn for layer in model.base_model.encoder.layer))
    calls = {name: partial(module.to(device, dtype).eval(), x) for name, module in modules.items()}
    if model is not None:
        ids = torch.zeros(tokens, dtype=torch.long, device=device)
        calls[_MODEL] = partial(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    with _threads(target.threads):
        times = _timed(calls, device, rounds, seconds, progress)
    return _table(space.hidden_size, target, parts, times)


def _parts(space: "Space") -> dict[str, Gene]:
    """What is timed besides the model, by name: units, operations, `_PROLOGUE`, `_NARROWEST`."""
    shapes = {(shape.ratio, shape.gated) for shapes in space.costs for shape in shapes}
    if not shapes:
        raise UserError("latency: the space has no shapes to measure: allow more primitives")
    genes = {}
    for ratio, gated in sorted(shapes):
        gene = Gene(UNITS, ratio, assemble(plain(gated)), space.base)
        genes[unit_key(gene.width(space.hidden_size), gated)] = gene
    narrow = Gene(UNITS, min(shapes)[0], assemble(plain()), space.base)
    genes[_NARROWEST] = narrow
    genes[_PROLOGUE] = narrow.with_(expr=assemble(replace(plain(), prologue=_chain("gelu", X, 1))))
    for op in sorted(_operations(space)):
        segments = replace(plain(), epilogue=_chain(op, Z2, CHAIN))
        genes[op] = narrow.with_(expr=assemble(segments))
    return genes


def _operations(space: "Space") -> set[str]:
    """Elementwise operations of all functions that the space has, the plain ones included."""
    roots = [plain(False).middle, plain(True).middle]
    roots += [Gene.parse(text, space.base).expr for text in space.functions or ()]
    used = {node.op for root in roots for node in root.walk()} & set(PRIMITIVES)
    return used.union(*(rules.primitives for rules in space.rules))


def _chain(op: str, leaf: Expr, length: int) -> Expr:
    """`length` times the operation, one on the other; the second operand of a binary one is x."""
    expr = leaf
    for _ in range(length):
        expr = Expr.call(op, expr, X) if PRIMITIVES[op].arity == 2 else Expr.call(op, expr)
    return expr


def _plain_model(space: "Space", target: Target, model: nn.Module) -> nn.Module:
    """A copy of the model; of a supernet the narrowest stand-alone model."""
    layers = getattr(getattr(getattr(model, "base_model", None), "encoder", None), "layer", ())
    if not layers or not all(hasattr(layer, "ffn") for layer in layers):
        raise UserError(f"latency: {type(model).__name__} is no EfficientBert model")
    config, depth = model.config, space.num_layers
    fits = len(layers) == depth or (config.supernet is not None and len(layers) > depth)
    if not fits or config.hidden_size != space.hidden_size:
        raise UserError(
            f"latency: the model has {len(layers)} layers of width {config.hidden_size}, the space "
            f"{depth} of {space.hidden_size}: measure the model that is searched"
        )
    if target.length > config.max_position_embeddings:
        raise UserError(
            f"latency: the target's length {target.length} is more than the model's "
            f"{config.max_position_embeddings} positions"
        )
    if config.supernet is None:
        return copy.deepcopy(model)
    from ..distill.subnetworks import kept_layers
    from ..models import extract  # needs transformers, as the model itself did

    shapes = [min(shapes, key=lambda s: shapes[s].macs) for shapes in space.costs]
    genes = [
        Gene(shape.stack, shape.ratio, assemble(plain(shape.gated)), space.base) for shape in shapes
    ]
    return extract(model, genes, kept_layers(depth, len(layers)))


def _timed(
    calls: Mapping[str, Callable],
    device: torch.device,
    rounds: int,
    seconds: float,
    progress: Progress | None,
) -> dict[str, list[float]]:
    """Microseconds of each call in each round."""
    names, times = list(calls), {name: [] for name in calls}
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock, order = time.thread_time if alone else time.perf_counter, Random(0)
    with torch.inference_mode():
        for _ in range(2):  # first calls allocate, pick kernels and warm the caches
            for name in names:
                calls[name]()
        end = time.perf_counter() + seconds
        for k in range(rounds):
            if k >= _LEAST_ROUNDS and time.perf_counter() > end:
                break
            for name in order.sample(names, len(names)):
                calls[name]()
                _synchronise(device)
                start = clock()
                calls[name]()
                _synchronise(device)
                times[name].append(1e6 * (clock() - start))
            if progress is not None:
                progress(k + 1, rounds)
    return times


def _table(
    hidden_size: int,
    target: Target,
    parts: Mapping[str, Gene],
    times: Mapping[str, Sequence[float]],
) -> LatencyTable:
    best = {
        name: statistics.quantiles(found, n=10, method="inclusive")[0]
        for name, found in times.items()
    }
    operations = {
        name: max(0.0, best[name] - best[_NARROWEST]) / (UNITS * CHAIN * hidden_size)
        for name in parts
        if name in PRIMITIVES
    }
    units = {
        name: best[name] / UNITS
        for name in parts
        if name not in (*PRIMITIVES, _PROLOGUE, _NARROWEST)
    }
    before = (best[_PROLOGUE] - best[_NARROWEST]) / UNITS - hidden_size * operations["gelu"]
    rest = max(0.0, best[_MODEL] - best[_FFNS]) if _MODEL in times else 0.0
    return LatencyTable(target, rest, units, operations, max(0.0, before))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA at all
        reason = str(error).splitlines()[0]
        raise UserError(f"latency: the device {name!r} is not there ({reason})") from None
    return device


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
