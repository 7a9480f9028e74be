"""The text of the matrix product with a Program for epilogue: what `linear` launches.

`linear` says what is fused and what the letters of a `Form` mean. The factors are called a, w0 and
w1, the biases b0 and b1, extras e2, e3, ... by their position among the Program's inputs (only live
ones appear), and outputs o0, o1, ...

Base pointers move by 64-bit scalars to the tile and along K; offsets inside a tile are 32-bit
unless strides ask for more (`INDEX`): tensors beyond 2^31 elements cost nothing.
"""

from dataclasses import dataclass

from ..expr import Program
from . import codegen


@dataclass(frozen=True)
class Form:
    """What selects the text of a kernel beside its Program.

    Attributes:
        a: layout of the left factor: "k" unit stride along K, "g" both strides general.
        weights: layout of each right factor: "k", "n" (unit stride along N) or "g".
        biases: for each weight "m" (unit stride), "g" or "-" (none).
        extras: for each live extra "m" (unit column stride) or "g".
        outputs: for each output "m" or "g".
        summed: positions of the outputs whose column sums are stored.
        tail: how the last step along K is masked, where K is no multiple of the step: "loop", all
            steps are masked alike; "after", it follows the loop, whose loads are then as wide as
            the pitch allows although K is odd; "none".
        even: the tiles cover N exactly.
        shifted: operands whose address is given as an aligned one and a distance from it.
        aliased: an output lies where an extra does.
        halvings: the epilogue takes the tile in 2^halvings parts, one after the other.
    """

    a: str
    weights: str
    biases: str
    extras: str
    outputs: str
    summed: tuple[int, ...]
    tail: str
    even: bool
    shifted: frozenset[str]
    aliased: bool
    halvings: int


_KERNEL = '''\
"""{title}"""

{preamble}

{function}

@triton.jit(do_not_specialize={numbers!r})
def {name}(
    {parameters},
    N: tl.constexpr, K: tl.constexpr, READABLE: tl.constexpr,
    VA: tl.constexpr, VW: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
):
    # GROUP tiles of rows times all tiles of columns follow each other: they share L2.
    row_tiles = (rows + ROWS - 1) // ROWS
    per_group = (N + COLUMNS - 1) // COLUMNS * GROUP
    tile = tl.program_id(0)
    first = tile // per_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    row_tile = first + tile % per_group % height
    row = row_tile.to(tl.int64) * ROWS
    column = (tile % per_group // height).to(tl.int64) * COLUMNS

    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    # Beyond the last row and column these repeat it: loads across them need no masks.
    i_in = tl.minimum(i, rows - 1 - row).to(INDEX)
    j_in = tl.minimum(j, N - 1 - column).to(INDEX)
    k_in = k.to(INDEX)
{start}
{product}
    i = i[:, None].to(INDEX)
    live_i = i < rows - row
{epilogue}
'''

_STRIDES = {"m": ["row"], "g": ["row", "column"]}
_FACTOR_STRIDES = {"k": ["across"], "n": ["along"], "g": ["across", "along"]}


def kernel_name(program: Program) -> str:
    """Name of the kernel in the generated module, as profilers show it."""
    return f"linear_{codegen.describe(program)}"


def _stride(name: str, letter: str, vector: str, kind: str) -> str:
    """A stride as the kernel reads it; those that decide the width of loads are passed divided."""
    return f"({name}.to({kind}) * {vector})" if letter != "g" else f"{name}.to({kind})"


def _shift(name: str, vector: str, form: Form) -> str:
    return f" + {name}_shift.to(tl.int64) * {vector}" if name in form.shifted else ""


