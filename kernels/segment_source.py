"""The text of the elementwise kernels: what `segment` launches, generated per Program and layout.

`segment` says what the two forms are for and what the letters of a layout mean. Operands are called
i0, i1, ... by their position among the Program's inputs (only live ones appear) and o0, o1, ...;
values x0, ... and y0, ...

Base pointers move by 64-bit scalars to the block; offsets inside a block are 32-bit unless strides
ask for more (`INDEX`): tensors beyond 2^31 elements cost nothing.
"""

from ..expr import Program
from . import codegen

_FLAT = '''\
"""{title}"""

{preamble}

{function}

@triton.jit(do_not_specialize=["n"])
def {name}({operands}, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
{advance}
    if start + BLOCK <= n:
{whole}
    else:
        live = index < n - start
{partial}
'''

_ROWS = '''\
"""{title}"""

{preamble}

{function}

@triton.jit(do_not_specialize={strides!r} + ["rows", "columns"])
def {name}(
    {operands}, rows, columns,
    V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):
    row = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * ROWS
    column = tl.program_id(0).to(tl.int64) * COLUMNS
    i = tl.arange(0, ROWS)[:, None].to(INDEX)
    j = tl.arange(0, COLUMNS)[None, :].to(INDEX)
    live_i = i < rows - row
    live_j = j < columns.to(tl.int64) * V - column
    live = live_i & live_j
{advance}
{body}
'''


def kernel_name(program: Program) -> str:
    """Name of the kernel in the generated module, as profilers show it."""
    return f"segment_{codegen.describe(program)}"


def _indent(lines: list[str], depth: int) -> str:
    return "\n".join(" " * depth + line for line in lines)


def _loads(names: list[str], pointers: list[str], masks: list[str], compute: str) -> list[str]:
    return [
        f"{name} = tl.load({pointer}{f', mask={mask}' if mask else ''}).to({compute})"
        for name, pointer, mask in zip(names, pointers, masks, strict=True)
    ]


def _stores(pointers: list[str], mask: str) -> list[str]:
    suffix = f", mask={mask}" if mask else ""
    return [
        f"tl.store({pointer}, y{i}.to(o{i}.dtype.element_ty){suffix})"
        for i, pointer in enumerate(pointers)
    ]


def _call(program: Program, names: list[str]) -> str:
    results = ", ".join(f"y{i}" for i in range(len(program.outputs)))
    return f"{results} = program({', '.join(names)})"


def flat_text(program: Program, layout: str, compute: str) -> str:
    """Source of the flat kernel; `layout`: m or s for each live input."""
    live = codegen.live_inputs(program)
    names = [f"x{i}" for i in live]
    inputs = [f"i{i}" for i in live]
    outputs = [f"o{i}" for i in range(len(program.outputs))]
    moved = [name for name, kind in zip(inputs, layout, strict=True) if kind == "m"] + outputs
    pointers = [
        f"{name} + index" if kind == "m" else name
        for name, kind in zip(inputs, layout, strict=True)
    ]
    targets = [f"{name} + index" for name in outputs]

    def body(mask: str) -> list[str]:
        masks = [mask if kind == "m" else "" for kind in layout]
        loads = _loads(names, pointers, masks, compute)
        return [*loads, _call(program, names), *_stores(targets, mask)]

    return _FLAT.format(
        title=f"{codegen.describe(program)}: contiguous operands, layout {layout or '-'}.",
        preamble=codegen.PREAMBLE,
        function=codegen.function_text(program),
        name=kernel_name(program),
        operands=", ".join(inputs + outputs),
        advance=_indent([f"{name} += start" for name in moved], 4),
        whole=_indent(body(""), 8),
        partial=_indent(body("live"), 8),
    )


_ADVANCE = {
    "m": "{0} += row * ({0}_row.to(tl.int64) * V) + column",
    "c": "{0} += row * {0}_row",
    "g": "{0} += row * {0}_row + column * {0}_column",
}
_POINTER = {
    "m": ("{0} + (i * ({0}_row.to(INDEX) * V) + j)", "live"),
    "c": ("{0} + i * {0}_row.to(INDEX)", "live_i"),
    "g": ("{0} + (i * {0}_row.to(INDEX) + j * {0}_column.to(INDEX))", "live"),
    "s": ("{0}", ""),
}
_STRIDES = {"m": ["row"], "c": ["row"], "g": ["row", "column"], "s": []}


def rows_text(program: Program, layout: str, compute: str) -> str:
    """Source of the rows kernel; `layout`: a letter for each live input, then for each output."""
    live = codegen.live_inputs(program)
    names = [f"x{i}" for i in live]
    inputs = [f"i{i}" for i in live]
    outputs = [f"o{i}" for i in range(len(program.outputs))]
    kinds = dict(zip(inputs + outputs, layout, strict=True))
    strides = [f"{name}_{which}" for name, kind in kinds.items() for which in _STRIDES[kind]]
    pointers = {name: _POINTER[kind][0].format(name) for name, kind in kinds.items()}
    masks = [_POINTER[kinds[name]][1] for name in inputs]
    body = [
        *_loads(names, [pointers[name] for name in inputs], masks, compute),
        _call(program, names),
        *_stores([pointers[name] for name in outputs], "live"),
    ]
    return _ROWS.format(
        title=f"{codegen.describe(program)}: strided operands, layout {layout}.",
        preamble=codegen.PREAMBLE,
        function=codegen.function_text(program),
        name=kernel_name(program),
        strides=strides,
        operands=", ".join([*kinds, *strides]),
        advance=_indent([_ADVANCE[k].format(name) for name, k in kinds.items() if k != "s"], 4),
        body=_indent(body, 4),
    )
