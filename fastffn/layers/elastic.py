"""`ElasticFFN`: one set of weights that serves every gene up to a stack and a width.

A gene of n units and I columns uses the first n units and, in each, the leading I intermediate
columns: up.weight[:I], down.weight[:, :I] (the weight sharing of EfficientBERT's supernet, arXiv
2109.07222, and of once-for-all networks, arXiv 1908.09791). Slices are views, so changing the
gene costs nothing and every gene trains the same memory.

A narrow gene's gradient is added to the leading slice of the weight's `grad` without filling up
zeros (ops/slices.py), once a full one is there; the unused slice has zeros, and an unused unit
no gradient at all (`grad` stays None). An optimiser with weight decay or momentum still moves
the former: use weight_decay=0 on elastic weights if that matters.

Why leading slices and not masks: a mask costs the full products. Why not copies per gene: they
would have to be written back after each step.

torch.compile takes a forward whole, once for each gene: a text is known by its letters, a `Gene` by
its identity, so pass the same object again, and its limit on recompilations
(torch._dynamo.config.recompile_limit, 8) is the limit on genes. A search runs eagerly instead.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..expr import Gene
from ..ops import backend
from ..ops.elementwise import constant_result
from .ffn import FFN, FFNUnit, UnitPlan, as_gene, check_arguments, check_input, check_positive


@dataclass(frozen=True)
class SupernetSize:
    """The largest gene that elastic weights can run.

    Raises:
        UserError: a size is no positive integer.
    """

    hidden_size: int
    max_stack: int
    max_width: int
    gated: bool = False

    def __post_init__(self):
        check_positive("max_stack", self.max_stack)
        check_positive("max_width", self.max_width)

    def check_gene(self, gene: Gene) -> None:
        """Raises a UserError when weights of this size are too small for `gene`."""
        if gene.stack > self.max_stack:
            raise UserError(
                f"gene: {gene} stacks {gene.stack} units, the supernet holds {self.max_stack}; "
                "build it with a larger max_stack"
            )
        width = gene.width(self.hidden_size)
        if width > self.max_width:
            raise UserError(
                f"gene: {gene} is {width} wide, the supernet holds {self.max_width} columns; "
                "build it with a larger max_width"
            )
        if gene.gated and not self.gated:
            raise UserError(f"gene: {gene} is gated; build the supernet with gated=True")


@functools.lru_cache(maxsize=4096)
def _cached_plan(gene: Gene | str, size: SupernetSize) -> tuple[int, UnitPlan]:
    gene = as_gene(gene)
    size.check_gene(gene)
    return gene.stack, UnitPlan.of(gene, size.hidden_size)


@constant_result  # parsing and a gene's cached properties cannot be traced
def _planned(gene: Gene | str, size: SupernetSize) -> tuple[int, UnitPlan]:
    """The stack and the plan of a gene; a UserError when it does not fit the size."""
    return _cached_plan(gene if isinstance(gene, str) else as_gene(gene), size)


def _without_compilation(x: Tensor):
    """A supernet meets new genes all the time: on a GPU they are interpreted, not compiled."""
    traced = torch.compiler.is_compiling()
    return backend.interpreted() if x.is_cuda and not traced else contextlib.nullcontext()


class ElasticFFN(nn.Module):
    """FFN block whose gene is an argument of each call.

    Args:
        hidden_size: H.
        max_stack: the most units that a gene may have.
        max_width: the most intermediate columns that a gene may have.
        gated: also holds gate weights, so that gated genes can run.
        dropout, layer_norm_eps, recompute: as in `FFN`.

    Attributes:
        gene: used when `forward` gets none; set it with `set_gene`. None at first.

    Parameters have the names of `FFN`'s, with the largest shapes.
    """

    def __init__(
        self,
        hidden_size: int,
        max_stack: int,
        max_width: int,
        gated: bool = False,
        dropout: float = 0.1,
        layer_norm_eps: float = 1e-5,
        recompute: str = "none",
    ):
        super().__init__()
        check_arguments(hidden_size, dropout, layer_norm_eps, recompute)
        self.size = SupernetSize(hidden_size, max_stack, max_width, gated)
        self.hidden_size = hidden_size
        self.max_width = max_width
        self.gated = gated
        self.dropout = dropout
        self.layer_norm_eps = layer_norm_eps
        self.recompute = recompute
        self.gene: Gene | None = None
        self.plan: UnitPlan | None = None
        self.units = nn.ModuleList(
            FFNUnit(hidden_size, max_width, gated, layer_norm_eps) for _ in range(max_stack)
        )

    def check_gene(self, gene: Gene | str) -> Gene:
        """The parsed gene; a UserError when these weights are too small for it."""
        gene = as_gene(gene)
        self.size.check_gene(gene)
        return gene

    def set_gene(self, gene: Gene | str) -> None:
        """Makes `gene` the one that `forward(x)` runs. Raises a UserError if it does not fit."""
        gene = self.check_gene(gene)
        self.gene, self.plan = gene, UnitPlan.of(gene, self.hidden_size)

    def forward(self, x: Tensor, gene: Gene | str | None = None) -> Tensor:
        """x [..., H] -> [..., H] by `gene`, else by the current gene."""
        check_input(x, self.hidden_size)
        if gene is not None:
            stack, plan = _planned(gene, self.size)
        elif self.gene is not None:
            stack, plan = self.gene.stack, self.plan
        else:
            raise UserError("gene: none given and none set; pass one or call set_gene first")
        with _without_compilation(x):
            for unit in self.units[:stack]:
                x = unit(x, plan, self.dropout, self.recompute)
        return x

    def forward_many(self, x: Tensor, genes: Sequence[Gene | str]) -> list[Tensor]:
        """x [..., H] -> one output [..., H] per gene, as `forward` gives them one by one.

        Genes with the same prologue (most have none) share the first unit's first product, forward
        and backward: it is computed once at the largest width. In training each gene has a dropout
        mask of its own.
        """
        check_input(x, self.hidden_size)
        planned = [_planned(gene, self.size) for gene in genes]
        groups: dict[tuple, list[int]] = {}
        for k, (_, plan) in enumerate(planned):
            groups.setdefault((plan.prologue.text, plan.gated), []).append(k)
        outputs: list[Tensor | None] = [None] * len(planned)
        first = self.units[0]
        with _without_compilation(x):
            for (_, gated), members in groups.items():
                plans = [planned[k][1] for k in members]
                if first.is_fused(gated):
                    results = first.fused(x, plans, self.dropout, self.recompute)
                else:
                    results = [first(x, plan, self.dropout, self.recompute) for plan in plans]
                for k, y in zip(members, results, strict=True):
                    stack, plan = planned[k]
                    for unit in self.units[1:stack]:
                        y = unit(y, plan, self.dropout, self.recompute)
                    outputs[k] = y
        return outputs

    def extract(self, gene: Gene | str) -> FFN:
        """A stand-alone `FFN` with copies of the slices that `gene` uses; same outputs."""
        gene = self.check_gene(gene)
        weight = self.units[0].up.weight
        ffn = FFN(self.hidden_size, gene, self.dropout, self.layer_norm_eps, self.recompute)
        ffn.to(device=weight.device, dtype=weight.dtype).train(self.training)
        ffn.load_state_dict(leading_slices(self.state_dict(), ffn.state_dict()))
        return ffn

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, max_stack={len(self.units)}, "
            f"max_width={self.max_width}, gated={self.gated}, gene={str(self.gene)!r}"
        )


def leading_slices(weights: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """For each name of `target`, the leading part of `weights[name]` that has its shape (views).

    Elastic and extracted modules share their parameter names, so this is the whole extraction,
    for a block as for a model around it.
    """
    return {
        name: weights[name][tuple(slice(size) for size in tensor.shape)]
        for name, tensor in target.items()
    }
