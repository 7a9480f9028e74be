"""Genes by name or from a file, wherever a recipe takes a list of them.

student.efficientbert.genes=runs/search/genes.yaml     what a search wrote
student.efficientbert.genes=NAME                       `fastffn.expr.found_genes`
"""

from pathlib import Path

from fastffn.distill import recipe_yaml
from fastffn.errors import UserError
from fastffn.expr import found_genes
from fastffn.expr.found import FoundGenes

_ENDINGS = (".yaml", ".yml", ".json")  # JSON is YAML


def read_found(path: str | Path) -> FoundGenes:
    """The genes of a search's genes.yaml, with their conditions.

    Raises:
        UserError: no such file, no YAML, or not of this kind; one line that names the file.
    """
    try:
        values, _ = recipe_yaml.parse_file(Path(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return FoundGenes.from_mapping(values, str(path))


def gene_texts(value: object, base: int) -> object:
    """The texts behind the name or the file of found genes; anything else as it is.

    Args:
        base: of the model: width of an FFN over the hidden size before a gene's ratio.

    Raises:
        UserError: as `read_found`, or genes that were found with another base.
    """
    if not isinstance(value, str):
        return value
    found = found_genes().get(value)
    if found is None:
        if not value.endswith(_ENDINGS):
            return value
        found = read_found(value)
    if found.base != base:
        raise UserError(
            f"genes {value}: found with base {found.base}, and the model has {base}: ffn_base must "
            "be the same"
        )
    return found.texts
