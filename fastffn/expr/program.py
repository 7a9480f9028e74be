"""Programs: what the executors run. Lowering, differentiation and register allocation.

A `Program` is a straight list of instructions over registers. The inputs are the first registers;
every instruction names an opcode (a slot of a primitive, see `primitives`), a destination and
three sources. `forward_program` lowers an expression; `backward_program` is its reverse-mode
derivative, written in the same instructions, so no executor knows calculus. Both share equal
subexpressions, and the backward recomputes what it needs from the inputs: only those are kept
between the passes.

Why a list and not the tree: an interpreter walks it without recursion and a generator prints it
line by line; why three sources: a gradient needs the upstream gradient and up to two values of the
forward.
"""

import struct
from collections import Counter
from dataclasses import dataclass, replace

from .primitives import opcode, primitives
from .tree import Expr

_FACTORS = {"mul": (0, 1), "mul.da": (0, 2), "mul.db": (0, 1)}  # the sources that it multiplies
GRADIENT = "grad"  # name of the upstream gradient, the first input of every backward program


@dataclass(frozen=True)
class Instruction:
    """register[target] = op(register[sources[0]], ...); an unread source repeats another."""

    op: str
    target: int
    sources: tuple[int, int, int]


@dataclass(frozen=True)
class Program:
    """Instructions over `registers` registers, of which the first `len(inputs)` hold the inputs.

    As built, every instruction has a register of its own (single assignment); `allocated` reuses
    them. An output may be an input's register, and two outputs may share one.
    """

    inputs: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[int, ...]
    registers: int

    def fused(self) -> "Program":
        """The same program with fewer instructions, for an interpreter: each one walks a block.

        An auxiliary value that only the result reads disappears into it (`gelu.ty`), and a product
        that only a sum reads into that (`mul_add`). Generated code needs none of this: there the
        compiler sees all instructions at once.
        """
        defined = {instruction.target: instruction for instruction in self.instructions}
        uses = Counter(self.outputs)
        for instruction in self.instructions:
            uses.update(set(instruction.sources))
        gone: set[int] = set()

        def absorbed(register: int, ops: tuple[str, ...]) -> Instruction | None:
            """The instruction behind `register`, if one of `ops` and if nobody else reads it."""
            instruction = defined.get(register)
            if instruction is None or instruction.op not in ops or uses[register] > 1:
                return None
            gone.add(register)
            return instruction

        instructions = []
        for at in self.instructions:
            a, t, _ = at.sources
            if absorbed(t, (f"{at.op}.t",)):
                at = Instruction(f"{at.op}.ty", at.target, (a, a, a))
            elif at.op == "add" and a != t:
                for term, other in ((a, t), (t, a)):
                    if product := absorbed(term, tuple(_FACTORS)):
                        one, two = (product.sources[i] for i in _FACTORS[product.op])
                        at = Instruction("mul_add", at.target, (one, two, other))
                        break
            instructions.append(at)
        kept = tuple(instruction for instruction in instructions if instruction.target not in gone)
        return replace(self, instructions=kept)

    def allocated(self) -> "Program":
        """The same program with registers reused as soon as their value is dead.

        Input registers are never written, and those of outputs by one instruction only: an executor
        may let them stand for the caller's memory.
        """
        last = {}
        for index, instruction in enumerate(self.instructions):
            for source in instruction.sources:
                last[source] = index
        last.update(dict.fromkeys(self.outputs, len(self.instructions)))

        place = {register: register for register in range(len(self.inputs))}
        free: list[int] = []
        count = len(self.inputs)
        instructions = []
        for index, instruction in enumerate(self.instructions):
            sources = tuple(place[source] for source in instruction.sources)
            for source in dict.fromkeys(instruction.sources):
                if last[source] == index and place[source] >= len(self.inputs):
                    free.append(place[source])
            if free and instruction.target not in self.outputs:
                target = free.pop()
            else:
                target, count = count, count + 1
            place[instruction.target] = target
            instructions.append(replace(instruction, target=target, sources=sources))
        outputs = tuple(place[output] for output in self.outputs)
        return Program(self.inputs, tuple(instructions), outputs, count)

    def packed(self) -> bytes:
        """The fused and allocated program as csrc/program.h reads it: 16-bit little-endian numbers.

        Header: inputs, outputs, registers, instructions. Then opcode, target and three sources of
        each instruction, then the register of each output.
        """
        program = self.fused().allocated()
        numbers = [
            len(program.inputs),
            len(program.outputs),
            program.registers,
            len(program.instructions),
        ]
        for instruction in program.instructions:
            numbers += [opcode(instruction.op).number, instruction.target, *instruction.sources]
        numbers += program.outputs
        return struct.pack(f"<{len(numbers)}H", *numbers)


