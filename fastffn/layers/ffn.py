"""The feed-forward block of a searched encoder: `FFN`, and `FFNUnit`, of which it stacks n.

One unit, for h of shape [..., H] and I intermediate columns:

    x  = prologue(h)                    [..., H]   elementwise
    z1 = x @ up.weight.T + up.bias      [..., I]   matrix product (zg likewise, with `gate`)
    a  = middle(z1, zg, h[..., :I])     [..., I]   elementwise
    z2 = a @ down.weight.T + down.bias  [..., H]   matrix product
    y  = LayerNorm(h + Dropout(epilogue(z2, h)))

Every unit of a stack has its own weights and the same gene (EfficientBERT, arXiv 2109.07222).
A unit is one op (`fastffn.ops.ffn`) as long as its modules are plain: nn.Linear and nn.LayerNorm
without hooks. With forward hooks, adapters (LoRA), parametrisations or quantised replacements on
them it calls the modules one by one, so that those take effect, and only the elementwise parts are
fused. (They do not at less than full width, which only the elastic block has: there a unit
multiplies by leading slices of the weights. Hooks of all modules see the unit alone.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..expr import Expr, Gene
from ..functional import elementwise
from ..ops import backend
from ..ops import ffn as op

RECOMPUTE = op.RECOMPUTE


def as_gene(gene: Gene | str, base: int = 1) -> Gene:
    """`gene` itself, or the parsed text; anything else is a UserError."""
    if isinstance(gene, Gene):
        return gene
    if isinstance(gene, str):
        return Gene.parse(gene, base=base)
    raise UserError(f"gene: expected a Gene or its text, got {type(gene).__name__}")


def check_positive(name: str, value: object) -> None:
    """Raises a UserError that names the value unless it is an integer from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}: expected a positive integer, got {value!r}")


def check_arguments(hidden_size: int, dropout: float, layer_norm_eps: float, recompute: str):
    """Raises a UserError that names the first argument out of range."""
    check_positive("hidden_size", hidden_size)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"dropout: expected a probability from 0 to below 1, got {dropout!r}")
    if not isinstance(layer_norm_eps, int | float) or not layer_norm_eps > 0:
        raise UserError(f"layer_norm_eps: expected a positive number, got {layer_norm_eps!r}")
    if recompute not in RECOMPUTE:
        raise UserError(f"recompute: expected one of {', '.join(RECOMPUTE)}, got {recompute!r}")


def check_input(x: Tensor, hidden_size: int) -> None:
    """Raises a UserError unless x holds floating-point rows of the block's width."""
    if x.dim() == 0 or x.shape[-1] != hidden_size:
        raise UserError(f"x: expected [..., {hidden_size}], got {list(x.shape)}")
    if not x.is_floating_point():
        raise UserError(f"x: expected a floating-point tensor, got {x.dtype}; convert it first")


@dataclass(frozen=True)
class Segment:
    """An elementwise segment in the form that a forward needs: its text and its inputs' names.

    `text` is None for a bare input, which is handed on without an operation.
    """

    text: str | None
    names: tuple[str, ...]

    @staticmethod
    def of(expr: Expr) -> "Segment":
        return Segment(None if expr.is_leaf else str(expr), tuple(expr.inputs))


def run(segment: Segment, **tensors: Tensor | None) -> Tensor:
    """The segment's value; a function, since torch.compile cannot trace a constant's methods."""
    if segment.text is None:
        return tensors[segment.names[0]]
    return elementwise(segment.text, **{name: tensors[name] for name in segment.names})


@dataclass(frozen=True)
class UnitPlan:
    """What a unit needs to know of a gene at one hidden size.

    Derived once and not at each forward: it costs time there, and torch.compile cannot trace the
    cached properties of a gene.
    """

    text: str  # the function of a unit, as the op takes it
    width: int
    gated: bool
    prologue: Segment
    middle: Segment
    epilogue: Segment

    @staticmethod
    def of(gene: Gene, hidden_size: int) -> "UnitPlan":
        """Raises a UserError when the gene does not fit the hidden size."""
        parts = gene.segments
        segments = map(Segment.of, (parts.prologue, parts.middle, parts.epilogue))
        return UnitPlan(str(gene.expr), gene.width(hidden_size), gene.gated, *segments)


def is_plain(module: nn.Module | None, kind: type) -> bool:
    """Whether calling the module does what its class does and nothing else."""
    return module is None or (
        type(module) is kind
        and all(
            type(weight) is nn.Parameter
            for weight in module._parameters.values()
            if weight is not None
        )
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
    )


def _is_autocast(x: Tensor) -> bool:
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


