"""`ElasticFFN`: one set of weights that serves every gene up to a stack and a width.

A gene of n units and I columns uses the first n units and, in each, the leading I intermediate
columns: up.weight[:I], down.weight[:, :I] (the weight sharing of EfficientBERT's supernet, arXiv
2109.07222, and of once-for-all networks, arXiv 1908.09791). Slices are views, so changing the
gene costs nothing and every gene trains the same memory.

In the backward of a narrow gene the unused slice of a weight gets zero gradients and an unused
unit gets none at all (`grad` stays None). An optimiser with weight decay or momentum still moves
the former: use weight_decay=0 on elastic weights if that matters.

Why leading slices and not masks: a mask costs the full products. Why not copies per gene: they
would have to be written back after each step.
"""

from torch import Tensor, nn

from ..errors import UserError
from ..expr import Gene
from .ffn import FFN, FFNUnit, UnitPlan, as_gene, check_arguments, check_input


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
        for name, value in (("max_stack", max_stack), ("max_width", max_width)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: expected a positive integer, got {value!r}")
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
        if gene.stack > len(self.units):
            raise UserError(
                f"gene: {gene} stacks {gene.stack} units, the supernet holds {len(self.units)}; "
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
        return gene

    def set_gene(self, gene: Gene | str) -> None:
        """Makes `gene` the one that `forward(x)` runs. Raises a UserError if it does not fit."""
        gene = self.check_gene(gene)
        self.gene, self.plan = gene, UnitPlan.of(gene, self.hidden_size)

    def forward(self, x: Tensor, gene: Gene | str | None = None) -> Tensor:
        """x [..., H] -> [..., H] by `gene`, else by the current gene."""
        check_input(x, self.hidden_size)
        if gene is not None:
            gene = self.check_gene(gene)
            plan = UnitPlan.of(gene, self.hidden_size)
        elif self.gene is not None:
            gene, plan = self.gene, self.plan
        else:
            raise UserError("gene: none given and none set; pass one or call set_gene first")
        for unit in self.units[: gene.stack]:
            x = unit(x, plan, self.dropout, self.recompute)
        return x

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
