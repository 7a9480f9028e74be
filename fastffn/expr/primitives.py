"""The table of primitives, read from `csrc/primitives.def`.

The C++ interpreter includes that file, the Triton generator pastes its formulas, and this
module gives it to Python; so an activation is one line there and no backend can drift from another.

Every line owns four consecutive opcodes, in this order (the interpreter's enumeration is built the
same way): `name.t` the auxiliary value, `name` the result, `name.da` and `name.db` the gradients.
A GATED line has one operand and therefore no `db`; its fourth opcode is `name.ty`, the result
straight from the operand. Each takes up to three operands; which ones, `OPERANDS` says.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

OPERANDS = {
    "BINARY": {"": "ab", "da": "gab", "db": "gab"},
    "UNARY": {"": "a", "da": "gay"},
    "GATED": {"t": "a", "": "at", "da": "gat"},
    "FUSED": {"": "abc"},
}
COMMUTATIVE = frozenset({"add", "mul", "max"})
PLACES = {"t": 0, "": 1, "da": 2, "db": 3, "ty": 3}  # of the slots within a line's opcodes

_LINE = re.compile(r"^(BINARY|UNARY|GATED|FUSED)\((.*)\)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Primitive:
    """One line of the table.

    Attributes:
        name: as written in expressions.
        kind: "BINARY", "UNARY", "GATED" or "FUSED".
        code: the first of the line's opcodes.
        formulas: text of the formula of each slot that the table writes out.
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
        return self.primitive.code + PLACES[self.slot]

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
def _table() -> dict[str, Primitive]:
    """All lines by name, in the order of the table."""
    table = {}
    for match in _LINE.finditer(table_path().read_text(encoding="utf-8")):
        kind, (name, *formulas) = match[1], _split(match[2])
        slots = sorted(OPERANDS[kind], key=PLACES.get)
        if len(slots) != len(formulas):
            raise ValueError(
                f"primitives.def: {name} has {len(formulas)} formulas, not {len(slots)}"
            )
        table[name] = Primitive(name, kind, 4 * len(table), dict(zip(slots, formulas, strict=True)))
    return table


@cache
def primitives() -> dict[str, Primitive]:
    """The operations of the language by name, in the order of the table."""
    return {name: line for name, line in _table().items() if line.kind != "FUSED"}


@cache
def opcode(name: str) -> Opcode:
    """The opcode that an instruction names: "gelu", "gelu.t", "max.db", "mul_add"."""
    line, _, slot = name.partition(".")
    return Opcode(_table()[line], slot)


PRIMITIVES = primitives()
