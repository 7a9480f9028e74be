"""The text of the row kernels: what `residual_norm` launches, generated per Program and layout.

Every operand has a name and a letter (see `residual_norm`); a tile is [CHUNKS, ROWS, WIDTH]: WIDTH
neighbouring columns to the threads of a row, CHUNKS of them to every thread, ROWS rows at a time.
Chunks come first, and not inside the columns, because Triton deals out threads and then warps along
the last dimensions: so a row belongs to one warp as long as WIDTH is what a warp loads at a time,
and the sums over columns are additions within a thread, then shuffles. The number of columns is a
constant: a chunk beyond it costs nothing.

Base pointers move by 64-bit scalars from tile to tile; offsets inside a tile are 32-bit unless
strides ask for more (`INDEX`).
"""

from collections.abc import Mapping, Sequence

from ..expr import Program
from . import codegen

_TEXT = '''\
"""{title}"""

{preamble}{dropout}

{functions}

@triton.jit(do_not_specialize={strides!r} + ["rows", "share"])
def {name}(
    {operands}, rows, share,
    COLUMNS: tl.constexpr, V: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, INDEX: tl.constexpr{constants},
):
    first = tl.program_id(0).to(tl.int64) * share
    last = tl.minimum(first + share, rows.to(tl.int64))
    i = tl.arange(0, ROWS)[None, :, None].to(INDEX)
    k = tl.arange(0, CHUNKS)[:, None, None] * WIDTH
    j = (k + tl.arange(0, WIDTH)[None, None, :]).to(INDEX)
    live_j = j < COLUMNS
    lane = tl.arange(0, WIDTH // V)[None, None, :]
{before}
    for row in range(first, last, ROWS):
        live_i = i < last - row
        live = live_i & live_j
{body}
{after}
'''

# By letter: the names of an operand's strides, its move to the tile, its offsets there, its mask.
_LETTERS = {
    "m": (["row"], "row * ({0}_row.to(tl.int64) * V)", "i * ({0}_row.to(INDEX) * V) + j", "live"),
    "c": (["row"], "row * {0}_row", "i * {0}_row.to(INDEX)", "live_i"),
    "g": (
        ["row", "column"],
        "row * {0}_row",
        "i * {0}_row.to(INDEX) + j * {0}_column.to(INDEX)",
        "live",
    ),
    "s": ([], "", "", ""),
    "v": ([], "row", "i", "live_i"),
}


def kernel_name(program: Program, direction: str) -> str:
    """Name of the kernel in the generated module, as profilers show it."""
    return f"residual_norm_{direction}_{codegen.describe(program)}"


def carried(gradient: Program) -> int:
    """How many values of the forward the gradient needs: they live across the sums over a row.

    That is, what instructions that depend on the gradient of e read, and that does not.
    """
    dependent, needed = {0}, set()
    for instruction in gradient.instructions:
        reads = codegen.read_sources(instruction)
        if reads & dependent:
            dependent.add(instruction.target)
            needed |= reads - dependent
    return len(needed)


def _pointer(name: str, letter: str) -> str:
    _, move, offsets, _ = _LETTERS[letter]
    return " + ".join([name, *(part.format(name) for part in (move, offsets) if part)])


def _load(name: str, letter: str, compute: str) -> str:
    mask = _LETTERS[letter][3]
    mask = f", mask={mask}, other=0.0" if mask else ""
    return f"{name}_ = tl.load({_pointer(name, letter)}{mask}).to({compute})"


def _store(name: str, letter: str, value: str) -> str:
    pointer, mask = _pointer(name, letter), _LETTERS[letter][3]
    if letter == "v":
        # By the first thread of each row. The others only claim neighbouring columns, so that the
        # compiler deals out threads as everywhere else: its choice for [1, ROWS, 1] would send the
        # values through shared memory.
        pointer, mask = f"{pointer} + lane", "live_i & (lane == 0)"
    return f"tl.store({pointer}, ({value}).to({name}.dtype.element_ty), mask={mask})"


def _row_vector(name: str, letter: str, compute: str) -> str:
    """A load before the loop; of the same shape as the matrices', for the same layout."""
    if letter == "s":
        return f"{name}_ = tl.load({name}).to({compute})"
    offsets = _LETTERS[letter][2].format(name)
    return (
        f"{name}_ = tl.load({name} + ({offsets}), mask=live_j & (i >= 0), other=0.0).to({compute})"
    )


def _inputs(program: Program) -> str:
    return ", ".join(f"i{i}_" for i in codegen.live_inputs(program))


def _indent(lines: Sequence[str], depth: int) -> str:
    return "\n".join(" " * depth + line for line in lines)


def _sum(value: str) -> str:
    return f"tl.sum(tl.sum({value}, 0), 1)[None, :, None]"


def _value(program: Program, same: str, compute: str, dropout: bool) -> list[str]:
    """s, the sum that is normalised, and where there is dropout the factor of each element."""
    lines = [f"e = program({_inputs(program)})"]
    r = f"{same or 'residual'}_"
    if not dropout:
        return [*lines, f"s = {r} + e"]
    return [
        *lines,
        "keep = kept(seed, row + i, vector, V, THRESHOLD, CHUNKS, ROWS, WIDTH)",
        f"factor = tl.where(keep, tl.full([1], 65536 / (65536 - THRESHOLD), {compute}), 0.0)",
        f"s = {r} + e * factor",
    ]