class FFNUnit(nn.Module):
    """One unit of the stack: its weights, and its forward at any width up to theirs.

    Parameters: up.weight [I, H], up.bias [I], gate.* (gated only, like up), down.weight [H, I],
    down.bias [H], norm.weight [H], norm.bias [H].
    """

    def __init__(self, hidden_size: int, width: int, gated: bool, layer_norm_eps: float):
        super().__init__()
        # Kept here, since a replacement of `up` need not know them.
        self.hidden_size, self.width = hidden_size, width
        self.up = nn.Linear(hidden_size, width)
        self.gate = nn.Linear(hidden_size, width) if gated else None
        self.down = nn.Linear(width, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(
        self, h: Tensor, plan: UnitPlan, dropout: float = 0.0, recompute: str = "none"
    ) -> Tensor:
        """h [..., H] -> [..., H], with the leading `plan.width` intermediate columns.

        dropout is applied in training mode only; recompute as in `FFN`.
        """
        if self.is_fused(plan.gated) and not backend.is_portable():
            return self.fused(h, (plan,), dropout, recompute)[0]
        if recompute == "all" and torch.is_grad_enabled():
            return checkpoint(self.compute, h, plan, dropout, use_reentrant=False)
        return self.compute(h, plan, dropout, recompute)

    def is_fused(self, gated: bool) -> bool:
        """Whether the op may stand for the modules: they are plain, and fit together."""
        up, down, norm = self.up, self.down, self.norm
        return (
            is_plain(up, nn.Linear)
            and is_plain(down, nn.Linear)
            and is_plain(norm, nn.LayerNorm)
            and self._fits(up, self.width, self.hidden_size, up.weight.dtype)
            and self._fits(down, self.hidden_size, self.width, up.weight.dtype)
            and norm.normalized_shape == (self.hidden_size,)
            and all(
                vector is None or vector.shape == norm.normalized_shape
                for vector in (norm.weight, norm.bias)
            )
            and (not gated or self._gate_is_fused())
        )

    def _gate_is_fused(self) -> bool:
        gate, dtype = self.gate, self.up.weight.dtype
        return is_plain(gate, nn.Linear) and self._fits(gate, self.width, self.hidden_size, dtype)

    @staticmethod
    def _fits(layer: nn.Linear, outputs: int, inputs: int, dtype: torch.dtype) -> bool:
        weight, bias = layer.weight, layer.bias
        return (
            weight.shape == (outputs, inputs)
            and weight.dtype == dtype
            and (bias is None or (bias.shape == (outputs,) and bias.dtype == dtype))
        )

    def fused(
        self, h: Tensor, plans: Sequence[UnitPlan], dropout: float, recompute: str
    ) -> list[Tensor]:
        """One output per plan; all have the same prologue, and all are gated or none is."""
        up, down, norm = self.up, self.down, self.norm
        if h.dtype != up.weight.dtype and not _is_autocast(h):
            raise UserError(
                f"x: {h.dtype} goes into weights of {up.weight.dtype}; "
                "convert one of them or use torch.autocast"
            )
        gate = self.gate if plans[0].gated else None
        operands = [
            h,
            up.weight,
            up.bias,
            None if gate is None else gate.weight,
            None if gate is None else gate.bias,
            down.weight,
            down.bias,
            norm.weight,
            norm.bias,
            None,
        ]
        texts, widths = "\n".join(p.text for p in plans), tuple(p.width for p in plans)
        dropout = dropout if self.training else 0.0
        return op.run(operands, (texts, widths, dropout, norm.eps, recompute))

    def compute(self, h: Tensor, plan: UnitPlan, dropout: float, recompute: str = "none") -> Tensor:
        x = run(plan.prologue, x=h)
        z1 = self.expand(self.up, x, plan.width)
        zg = self.expand(self.gate, x, plan.width) if plan.gated else None
        if recompute == "activation" and torch.is_grad_enabled():
            z2 = checkpoint(self.contract, h, z1, zg, plan, use_reentrant=False)
        else:
            z2 = self.contract(h, z1, zg, plan)
        y = run(plan.epilogue, z2=z2, x=h)
        return self.norm(h + F.dropout(y, dropout, self.training))

    def expand(self, layer: nn.Module, x: Tensor, width: int) -> Tensor:
        """x [..., H] -> [..., width] by the leading rows of `up` or `gate`."""
        if width == self.width:
            return layer(x)
        return F.linear(x, layer.weight[:width], layer.bias[:width])

    def contract(self, h: Tensor, z1: Tensor, zg: Tensor | None, plan: UnitPlan) -> Tensor:
        """Middle segment and second product together: what `activation` recomputes.

        The product belongs inside, since it is what would keep the activation for its weight
        gradient; its own result is not computed again (recomputation stops at the last tensor
        that the backward needs).
        """
        a = run(plan.middle, z1=z1, zg=zg, x=h[..., : plan.width])
        if plan.width == self.width:
            return self.down(a)
        return F.linear(a, self.down.weight[:, : plan.width], self.down.bias)


class FFN(nn.Module):
    """Searched feed-forward block with residual and LayerNorm, stacked `gene.stack` times.

    Args:
        hidden_size: H, the last dimension of input and output.
        gene: a `Gene` or its text, e.g. "4x1/2 tanh(down(gelu(up(x))))" (text: base 1).
        dropout: probability on f(h) before the residual, in training mode.
        layer_norm_eps: of each unit's LayerNorm.
        recompute: what backward computes again instead of keeping: "none"; "activation", the
            elementwise parts (the products are kept); "all", the whole unit (only its input is
            kept). Gradients are the same for all three; `fastffn.ops.ffn` counts the bytes.

    Parameters: units.{k}.{up,gate,down,norm}.{weight,bias}, see `FFNUnit`.

    Raises:
        UserError: an argument is out of range, or the gene does not fit this hidden size.
        ExprError: the text of the gene is wrong.
    """

    def __init__(
        self,
        hidden_size: int,
        gene: Gene | str,
        dropout: float = 0.1,
        layer_norm_eps: float = 1e-5,
        recompute: str = "none",
    ):
        super().__init__()
        check_arguments(hidden_size, dropout, layer_norm_eps, recompute)
        self.gene = as_gene(gene)
        self.hidden_size = hidden_size
        self.plan = UnitPlan.of(self.gene, hidden_size)
        self.dropout = dropout
        self.recompute = recompute
        self.units = nn.ModuleList(
            FFNUnit(hidden_size, self.plan.width, self.plan.gated, layer_norm_eps)
            for _ in range(self.gene.stack)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H], any floating dtype -> [..., H]."""
        check_input(x, self.hidden_size)
        for unit in self.units:
            x = unit(x, self.plan, self.dropout, self.recompute)
        return x

    @property
    def width(self) -> int:
        """I, the intermediate columns of each unit."""
        return self.plan.width

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, gene={str(self.gene)!r}, dropout={self.dropout}"
