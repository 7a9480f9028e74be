"""The table of primitives, read from `csrc/primitives.def`.

The C++ and CUDA interpreters include that file, the Triton generator pastes its formulas, and this
module gives it to Python; so an activation is one line there and no backend can drift from another.

Every line owns four consecutive opcodes, in this order (the interpreter's enumeration is built the
same way): `name.t` the auxiliary value, `name` the result, `name.da` and `name.db` the gradients.
Each takes up to three operands; which ones, `OPERANDS` says.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SLOTS = ("t", "", "da", "db")

OPERANDS = {
    "BINARY": {"": "ab", "da": "gab", "db": "gab"},
    "UNARY": {"": "a", "da": "gay"},
    "GATED": {"t": "a", "": "at", "da": "gat"},
}

_LINE = re.compile(r"^(BINARY|UNARY|GATED)\((.*)\)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Primitive:
    """One line of the table.

    Attributes:
        name: as written in expressions.
        kind: "BINARY", "UNARY" or "GATED".
        code: opcode of the first slot; slot i has opcode `code + i`.
        formulas: text of each slot's formula, by slot ("t", "", "da", "db"); absent slots are
        absent.
    """

    name: str
    kind: str
    code: int
    formulas: dict[str, str]

    @property
    def arity(self) -> int:
        return 2 if self.kind == "BINARY" else 1

    def operands(self, slot: str) -> str:
        """The operand letters that the slot's formula takes, in the order of the instruction."""
        return OPERANDS[self.kind][slot]

    def reads(self, slot: str) -> frozenset[str]:
        """The operand letters that the formula mentions: the others need not be kept alive."""
        return frozenset(re.findall(r"\b[gabty]\b", self.formulas[slot]))


@dataclass(frozen=True)
class Opcode:
    """One slot of one primitive: what an `Instruction` names."""

    primitive: Primitive
    slot: str

    @property
    def number(self) -> int:
        return self.primitive.code + SLOTS.index(self.slot)

    @property
    def formula(self) -> str:
        return self.primitive.formulas[self.slot]

    @property
    def operands(self) -> str:
        return self.primitive.operands(self.slot)


def table_path() -> Path:
    """Where `primitives.def` lies: inside an installed package, or in the source tree beside it."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "primitives.def").is_file():
            return folder / "primitives.def"
    raise FileNotFoundError(
        "fastffn is installed without its table csrc/primitives.def: install it again"
    )


def _split(arguments: str) -> list[str]:
    """Splits at the commas that stand outside parentheses."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(arguments):
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append(arguments[start:index].strip())
            start = index + 1
    return [*parts, arguments[start:].strip()]


@cache
def primitives() -> dict[str, Primitive]:
    """All primitives by name, in the order of the table."""
    table = {}
    for match in _LINE.finditer(table_path().read_text(encoding="utf-8")):
        kind, (name, *formulas) = match[1], _split(match[2])
        slots = [slot for slot in SLOTS if slot in OPERANDS[kind]]
        if len(slots) != len(formulas):
            raise ValueError(
                f"primitives.def: {name} has {len(formulas)} formulas, not {len(slots)}"
            )
        formula_of = dict(zip(slots, formulas, strict=True))
        table[name] = Primitive(name, kind, len(SLOTS) * len(table), formula_of)
    return table


@cache
def opcode(name: str) -> Opcode:
    """The opcode that an instruction names: "gelu", "gelu.t", "max.db"."""
    primitive, _, slot = name.partition(".")
    return Opcode(primitives()[primitive], slot)


PRIMITIVES = primitives()
