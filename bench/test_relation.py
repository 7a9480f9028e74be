"""Relations of queries, keys and values: fastffn, the formula in torch, torch.compile; its memory.

Forward and backward. The formula keeps maps of length x length for each relation head, so it ends
where memory does; beyond, fastffn runs alone and its row says what the formula would take. What
each takes at its highest is noted beside the times.

On a GPU the kernels of LinearARD are a rival where FASTFFN_LINEARARD names a checkout of
github.com/gracefulning/LinearARD: they are called as they are, on the contiguous [batch, heads,
length, head width] that they ask for, and know no mean over tokens of ragged batches.
"""

import functools
import importlib
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastffn.functional import relation_loss, split_relation_heads

from .harness import check_outputs, compiled, floor_seconds, in_fresh_process, interleave, losses_of
from .memory import available_bytes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
STUDENT, TEACHER = 384, 768
SELF = ("qq", "kk", "vv")  # MiniLMv2
GENERAL = ("qk", "vv")  # MiniLM
# Bytes of the formula for each entry of a map, as measured: two numbers that each relation keeps,
# and what passes while the last one is made.
_BYTES = 8
_PASSING = 42


def make(batch, length, dtype, device):
    """Queries, keys and values of student and teacher."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            name: torch.randn(batch, length, width, generator=generator).to(device, dtype)
            for name in "qkv"
        }
        for width in (STUDENT, TEACHER)
    ]


def lengths_of(batch, length, ragged, device):
    """Real tokens of each example: all, or evenly spread with half of them as the mean."""
    if not ragged:
        return torch.full((batch,), length, device=device)
    return ((torch.arange(batch, device=device) + 0.5) * length / batch).ceil().long()


def formula(relations, teacher, real, heads):
    """What the papers write, in torch: maps of all heads at once, softmaxes in float32."""

    def log_relation(a, b):
        a, b = split_relation_heads(a, heads), split_relation_heads(b, heads)
        scores = (a @ b.mT / a.shape[-1] ** 0.5).to(torch.promote_types(a.dtype, torch.float32))
        if real is not None:
            scores = scores.masked_fill(~real[:, None, None, :], torch.finfo(scores.dtype).min)
        return scores.log_softmax(-1)

    def loss(**student):
        total = 0.0
        for a, b in relations:
            ours = log_relation(student[a], student[b])
            theirs = log_relation(teacher[a], teacher[b])
            rows = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean(1)
            if real is None:
                total = total + rows.mean()
            else:
                total = total + ((rows * real).sum(-1) / real.sum(-1).clamp(min=1)).mean()
        return total

    return loss


def fused(relations, teacher, real, heads):
    def loss(**student):
        pairs = [(student[a], student[b], teacher[a], teacher[b]) for a, b in relations]
        return relation_loss(pairs, num_heads=heads, attention_mask=real)

    return loss


@functools.cache
def linearard():
    """The rival's loss function, or the reason why it does not take part."""
    folder = os.environ.get("FASTFFN_LINEARARD")
    if not folder:
        return "FASTFFN_LINEARARD names no checkout of it"
    package = types.ModuleType("linearard")  # its own top level is named `kernels`, as others are
    package.__path__ = [str(Path(folder) / "kernels" / "attention_KL")]
    sys.modules["linearard"] = package
    try:
        return importlib.import_module("linearard.integration").attn_kl_align
    except Exception as error:
        return f"{folder} does not load: {type(error).__name__}: {error}"


def linearard_loss(relations, teacher, heads):
    def split(x):
        return split_relation_heads(x, heads).contiguous()

    def loss(**student):
        total = 0.0
        for a, b in relations:
            ours, theirs = (
                (split(x[a]), split(x[b]) if a != b else None) for x in (student, teacher)
            )
            ours, theirs = ((x, x if y is None else y) for x, y in (ours, theirs))
            total = total + linearard()(*ours, *theirs, attn_mask=None, causal=False)
        batch, length, _ = student["q"].shape
        return total / (batch * heads * length)

    return loss


