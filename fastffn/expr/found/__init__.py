"""Genes that searches found, beside the published ones: one JSON file for each, with conditions.

    found_genes()["NAME"].genes

A file says by itself what was searched, by what score, under which budget, with which seed and
versions: a gene is good under its conditions and nothing is known about others. `fastffn search`
writes the same keys as YAML (genes.yaml in its run directory); `FoundGenes.to_json` makes a file
for this folder of them.

Why JSON here: the language needs neither torch nor yaml. Why not Python constants like the
published genes: a search's result is data, and is replaced by another search without an edit.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import UserError
from ..genes import Gene

_FOLDER = Path(__file__).parent
_KEYS = ("name", "hidden_size", "base", "genes")


@dataclass(frozen=True)
class FoundGenes:
    """The winner of a search.

    Attributes:
        name: of the search.
        hidden_size: H of the encoder that was searched.
        genes: one per layer.
        conditions: what else the search says: "quality" and "score", costs, budget, seed, versions
            and so on.

    Raises:
        UserError: no genes, or ones that this width cannot have.
    """

    name: str
    hidden_size: int
    genes: tuple[Gene, ...]
    conditions: Mapping[str, Any]

    def __post_init__(self):
        if not self.genes:
            raise UserError(f"found genes {self.name}: there are none")
        for gene in self.genes:
            gene.width(self.hidden_size)
        object.__setattr__(self, "conditions", MappingProxyType(dict(self.conditions)))

    @property
    def texts(self) -> list[str]:
        """The genes as recipes and configurations take them."""
        return [str(gene) for gene in self.genes]

    @property
    def base(self) -> int:
        """Of the genes: width of an FFN over H before the ratio."""
        return self.genes[0].base

    @staticmethod
    def from_mapping(values: Any, origin: str) -> "FoundGenes":
        """The genes that plain values describe; `origin` is what errors call them.

        Raises:
            UserError: a key is missing or of the wrong type, or a gene is wrong.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"{origin}: no mapping: expected keys such as genes and hidden_size")
        missing = [key for key in _KEYS if key not in values]
        if missing:
            raise UserError(f"{origin}: {missing[0]} is missing: is this a file of found genes?")
        texts, numbers = values["genes"], [values["hidden_size"], values["base"]]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{origin}: genes: expected a list of texts, one per layer")
        if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers):
            raise UserError(f"{origin}: hidden_size and base must be positive integers")
        hidden, base = numbers
        conditions = {key: value for key, value in values.items() if key not in _KEYS}
        genes = tuple(Gene.parse(text, base) for text in texts)
        return FoundGenes(str(values["name"]), hidden, genes, conditions)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, from which `from_mapping` makes equal genes."""
        head = {"name": self.name, "hidden_size": self.hidden_size, "base": self.base}
        return head | {"genes": self.texts} | dict(self.conditions)

    def to_json(self) -> str:
        """The text of a file for this folder."""
        return json.dumps(self.to_mapping(), ensure_ascii=False, indent=2) + "\n"


@cache
def found_genes() -> Mapping[str, FoundGenes]:
    """The genes that come with this package: name of the file -> genes."""
    return MappingProxyType(
        {path.stem: _read(path) for path in sorted(_FOLDER.glob("*.json"), key=lambda p: p.stem)}
    )


def _read(path: Path) -> FoundGenes:
    return FoundGenes.from_mapping(json.loads(path.read_text(encoding="utf-8")), path.name)