def _factor(name: str, letter: str, form: Form) -> tuple[list[str], str, str, str]:
    """Lines that set the base and the offsets; the step along K; the pointer; the mask along N."""
    left = name == "a"
    vector, outer, origin = ("VA", "i_in", "row") if left else ("VW", "j_in", "column")
    mask = ""
    across = along = None
    if letter in "kg":
        across = _stride(f"{name}_across", letter, vector, "{0}")
    if letter in "ng":
        along = _stride(f"{name}_along", letter, vector, "{0}")
    if letter == "n":
        outer, mask = "j.to(INDEX)", "" if form.even else "j[None, :] < READABLE - column"
    outer, inner = (
        (f"{outer}[:, None]", "k_in[None, :]") if left else (f"{outer}[None, :]", "k_in[:, None]")
    )
    move = f"{name} += {origin}" + (f" * {across.format('tl.int64')}" if across else "")
    move += _shift(name, vector, form)
    offsets = outer + (f" * {across.format('INDEX')}" if across else "")
    offsets += " + " + inner + (f" * {along.format('INDEX')}" if along else "")
    step = f"{name} += DEPTH" + (f" * {along.format('tl.int64')}" if along else "")
    return [move, f"{name}_offsets = {offsets}"], step, f"{name} + {name}_offsets", mask


def _load(target: str, pointer: str, masks: list[str]) -> str:
    masks = [f"({mask})" if len(masks) > 1 else mask for mask in masks]
    suffix = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
    return f"{target} = tl.load({pointer}{suffix})"


def _product(form: Form) -> tuple[list[str], list[str]]:
    """Lines before the loop along K, and the loop with what follows it."""
    names = ["a", *(f"w{n}" for n in range(len(form.weights)))]
    factors = [
        _factor(name, letter, form)
        for name, letter in zip(names, form.a + form.weights, strict=True)
    ]
    start = [line for lines, *_ in factors for line in lines]
    start += [f"acc{n} = tl.zeros((ROWS, COLUMNS), tl.float32)" for n in range(len(form.weights))]

    def body(limit: str) -> list[str]:
        lines = []
        for name, (_, _, pointer, mask) in zip(names, factors, strict=True):
            inner = "k[None, :]" if name == "a" else "k[:, None]"
            masks = ([mask] if mask else []) + ([f"{inner} < {limit}"] if limit else [])
            lines.append(_load(f"{name}_tile", pointer, masks))
        for n in range(len(form.weights)):
            lines.append(f"acc{n} = tl.dot(a_tile, w{n}_tile, acc{n}, input_precision=PRECISION)")
        return lines

    steps = [step for _, step, _, _ in factors]
    if form.tail == "after":
        loop = ["for at in range(0, K // DEPTH * DEPTH, DEPTH):"]
        loop += [f"    {line}" for line in [*body(""), *steps]]
        loop += body("K % DEPTH")
    else:
        loop = ["for at in range(0, K, DEPTH):"]
        loop += [f"    {line}" for line in body("K - at" if form.tail == "loop" else "") + steps]
    for n, letter in enumerate(form.biases):
        if letter != "-":
            stride = f" * b{n}_column.to(tl.int64)" if letter == "g" else ""
            loop += [
                f"b{n} += column{stride}",
                f"bias{n} = tl.load(b{n} + tl.arange(0, COLUMNS){stride}, "
                "mask=tl.arange(0, COLUMNS) < N - column, other=0.0)",
                f"acc{n} += bias{n}.to(tl.float32)[None, :]",
            ]
    return start, loop


def _matrix(name: str, letter: str, form: Form) -> tuple[str, str]:
    """The line that moves the base of an [M, N] operand to the tile, and its pointers."""
    row = _stride(f"{name}_row", letter, "V", "{0}")
    column = "" if letter == "m" else f" * {name}_column.to({{0}})"
    move = f"{name} += row * {row.format('tl.int64')} + column{column.format('tl.int64')}"
    move += _shift(name, "V", form)
    return move, f"{name} + (i * {row.format('INDEX')} + j{column.format('INDEX')})"


def _halved(names: list[str], times: int) -> tuple[list[str], list[list[str]]]:
    """Lines that cut each [ROWS, n] tile into 2^times tiles, and the tiles' names, part by part."""
    lines, parts = [], [names]
    for at in range(1, times + 1):
        shape = f"(ROWS, 2, COLUMNS // {2**at})"
        halves = []
        for part in parts:
            low, high = ([f"{name}_{side}" for name in part] for side in "ab")
            halves += [low, high]
            lines += [
                f"{a}, {b} = tl.split(tl.permute(tl.reshape({name}, {shape}), (0, 2, 1)))"
                for name, a, b in zip(part, low, high, strict=True)
            ]
        parts = halves
    return lines, parts


