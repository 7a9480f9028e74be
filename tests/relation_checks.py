"""What the relation kernels are checked for, on any device: `test_kernels_relation` calls these in
the interpreter's process and on a GPU. Every function raises AssertionError where a check fails.
"""

from unittest import mock

import torch
from oracle import assert_accurate
from residual_norm_checks import Guarded
from torch import Tensor

from fastffn import kernels
from fastffn.functional import relation_kl, score_mse
from fastffn.kernels import relation
from fastffn.ops import backend

DIVERGENCES = ("kl", "reverse_kl", "probability_mse", "score_mse")


def values(s: Tensor, t: Tensor, divergence: str) -> Tensor:
    """Values of the rows of [..., rows, keys] scores, by their definition."""
    if divergence == "score_mse":
        return (s - t).square().sum(-1)
    log_r, log_p = s.log_softmax(-1), t.log_softmax(-1)
    if divergence == "kl":
        return (log_p.exp() * (log_p - log_r)).sum(-1)
    if divergence == "reverse_kl":
        return (log_r.exp() * (log_r - log_p)).sum(-1)
    return (log_r.exp() - log_p.exp()).square().sum(-1)


def naive(operands, real, heads, scale, scale_t, divergence, weights, dtype) -> list[Tensor]:
    """rows, da and db (None for a self relation) in `dtype`, example by example."""
    a, b, ta, tb = (x if x is None else x.to(dtype) for x in operands)
    leaves = [x.clone().requires_grad_() for x in (a, b) if x is not None]
    a, b = leaves[0], leaves[-1]
    tb = ta if tb is None else tb
    batch, length = a.shape[:2]
    rows = torch.zeros(batch, heads, length, dtype=dtype)
    loss = sum(leaf.narrow(0, 0, 0).sum() for leaf in leaves)
    for example in range(batch):
        there = real[example].nonzero().squeeze(1)

        def split(x, example=example, there=there):
            return x[example, there].unflatten(-1, (heads, -1)).transpose(0, 1)

        s = split(a) @ split(b).mT * scale
        t = split(ta) @ split(tb).mT * scale_t
        if len(there):
            value = values(s, t, divergence)
            rows[example][:, there] = value.detach()
            loss = loss + (value * weights[example][:, there].to(dtype)).sum()
    gradients = torch.autograd.grad(loss, leaves)
    return [rows, gradients[0], gradients[1] if len(gradients) > 1 else None]


