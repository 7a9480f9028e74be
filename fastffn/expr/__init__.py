"""The language: primitives, expressions, programs, genes and what they cost. Free of torch."""

from .cost import Cost, gene_cost
from .genes import PLAIN, PUBLISHED, Gene, Segments
from .primitives import PRIMITIVES, Primitive
from .program import Instruction, Program, backward_program, forward_program
from .tree import Expr

__all__ = [
    "PLAIN",
    "PRIMITIVES",
    "PUBLISHED",
    "Cost",
    "Expr",
    "Gene",
    "Instruction",
    "Primitive",
    "Program",
    "Segments",
    "backward_program",
    "forward_program",
    "gene_cost",
]
