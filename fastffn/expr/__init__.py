"""The language: primitives, expressions, programs, genes and what they cost. Free of torch."""

from .cost import Cost, gene_cost
from .found import FoundGenes, found_genes
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
    "FoundGenes",
    "Gene",
    "Instruction",
    "Primitive",
    "Program",
    "Segments",
    "backward_program",
    "forward_program",
    "found_genes",
    "gene_cost",
]