def _epilogue(program: Program, form: Form) -> list[str]:
    products = len(form.weights)
    live = codegen.live_inputs(program)
    extras = [f"e{i}" for i in live if i >= products]
    outputs = [f"o{i}" for i in range(len(program.outputs))]
    letters = zip([*extras, *outputs], form.extras + form.outputs, strict=True)
    matrices = {name: _matrix(name, letter, form) for name, letter in letters}
    lines = [move for move, _ in matrices.values()]
    halvings, parts = _halved([f"acc{n}" for n in range(products)], form.halvings)
    lines += halvings
    for part, accumulators in enumerate(parts):
        lines += [
            f"j = tl.arange(0, COLUMNS // {len(parts)})[None, :].to(INDEX)"
            + (f" + {part} * (COLUMNS // {len(parts)})" if part else ""),
            "live_j = j < N - column",
            "live = live_i & live_j",
        ]
        lines += [
            f"{name}_tile = tl.load({matrices[name][1]}, mask=live, other=0.0).to(tl.float32)"
            for name in extras
        ]
        if form.aliased:
            # Another thread may write the element that this one reads.
            lines.append("tl.debug_barrier()")
        values = [accumulators[i] if i < products else f"e{i}_tile" for i in live]
        results = ", ".join(f"y{i}" for i in range(len(outputs)))
        lines.append(f"{results} = program({', '.join(values)})")
        lines += [
            f"tl.store({matrices[name][1]}, y{i}.to({name}.dtype.element_ty), mask=live)"
            for i, name in enumerate(outputs)
        ]
        for position, output in enumerate(form.summed):
            lines += [
                f"total{position} = tl.sum(tl.where(live, y{output}, 0.0), axis=0)[None, :]",
                f"place = (row_tile.to(tl.int64) * {len(form.summed)} + {position}) * N + column",
                f"tl.store(sums + place + j, total{position}, mask=live_j)",
            ]
    return lines


def parameters(program: Program, form: Form) -> tuple[list[str], list[str]]:
    """Names of the tensors, then of the strides and shifts, as the parameters are ordered."""
    extras = [f"e{i}" for i in codegen.live_inputs(program) if i >= len(form.weights)]
    tensors = ["a", *(f"w{n}" for n in range(len(form.weights)))]
    strides = [
        f"{name}_{which}"
        for name, letter in zip(tensors, form.a + form.weights, strict=True)
        for which in _FACTOR_STRIDES[letter]
    ]
    for n, letter in enumerate(form.biases):
        if letter != "-":
            tensors.append(f"b{n}")
            strides += [f"b{n}_column"] if letter == "g" else []
    matrices = [*extras, *(f"o{i}" for i in range(len(program.outputs)))]
    for name, letter in zip(matrices, form.extras + form.outputs, strict=True):
        tensors.append(name)
        strides += [f"{name}_{which}" for which in _STRIDES[letter]]
    strides += [f"{name}_shift" for name in tensors if name in form.shifted]
    return tensors + (["sums"] if form.summed else []), strides


def text(program: Program, form: Form) -> str:
    """Source of the kernel for `program` in this form."""
    tensors, strides = parameters(program, form)
    start, product = _product(form)
    numbers = [*strides, "rows"]

    def indent(lines: list[str]) -> str:
        return "\n".join("    " + line for line in lines)

    return _KERNEL.format(
        title=f"Product, then {codegen.describe(program)}.",
        preamble=codegen.PREAMBLE,
        function=codegen.function_text(program),
        name=kernel_name(program),
        numbers=numbers,
        parameters=", ".join([*tensors, *numbers]),
        start=indent(start),
        product=indent(product),
        epilogue=indent(_epilogue(program, form)),
    )