def why_not_linearard(device, dtype, heads, ragged):
    """The reason why the rival has no part in a case, or None."""
    widths = {STUDENT // heads, TEACHER // heads}
    if device != "cuda":
        return "it runs on GPUs"
    if dtype == torch.float32:
        return "it takes bf16 and fp16"
    if not widths <= {8, 16, 32, 64, 128, 256}:
        return f"it does not take heads of {sorted(widths)}"
    if ragged:
        return "it has no mean over the tokens of each example"
    return linearard() if isinstance(linearard(), str) else None


def exact(relations, student, teacher, real, heads, compared):
    """Loss and gradients of the formula in float64, head by head, for lack of memory.

    compared: heads whose gradients are made; the loss too where it is all of them.
    """
    total, gradients = 0.0, {name: [] for name in student}
    for head in compared:
        ours, theirs = (
            {
                name: split_relation_heads(x.detach(), heads)[:, head].double()
                for name, x in model.items()
            }
            for model in (student, teacher)
        )
        leaves = {name: x.requires_grad_() for name, x in ours.items()}
        loss = 0.0
        for relation in relations:
            part = formula((relation,), theirs, real, 1)(**leaves) / heads
            part.backward()
            loss += part.item()
        total += loss
        for name in student:
            gradients[name].append(leaves[name].grad)
    stacked = [torch.cat(gradients[name], -1) for name in student]
    if len(compared) < heads:
        return stacked
    return [torch.tensor(total, dtype=torch.float64, device=real.device), *stacked]


def of_heads(work, heads, compared):
    """The same outputs of a contender as `exact` makes."""

    def outputs():
        loss, *gradients = work()
        if len(compared) == heads:
            return loss, *gradients
        split = [split_relation_heads(g, heads)[:, compared] for g in gradients]
        return [x.transpose(1, 2).flatten(2) for x in split]

    return outputs


def floors(relations, lengths, heads, dtype):
    """Seconds of the exponentials alone and of the products alone, on a GPU.

    An entry of a map costs four exponentials, of both models, forward and backward. Its products
    are two forward, and backward two of the teacher's and student's scores again and one (general:
    two) for the gradient. A self relation is symmetric, but nobody uses that forward.
    """
    from . import exponentials

    entries = (lengths.double() ** 2).sum().item()
    products = sum(
        2 * (TEACHER + STUDENT) + (TEACHER + 2 * STUDENT if a == b else TEACHER + 3 * STUDENT) * 2
        for a, b in relations
    )
    return {
        "exponentials": 4 * entries * heads * len(relations) / exponentials.rate(),
        "products": floor_seconds("cuda", dtype, flops=entries * products),
    }


def run(benchmark, relations, batch, length, heads, dtype, device, ragged=False, check=None,
        seconds=3.0, least=5, keep_memory=True):  # fmt: skip
    """One case, whose group names it."""
    torch._dynamo.reset()
    student, teacher = make(batch, length, dtype, device)
    leaves = {name: x.requires_grad_() for name, x in student.items() if name in "".join(relations)}
    lengths = lengths_of(batch, length, ragged, device)
    real = torch.arange(length, device=device) < lengths[:, None]
    mask = real if ragged else None
    functions = {"fastffn": fused(relations, teacher, mask, heads)}
    left_out = {}
    maps = batch * heads * length**2
    needed, there = maps * (_BYTES * len(relations) + _PASSING), available_bytes(device)
    if needed < 0.7 * there:
        plain = formula(relations, teacher, mask, heads)
        functions |= {"eager": plain, **compiled(plain, device)}
    else:
        reason = f"which takes {needed / 2**30:.0f} GiB where {there / 2**30:.0f} are free"
        left_out = {"eager": reason, "torch.compile": "as eager"}
    if reason := why_not_linearard(device, dtype, heads, ragged):
        left_out |= {"LinearARD": reason} if device == "cuda" else {}
    else:
        functions["LinearARD"] = linearard_loss(relations, teacher, heads)
    names = list(leaves)
    by_place = {
        name: lambda *x, function=function: function(**dict(zip(names, x, strict=True)))
        for name, function in functions.items()
    }
    works = losses_of(by_place, list(leaves.values()))

    compared = list(range(heads)) if check is None else check
    truth = functools.cache(lambda: exact(relations, leaves, teacher, real, heads, compared))
    checked = {name: of_heads(work, heads, compared) for name, work in works.items()}
    if "eager" not in works:  # of the compared heads alone the formula has room
        checked["eager"] = few_heads(relations, leaves, teacher, mask, heads, compared)
    rival = checked.pop("LinearARD", None)
    first = check_outputs(checked, truth)
    first.pop("eager" if "eager" not in works else "", None)
    if rival is not None:
        try:
            first |= check_outputs({"eager": checked["eager"], "LinearARD": rival}, truth)
        except Exception as error:  # whatever it is, it is the rival's, and no reason to stop
            works.pop("LinearARD")
            left_out["LinearARD"] = str(error).splitlines()[0]
    floor = floors(relations, lengths, heads, dtype) if device == "cuda" else 0.0
    what = "ragged" if ragged else "dense"
    size = f"({batch}, {length}), {heads} heads"
    benchmark.group = f"relation {'+'.join(relations)}, {size}, {what}, {dtype}, {device}"
    benchmark.group += "" if keep_memory or device == "cuda" else ", default allocator"
    interleave(benchmark, works, "fastffn", seconds, floor, first, least, keep_memory)
    benchmark.extra_info["left_out"] = left_out


def few_heads(relations, student, teacher, real, heads, compared):
    """The formula in the tensors' precision over some heads: their gradients in the whole loss."""

    def part(x):
        return split_relation_heads(x.detach(), heads)[:, compared].transpose(1, 2).flatten(2)

    def outputs():
        leaves = {name: part(x).requires_grad_() for name, x in student.items()}
        theirs = {name: part(x) for name, x in teacher.items()}
        gradients = {name: 0.0 for name in leaves}
        for relation in relations:
            loss = formula((relation,), theirs, real, len(compared))(**leaves)
            loss = loss * (len(compared) / heads)
            used = sorted(set(relation))
            found = torch.autograd.grad(loss, [leaves[name] for name in used])
            for name, gradient in zip(used, found, strict=True):
                gradients[name] = gradients[name] + gradient
        return list(gradients.values())

    return outputs


CASES = [(8, 128, "cpu"), (4, 512, "cpu"), (64, 128, "cuda"), (64, 512, "cuda")]
CASES = [pytest.param(*c, marks=[pytest.mark.gpu] if c[2] == "cuda" else []) for c in CASES]


@DTYPES
@pytest.mark.parametrize("batch, length, device", CASES)
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_self_relations(benchmark, ragged, batch, length, device, dtype):
    run(benchmark, SELF, batch, length, 48, dtype, device, ragged)


@pytest.mark.parametrize("batch, length", [(8, 128), (4, 512)])
@pytest.mark.parametrize("relations", [SELF, GENERAL, ("qk",)], ids="+".join)
def test_default_allocator(benchmark, relations, batch, length):
    """As a CPU process of default settings has it: the maps are mapped afresh for each use."""
    case = (relations, batch, length, 48, torch.float32, "cpu", False, None, 3.0, 5, False)
    in_fresh_process(benchmark, run, *case)


@DTYPES
@pytest.mark.parametrize("batch, length, device", CASES)
@pytest.mark.parametrize("relations", [GENERAL, ("qk",)], ids="+".join)
def test_general_relations(benchmark, relations, batch, length, device, dtype):
    run(benchmark, relations, batch, length, 48, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [128, 512, 2048, 8192])
def test_lengths(benchmark, length, device):
    """What memory and time do as sequences grow; the first and the last head are compared."""
    batch, heads, dtype = (4, 64, torch.bfloat16) if device == "cuda" else (1, 48, torch.float32)
    heads_compared = [0, heads - 1]
    case = (SELF, batch, length, heads, dtype, device, False, heads_compared, 2.0, 3, False)
    in_fresh_process(benchmark, run, *case)
