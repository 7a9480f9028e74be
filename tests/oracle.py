"""What the tests of the ops share: random expressions, random layouts, and the oracle rule.

The rule (docs/design.md): no result may be less accurate than torch in the same dtype. Over all
elements, max |out - ref64| <= 2 max |torch_same_dtype - ref64| + 1e-6 max |ref64|.
"""

import torch
from hypothesis import strategies as st

from fastffn.expr import PRIMITIVES, Expr

UNARY = [name for name, primitive in PRIMITIVES.items() if primitive.arity == 1]
BINARY = [name for name, primitive in PRIMITIVES.items() if primitive.arity == 2]


def expressions(inputs=("a", "b", "c"), max_leaves=6) -> st.SearchStrategy[Expr]:
    """Random expressions over some of `inputs`."""

    def extend(children):
        unary = st.builds(lambda op, arg: Expr.call(op, arg), st.sampled_from(UNARY), children)
        binary = st.builds(
            lambda op, one, two: Expr.call(op, one, two),
            st.sampled_from(BINARY),
            children,
            children,
        )
        return unary | binary

    return st.recursive(
        st.builds(Expr.leaf, st.sampled_from(inputs)), extend, max_leaves=max_leaves
    )


def assert_accurate(out, exact, same_dtype, what="", floor=0.0):
    """The oracle rule, for finite results; `exact` in float64, `same_dtype` torch's own result.

    floor: allowed besides, for a result that cancels: of the size of 1e-6 of what it is made of.
    """
    assert out.shape == exact.shape, f"{what}: {out.shape} instead of {exact.shape}"
    if exact.numel() == 0:
        return
    error = (out.double() - exact).abs().max().item()
    bound = 2 * (same_dtype.double() - exact).abs().max().item() + 1e-6 * exact.abs().max().item()
    bound += floor
    assert error <= bound, f"{what}: error {error:.3g}, allowed {bound:.3g}"


LAYOUTS = ("dense", "transposed", "row stride", "column stride", "row vector", "column", "scalar")


def tensor(shape, dtype, layout, generator) -> torch.Tensor:
    """Normal numbers over two dimensions in one of LAYOUTS; the last three broadcast to `shape`."""
    rows, columns = shape
    x = torch.randn(rows, columns, 2, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "transposed":
        return x[..., 0].t().contiguous().t()
    if layout == "row stride":
        return torch.cat([x[..., 0], x[..., 1]], dim=1)[:, :columns]
    if layout == "column stride":
        return x[..., 0]
    if layout == "row vector":
        return x[:1, :, 0].reshape(-1) if rows else x.new_zeros(columns)
    if layout == "column":
        return x[:, :1, 0] if columns else x.new_zeros(rows, 1)
    if layout == "scalar":
        return torch.randn((), generator=generator, dtype=torch.float64).to(dtype)
    return x[..., 0].contiguous()