MASKS = {
    "all": lambda batch, length: torch.ones(batch, length, dtype=torch.bool),
    "right": lambda batch, length: torch.arange(length)[None] < _lengths(batch, length),
    "left": lambda batch, length: torch.arange(length).flip(0)[None] < _lengths(batch, length),
    "middle": lambda batch, length: (
        (torch.arange(length)[None] >= length // 3)
        & (torch.arange(length)[None] < length - 1 - torch.arange(batch)[:, None])
    ),
    "holes": lambda batch, length: (
        torch.rand(batch, length, generator=torch.Generator().manual_seed(5)) < 0.6
    ),
    "one": lambda batch, length: (torch.arange(length) == length // 2).repeat(batch, 1),
    "none": lambda batch, length: torch.zeros(batch, length, dtype=torch.bool),
}


def _lengths(batch: int, length: int) -> Tensor:
    """From none to all, [batch, 1]."""
    return torch.linspace(0, length, batch).round()[:, None]


def _tensor(shape, layout: str, dtype, size: float, generator) -> Tensor:
    """[batch, length, width] of normal numbers, with the strides that `layout` names."""
    batch, length, width = shape
    memory, view = {
        "contiguous": (shape, lambda x: x),
        "fused": ((batch, length, 3 * width), lambda x: x[..., width : 2 * width]),
        "pitched": ((batch, length + 2, width + 8), lambda x: x[:, 1:-1, :width]),
        "shifted": ((batch, length, width + 5), lambda x: x[..., 3 : 3 + width]),
        "stepped": ((batch, length, 2 * width), lambda x: x[..., ::2]),
        "length first": ((length, batch, width), lambda x: x.transpose(0, 1)),
        "width first": ((batch, width, length), lambda x: x.mT),
        "one example": ((1, length, width), lambda x: x.expand(batch, -1, -1)),
    }[layout]
    x = torch.randn(memory, generator=generator, dtype=torch.float64) * size
    return view(x.to(dtype))


def agrees(
    device: str,
    divergence: str,
    shape: tuple[int, int, int, int, int] = (2, 37, 2, 8, 16),
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    itself: bool = False,
    mask: str | None = "right",
    layout: str = "contiguous",
    teacher_layout: str = "contiguous",
    out_layout: str = "contiguous",
    weights: str = "contiguous",
    size: float = 1.0,
    poison: float = torch.nan,
    wanted: tuple[str, ...] = ("a", "b"),
):
    """Forward and backward keep the oracle rule.

    Args:
        shape: batch, length, heads, widths of a head of student and teacher.
        mask: one of MASKS, or None: `real` is None.
        size: of the numbers; scores grow with its square.
        poison: what padding holds.
        weights: "contiguous", or of stride 0: "one" (a single number), "rows" (one per token).
    """
    batch, length, heads, width, teacher_width = shape
    generator = torch.Generator().manual_seed(0)
    teacher_dtype = teacher_dtype or dtype

    def make(width, layout, dtype):
        return _tensor((batch, length, heads * width), layout, dtype, size, generator)

    a, b = (make(width, layout, dtype) for _ in range(2))
    ta, tb = (make(teacher_width, teacher_layout, teacher_dtype) for _ in range(2))
    operands = (a, None, ta, None) if itself else (a, b, ta, tb)
    real = None if mask is None else MASKS[mask](batch, length)
    everywhere = MASKS["all"](batch, length) if real is None else real
    # As small as those of a mean over many rows, where the gradient's type can hold that.
    size_of_weights = 1.0 if dtype == torch.float16 else 1e-6
    factor = size_of_weights * torch.randn(batch, heads, length, generator=generator)
    factor = {
        "contiguous": factor,
        "one": torch.full((1, 1, 1), 0.25),
        "rows": factor[:, :1],
    }[weights].expand(batch, heads, length)
    scales = (0.37, 0.29)
    arguments = (operands, everywhere, heads, *scales, divergence, factor)
    exact, usual = naive(*arguments, torch.float64), naive(*arguments, torch.float32)

    memory = Guarded(device)
    there = []
    for x in operands:
        copy = None if x is None else memory.copy(x)
        if copy is not None and layout != "one example" and teacher_layout != "one example":
            copy[~everywhere.to(device)] = poison
        there.append(copy)
    real_there = None if real is None else real.to(device)
    factor_there = factor.to(device) if weights == "contiguous" else memory.copy(factor)
    rows = memory.output(torch.empty(batch, heads, length))
    stats = memory.output(torch.empty(relation.stats_count(divergence), batch, heads, length))
    relation.forward(*there, real_there, heads, *scales, divergence, rows, stats)
    da, db = (
        memory.output(_tensor(x.shape, out_layout, dtype, 1.0, generator))
        if name in wanted and x is not None
        else None
        for name, x in zip("ab", operands[:2], strict=True)
    )
    relation.backward(*there, real_there, heads, *scales, divergence, stats, factor_there, da, db)
    again = torch.full_like(rows, torch.nan)
    relation.forward(*there, real_there, heads, *scales, divergence, again, None)
    assert torch.equal(rows, again)
    results = memory.results()
    what = f"{divergence}, mask {mask}"
    # Scores of hundreds have rounding errors of 1e-5, whatever is done with them afterwards.
    scores = size * size * max(width, teacher_width) ** 0.5 * 0.37
    assert_accurate(results[0], exact[0], usual[0], f"rows of {what}", 1e-6 * max(1, scores))
    assert not results[1].isnan().any()
    # Where a row has one key, or one with all the probability, G is what rounding of scores leaves.
    largest = max(size_of(x[everywhere]) for x in operands[:2] if x is not None)
    made_of = scales[0] * size_of(factor) * largest
    slack = (1e-6 if divergence == "kl" else 4e-6) * max(1, scores) * made_of
    found = iter(results[2:])
    for name, out, want, like in zip("ab", (da, db), exact[1:], usual[1:], strict=True):
        if out is None:
            continue
        got = next(found)
        if dtype != torch.float32:
            # As far off as rounding G, then the result, may leave it.
            like = want + (want.abs() + made_of / 2) * torch.finfo(dtype).eps
        assert_accurate(got, want, like, f"d{name} of {what}", slack)
        assert (got[~everywhere] == 0).all(), "the gradient at padding is not 0"
    assert (results[0].movedim(1, 2)[~everywhere] == 0).all()


def size_of(x: Tensor) -> float:
    return x.abs().amax().item() if x.numel() else 0.0


def keys_out_of_reach(device: str, divergence: str):
    """A query whose scores are all far below 0: beside them a key that is not there has score 0."""
    batch, length, heads, width = 1, 21, 1, 8
    generator = torch.Generator().manual_seed(1)
    b = torch.rand(batch, length, width, generator=generator) + 1
    operands = (-20 * b.flip(1), b, -19 * b.flip(1), b)
    real = torch.arange(length)[None] < 19
    weights = torch.ones(batch, heads, length)
    arguments = (operands, real, heads, 1.0, 1.0, divergence, weights)
    exact, usual = naive(*arguments, torch.float64), naive(*arguments, torch.float32)
    there = [x.to(device) for x in operands]
    rows = torch.empty(batch, heads, length, device=device)
    stats = rows.new_empty(relation.stats_count(divergence), batch, heads, length)
    da, db = (torch.empty_like(there[0]) for _ in range(2))
    relation.forward(*there, real.to(device), heads, 1.0, 1.0, divergence, rows, stats)
    relation.backward(
        *there, real.to(device), heads, 1.0, 1.0, divergence, stats, weights.to(device), da, db
    )
    for name, out, want, like in zip(
        ("rows", "da", "db"), (rows, da, db), exact, usual, strict=True
    ):
        assert_accurate(out.cpu(), want, like, f"{name} of {divergence}", 1e-3 * size_of(want))


def bad_values_show(device: str, divergence: str):
    """NaN in a real token is in the values and gradients of the rows that see it, and no other."""
    generator = torch.Generator().manual_seed(2)
    a, ta = (torch.randn(2, 20, 8, generator=generator) for _ in range(2))
    a[0, 3, 1] = torch.nan
    a, ta = a.to(device), ta.to(device)
    rows = torch.empty(2, 1, 20, device=device)
    stats = rows.new_empty(relation.stats_count(divergence), 2, 1, 20)
    da = torch.empty_like(a)
    relation.forward(a, None, ta, None, None, 1, 0.3, 0.3, divergence, rows, stats)
    relation.backward(
        a, None, ta, None, None, 1, 0.3, 0.3, divergence, stats, torch.ones_like(rows), da, None
    )
    assert rows[0].isnan().all() and not rows[1].isnan().any()
    assert da[0].isnan().all() and not da[1].isnan().any()


def far_tokens(device: str, path: str, divergence: str):
    """Offsets beyond 2^31 elements, between tokens of a tile; a file of holes is the memory."""
    stride, length = 2**30 + 4, 5
    storage = torch.UntypedStorage.from_file(path, True, (length * stride + 16) * 2)
    memory = torch.empty(0, dtype=torch.float16).set_(storage)
    a, da = (memory.as_strided((1, length, 8), (0, stride, 1), at) for at in (0, 8))
    a.copy_(torch.randn(a.shape, generator=torch.Generator().manual_seed(3)))
    near, ta = a.clone(), torch.ones(1, length, 4, dtype=torch.float16)
    results = []
    for x, dx in ((near, torch.empty_like(near)), (a, da)):
        rows = torch.empty(1, 2, length)
        stats = rows.new_empty(relation.stats_count(divergence), 1, 2, length)
        relation.forward(x, None, ta, None, None, 2, 0.3, 0.3, divergence, rows, stats)
        weights = torch.ones_like(rows)
        relation.backward(
            x, None, ta, None, None, 2, 0.3, 0.3, divergence, stats, weights, dx, None
        )
        results.append((rows, dx.clone()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def losses(device: str):
    """The op over these kernels: what it keeps, and hands on, for every kind of loss."""
    generator = torch.Generator().manual_seed(0)
    widths = (24, 24, 48, 48)
    tensors = [torch.randn(2, 19, width, generator=generator).to(device) for width in widths]
    mask = (torch.rand(2, 19, generator=generator) < 0.7).to(device)

    def results():
        found = []
        for reduction in ("mean", "none"):
            q, k, *teacher = (x.clone() for x in tensors)
            leaves = [q.requires_grad_(), k.requires_grad_()]
            pair = relation_kl(q, k, *teacher, 3, mask, 1.5, reduction=reduction).sum()
            itself = relation_kl(k, k, *teacher[:1] * 2, 3, mask, reduction=reduction).sum()
            scores = score_mse(q, k, *teacher, 3, mask, reduction=reduction).sum()
            for loss in (pair, itself, scores):
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
                found += [loss.detach(), *(g for g in gradients if g is not None)]
        with torch.no_grad():
            return [*found, relation_kl(*tensors, 3, mask)]

    with mock.patch.object(backend, "relation_engine", lambda tensors: "reference"):
        expected = results()
    with (
        mock.patch.object(backend, "relation_engine", lambda tensors: "triton"),
        mock.patch.object(backend, "triton", lambda: (kernels, "test")),
    ):
        actual = results()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