class _Builder:
    """Emits each instruction once: asking again for the same operation gives the same register."""

    def __init__(self, inputs: tuple[str, ...]):
        self.inputs = inputs
        self.instructions: list[Instruction] = []
        self.register_of: dict[object, int] = {name: i for i, name in enumerate(inputs)}

    def emit(self, op: str, *sources: int) -> int:
        padded = (*sources, *(sources[0],) * (3 - len(sources)))
        key = (op, padded)
        if key not in self.register_of:
            target = len(self.inputs) + len(self.instructions)
            self.register_of[key] = target
            self.instructions.append(Instruction(op, target, padded))
        return self.register_of[key]

    def value(self, expr: Expr) -> int:
        """Register with the value of `expr`, computed if it is not there yet."""
        if expr.is_leaf:
            return self.register_of[expr.name]
        args = [self.value(arg) for arg in expr.args]
        if primitives()[expr.op].kind == "GATED":
            args.append(self.emit(f"{expr.op}.t", *args))
        return self.emit(expr.op, *args)

    def gradient(self, expr: Expr, slot: str, upstream: int) -> int:
        """Register with the gradient of operand `slot` ("da" or "db") of `expr`."""
        primitive = primitives()[expr.op]
        if primitive.formulas[slot] == "g":
            return upstream
        reads = primitive.reads(slot)
        sources = [
            self.operand(expr, letter, upstream) if letter in reads else upstream
            for letter in primitive.operands(slot)
        ]
        return self.emit(f"{expr.op}.{slot}", *sources)

    def operand(self, expr: Expr, letter: str, upstream: int) -> int:
        if letter == "g":
            return upstream
        if letter == "y":
            return self.value(expr)
        if letter == "t":
            return self.emit(f"{expr.op}.t", self.value(expr.args[0]))
        return self.value(expr.args["ab".index(letter)])

    def program(self, outputs: list[int]) -> Program:
        registers = len(self.inputs) + len(self.instructions)
        return Program(self.inputs, tuple(self.instructions), tuple(outputs), registers)


def forward_program(expr: Expr, inputs: tuple[str, ...] | None = None) -> Program:
    """Lowers `expr` to a Program of one output; `inputs` if not in order of first appearance."""
    builder = _Builder(expr.inputs if inputs is None else inputs)
    return builder.program([builder.value(expr)])


def backward_program(
    expr: Expr,
    wanted: tuple[str, ...] | None = None,
    added_to: tuple[str, ...] = (),
    inputs: tuple[str, ...] | None = None,
    value: bool = False,
) -> Program:
    """The gradients of `expr` with respect to the inputs `wanted` (all of them by default).

    Inputs: the upstream gradient, then the inputs of `expr` (`inputs`, if given), then one per name
    of `added_to`: what the gradient of that wanted input is added to. Outputs: one gradient per
    wanted input, then the value of `expr` if `value`.
    """
    inputs = expr.inputs if inputs is None else inputs
    wanted = inputs if wanted is None else wanted
    others = tuple(f"{GRADIENT}_{name}" for name in added_to)
    builder = _Builder((GRADIENT, *inputs, *others))
    adjoint = {expr: builder.register_of[GRADIENT]}
    for node in reversed(list(dict.fromkeys(expr.walk()))):  # operations before their operands
        if node.is_leaf or not set(node.inputs) & set(wanted):
            continue
        for slot, arg in zip(("da", "db"), node.args, strict=False):
            if not set(arg.inputs) & set(wanted):
                continue
            contribution = builder.gradient(node, slot, adjoint[node])
            adjoint[arg] = (
                builder.emit("add", adjoint[arg], contribution) if arg in adjoint else contribution
            )
    outputs = {name: adjoint[Expr.leaf(name)] for name in wanted}
    for name, other in zip(added_to, others, strict=True):
        outputs[name] = builder.emit("add", builder.register_of[other], outputs[name])
    values = [builder.value(expr)] if value else []
    return builder.program([outputs[name] for name in wanted] + values)