def _text(title, functions, name, letters, before, body, after, dropout: bool) -> str:
    strides = [
        f"{name}_{which}" for name, letter in letters.items() for which in _LETTERS[letter][0]
    ]
    operands = [*letters, *(["seed"] if dropout else []), *strides]
    if dropout:
        before = [
            "vector = k + lane * V",
            *before,
        ]
    return _TEXT.format(
        title=title,
        preamble=codegen.PREAMBLE,
        dropout="from fastffn.kernels.philox import kept\n" if dropout else "",
        functions=functions,
        strides=strides,
        name=name,
        operands=", ".join(operands),
        constants=", THRESHOLD: tl.constexpr" if dropout else "",
        before=_indent(before, 4),
        body=_indent(body, 8),
        after=_indent(after, 4),
    )


def forward_text(
    program: Program, letters: Mapping[str, str], same: str, compute: str, dropout: bool, eps: float
) -> str:
    """Source of the forward kernel.

    Args:
        letters: of the operands by name, in the order of the arguments: i0, i1, ... (live inputs),
            residual, weight, bias, y, mean, rstd; those that are absent are left out.
        same: name of the input that is the residual as well, or "".
        compute: "tl.float32" or "tl.float64".
    """
    loaded = [name for name in letters if name[0] == "i" or name in ("residual", "weight", "bias")]
    body = [_load(name, letters[name], compute) for name in loaded]
    body += _value(program, same, compute, dropout)
    body += [
        f"mean_ = {_sum('tl.where(live_j, s, 0.0)')} * (1 / COLUMNS)",
        "d = tl.where(live_j, s - mean_, 0.0)",
        f"variance = {_sum('d * d')} * (1 / COLUMNS)",
        f"rstd_ = {'1.0 / tl.sqrt' if compute == 'tl.float64' else 'tl.rsqrt'}(variance + {eps!r})",
    ]
    value = "d * rstd_"
    if "weight" in letters:
        value += " * weight_"
    if "bias" in letters:
        value += " + bias_"
    values = {"y": value, "mean": "mean_", "rstd": "rstd_"}
    body += [_store(n, letters[n], values[n]) for n in values if n in letters]
    return _text(
        f"{codegen.describe(program)}, residual, LayerNorm: forward.",
        codegen.function_text(program),
        kernel_name(program, "forward"),
        letters,
        [],
        body,
        [],
        dropout,
    )


def backward_text(
    program: Program,
    gradient: Program,
    letters: Mapping[str, str],
    same: str,
    compute: str,
    dropout: bool,
    added_to: int,
    summed: tuple[int, ...],
) -> str:
    """Source of the backward kernel.

    Args:
        letters: as in `forward_text`: inputs, residual, weight, mean, rstd, dy, g0, g1, ...
            (the outputs of `gradient`), dresidual, sums.
        added_to, summed: see `residual_norm.backward`.
    """
    inputs = [name for name in letters if name[0] == "i"]
    loaded = [*inputs, *(n for n in ("residual", "mean", "rstd", "dy") if n in letters)]
    before = [f"dweight = tl.zeros([CHUNKS, ROWS, WIDTH], {compute})", "dbias = dweight"]
    before += [f"sum{n} = dweight" for n in range(len(summed))]
    if "weight" in letters:
        before.append(_row_vector("weight", letters["weight"], compute))
    body = [_load(name, letters[name], compute) for name in loaded]
    if letters["dy"] in "cs":  # the sums rely on zeros outside
        body.append("dy_ = tl.where(live, dy_, 0.0)")
    body += _value(program, same, compute, dropout)
    parameters = ["de", *(f"i{i - 1}_" for i in codegen.live_inputs(gradient) if i)]
    if 0 not in codegen.live_inputs(gradient):
        parameters = parameters[1:]
    outputs = [f"d{n}" for n in range(len(gradient.outputs))]
    body += [
        "x = tl.where(live_j, (s - mean_) * rstd_, 0.0)",
        "dweight += dy_ * x",
        "dbias += dy_",
        f"g = dy_{' * weight_' if 'weight' in letters else ''}",
        "both = tl.join(tl.sum(g, 0), tl.sum(g * x, 0))  # one trip through shared memory, if any",
        "average, slope = tl.split(tl.sum(both, 1) * (1 / COLUMNS))",
        "ds = (g - average[None, :, None] - x * slope[None, :, None]) * rstd_",
        f"de = ds{' * factor' if dropout else ''}",
        f"{', '.join(outputs)} = gradient({', '.join(parameters)})",
    ]
    if added_to >= 0:
        body.append(f"d{added_to} += ds")
    body += [f"sum{n} += tl.where(live, d{output}, 0.0)" for n, output in enumerate(summed)]
    body += [_store(f"g{n}", letters[f"g{n}"], f"d{n}") for n in range(len(outputs))]
    if "dresidual" in letters:
        body.append(_store("dresidual", letters["dresidual"], "ds"))
    after = [
        f"sums += tl.program_id(0).to(tl.int64) * ({2 + len(summed)} * COLUMNS)",
        "at = tl.arange(0, CHUNKS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]",
    ]
    for n, name in enumerate(["dweight", "dbias", *(f"sum{n}" for n in range(len(summed)))]):
        after.append(f"tl.store(sums + {n} * COLUMNS + at, tl.sum({name}, 1), mask=at < COLUMNS)")
    return _text(
        f"{codegen.describe(program)}, residual, LayerNorm: backward.",
        "\n\n".join([codegen.function_text(program), codegen.function_text(gradient, "gradient")]),
        kernel_name(program, "backward"),
        letters,
        before,
        body,
        after,
        dropout,
    )
