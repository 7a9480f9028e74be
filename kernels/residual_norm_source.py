"""The text of the row kernels: what `residual_norm` launches, generated per Program, layout, tile.

A tile is ROWS rows. Its columns lie in chunks of WIDTH neighbours, what the threads of a row load
at a time; every chunk is a tensor [ROWS, WIDTH] and has lines of its own, `e_0`, `e_1`, .... So the
number of chunks need be no power of two, only the last one asks which columns exist, and a row
belongs to one warp as long as WIDTH is what a warp loads at a time (Triton deals out threads along
the last dimension first): the sums over columns are additions within a thread, then shuffles.
One tensor [CHUNKS, ROWS, WIDTH] would be shorter text, but which of its first two dimensions gets
the warps differs between versions of Triton.

Every operand has a name and a letter (see `residual_norm`). Base pointers move by 64-bit scalars
from tile to tile; offsets inside a tile are 32-bit unless strides ask for more (`INDEX`).
"""

from collections.abc import Mapping, Sequence

from ..expr import Program
from . import codegen, tiles

_TEXT = '''\
"""{title}"""

{preamble}{dropout}

{functions}

@triton.jit(do_not_specialize={strides!r} + ["rows", "share"])
def {name}(
    {operands}, rows, share,
    COLUMNS: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    INDEX: tl.constexpr{constants},
):
    first = tl.program_id(0).to(tl.int64) * share
    last = tl.minimum(first + share, rows.to(tl.int64))
    i = tl.arange(0, ROWS)[:, None].to(INDEX)
    j = tl.arange(0, WIDTH)[None, :].to(INDEX)
    lane = tl.arange(0, WIDTH // V)[None, :]
    tail = j < COLUMNS - {whole} * WIDTH
{before}
    for row in range(first, last, ROWS):
        live_i = i < last - row
        live = live_i & tail
{body}
{after}
'''

# By letter: the names of an operand's strides, its pointers in a tile before the column is added,
# and what a column adds.
_LETTERS = {
    "m": (["row"], "{0} + {1} * ({0}_row.to(tl.int64) * V) + i * ({0}_row.to(INDEX) * V)", "{1}"),
    "g": (
        ["row", "column"],
        "{0} + {1} * {0}_row + i * {0}_row.to(INDEX)",
        "{1} * {0}_column.to(INDEX)",
    ),
    "c": (["row"], "{0} + {1} * {0}_row + i * {0}_row.to(INDEX)", ""),
    "v": ([], "{0} + {1} + i", ""),
    "s": ([], "{0}", ""),
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


class _Writer:
    """The lines of one kernel, chunk by chunk."""

    def __init__(self, letters: Mapping[str, str], columns: int, tile: tiles.RowTile, compute: str):
        self.letters, self.compute, self.width = letters, compute, tile.width
        self.chunks = range(tiles.ceil_div(columns, tile.width))
        self.cut = columns % tile.width > 0  # the last chunk is not whole

    def live(self, chunk: int) -> str:
        return "live" if self.cut and chunk == self.chunks[-1] else "live_i"

    def masked(self, value: str, chunk: int) -> str:
        """`value` with zeros for the columns that do not exist."""
        return f"tl.where(tail, {value}, 0.0)" if self.live(chunk) == "live" else value

    def pointer(self, name: str, chunk: int, row: str) -> str:
        _, rows, columns = _LETTERS[self.letters[name]]
        return f"{rows.format(name, row)} + {columns.format(name, f'(j + {chunk * self.width})')}"

    def load(self, name: str, row: str = "row", live_i: str = "live_i") -> list[str]:
        """Lines that load `name_0`, `name_1`, ...; a column vector or a scalar once."""
        letter = self.letters[name]
        if letter in "cvs":
            mask = "" if letter == "s" else f", mask={live_i}, other=0.0"
            once = f"tl.load({_LETTERS[letter][1].format(name, row)}{mask}).to({self.compute})"
            return [f"{name}_ = {once}", *(f"{name}_{c} = {name}_" for c in self.chunks)]
        lines = []
        for c in self.chunks:
            mask = live_i if self.live(c) == "live_i" else f"{live_i} & tail"
            load = f"tl.load({self.pointer(name, c, row)}, mask={mask}, other=0.0)"
            lines.append(f"{name}_{c} = {load}.to({self.compute})")
        return lines

    def load_row_vector(self, name: str) -> list[str]:
        """As `load`, but ahead of the loop: a matrix of row stride 0, whose rows are all there."""
        return self.load(name, "first", "(i >= 0)")

    def store(self, name: str, values: str) -> list[str]:
        """`values`: an expression with {c} for the chunk."""
        kind = f"{name}.dtype.element_ty"
        if self.letters[name] == "v":
            # By the first thread of each row. The others only claim neighbouring columns, so that
            # the compiler deals out threads as everywhere else: its choice for [ROWS, 1] would
            # send the values through shared memory.
            mask = "live_i & (lane == 0)"
            return [f"tl.store({name} + row + i + lane, ({values}).to({kind}), mask={mask})"]
        return [
            f"tl.store({self.pointer(name, c, 'row')}, ({values.format(c=c)}).to({kind}), "
            f"mask={self.live(c)})"
            for c in self.chunks
        ]

    def each(self, *lines: str) -> list[str]:
        return [line.format(c=c) for c in self.chunks for line in lines]

    def total(self, values: str) -> str:
        """Sum over the chunks: [ROWS, WIDTH]."""
        return " + ".join(values.format(c=c) for c in self.chunks)

    def average(self, values: str) -> str:
        return f"tl.sum({self.total(values)}, 1)[:, None] * (1 / COLUMNS)"

    def value(self, program: Program, same: str, dropout: bool) -> list[str]:
        """s, the sum that is normalised, and where there is dropout the factor of each element."""
        inputs = ", ".join(f"i{i}_{{c}}" for i in codegen.live_inputs(program))
        lines = [f"e_{{c}} = program({inputs})"]
        if dropout:
            lines += [
                "keep_{c} = kept(seed, row + i, lane * V + {c} * WIDTH, V, THRESHOLD, ROWS, WIDTH)",
                "factor_{c} = tl.where(keep_{c}, scale, 0.0)",
                "e_{c} = e_{c} * factor_{c}",
            ]
        shape = "[ROWS, WIDTH]"
        residual = f"{same}_{{c}} + " if same else ""
        lines.append(f"s_{{c}} = tl.broadcast_to({residual}e_{{c}}, {shape})")
        return self.each(*lines)

    def text(self, title, functions, name, before, body, after, dropout: bool) -> str:
        strides = [f"{n}_{which}" for n, a in self.letters.items() for which in _LETTERS[a][0]]
        operands = [*self.letters, *(["seed"] if dropout else []), *strides]
        if dropout:
            scale = f"scale = tl.full([1, 1], 65536 / (65536 - THRESHOLD), {self.compute})"
            before = [scale, *before]
        return _TEXT.format(
            title=title,
            preamble=codegen.PREAMBLE,
            dropout="from fastffn.kernels.philox import kept\n" if dropout else "",
            functions=functions,
            strides=strides,
            name=name,
            operands=", ".join(operands),
            constants=", THRESHOLD: tl.constexpr" if dropout else "",
            whole=self.chunks[-1],
            before=_indent(before, 4),
            body=_indent(body, 8),
            after=_indent(after, 4),
        )


def _indent(lines: Sequence[str], depth: int) -> str:
    return "\n".join(" " * depth + line for line in lines)


def forward_text(
    program: Program,
    letters: Mapping[str, str],
    same: str,
    columns: int,
    tile: tiles.RowTile,
    compute: str,
    dropout: bool,
    eps: float,
) -> str:
    """Source of the forward kernel.

    Args:
        letters: of the operands by name, in the order of the arguments: i0, i1, ... (live inputs),
            residual, weight, bias, y, mean, rstd; those that are absent are left out.
        same: name of the residual: an input's where it is one of them, or "" where it is absent.
        compute: "tl.float32" or "tl.float64".
    """
    write = _Writer(letters, columns, tile, compute)
    loaded = [name for name in letters if name[0] == "i" or name in ("residual", "weight", "bias")]
    body = [line for name in loaded for line in write.load(name)]
    body += write.value(program, same, dropout)
    last = write.chunks[-1]
    body += [
        f"s_{last} = {write.masked(f's_{last}', last)}",
        f"mean_ = {write.average('s_{c}')}",
        *(f"d_{c} = {write.masked(f's_{c} - mean_', c)}" for c in write.chunks),
        f"variance = {write.average('d_{c} * d_{c}')}",
        f"rstd_ = {'1.0 / tl.sqrt' if compute == 'tl.float64' else 'tl.rsqrt'}(variance + {eps!r})",
    ]
    value = "d_{c} * rstd_"
    if "weight" in letters:
        value += " * weight_{c}"
    if "bias" in letters:
        value += " + bias_{c}"
    values = {"y": value, "mean": "mean_", "rstd": "rstd_"}
    body += [line for n in values if n in letters for line in write.store(n, values[n])]
    return write.text(
        f"{codegen.describe(program)}, residual, LayerNorm: forward.",
        codegen.function_text(program),
        kernel_name(program, "forward"),
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
    columns: int,
    tile: tiles.RowTile,
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
    write = _Writer(letters, columns, tile, compute)
    inputs = [name for name in letters if name[0] == "i"]
    sums = ["dweight", "dbias", *(f"sum{n}" for n in range(len(summed)))]
    before = ["zero = tl.zeros([ROWS, WIDTH], " + compute + ")"]
    before += [f"{name}_{c} = zero" for name in sums for c in write.chunks]
    if "weight" in letters:
        before += write.load_row_vector("weight")
    loaded = [*inputs, *(n for n in ("residual", "mean", "rstd", "dy") if n in letters)]
    body = [line for name in loaded for line in write.load(name)]
    if letters["dy"] in "cs":  # the sums rely on zeros outside
        body += [
            f"dy_{c} = tl.where({write.live(c)}, tl.broadcast_to(dy_{c}, [ROWS, WIDTH]), 0.0)"
            for c in write.chunks
        ]
    body += write.value(program, same, dropout)
    body += write.each(
        "x_{c} = (s_{c} - mean_) * rstd_",
        "dweight_{c} += dy_{c} * x_{c}",
        "dbias_{c} += dy_{c}",
        f"g_{{c}} = dy_{{c}}{' * weight_{c}' if 'weight' in letters else ''}",
    )
    live = codegen.live_inputs(gradient)
    parameters = ["de_{c}" if i == 0 else f"i{i - 1}_{{c}}" for i in live]
    outputs = [f"d{n}_{{c}}" for n in range(len(gradient.outputs))]
    body += [
        # One trip through shared memory for both, where a row has several warps.
        f"both = tl.join({write.total('g_{c}')}, {write.total('g_{c} * x_{c}')})",
        "average, slope = tl.split(tl.sum(both, 1) * (1 / COLUMNS))",
        *write.each(
            "ds_{c} = (g_{c} - average[:, None] - x_{c} * slope[:, None]) * rstd_",
            f"de_{{c}} = ds_{{c}}{' * factor_{c}' if dropout else ''}",
            f"{', '.join(outputs)} = gradient({', '.join(parameters)})",
        ),
    ]
    if added_to >= 0:
        body += write.each(f"d{added_to}_{{c}} += ds_{{c}}")
    # Rows beyond the last have no gradient; but times an infinite scalar, zero is no longer zero.
    scalars = any(letters[name] == "s" for name in inputs)
    for n, output in enumerate(summed):
        value = f"tl.where(live_i, d{output}_{{c}}, 0.0)" if scalars else f"d{output}_{{c}}"
        body += write.each(f"sum{n}_{{c}} += {value}")
    for n in range(len(outputs)):
        body += write.store(f"g{n}", f"d{n}_{{c}}")
    if "dresidual" in letters:
        body += write.store("dresidual", "ds_{c}")
    after = [
        f"sums += tl.program_id(0).to(tl.int64) * ({len(sums)} * COLUMNS)",
        "at = tl.arange(0, WIDTH)",
    ]
    for n, name in enumerate(sums):
        for c in write.chunks:
            start = c * tile.width
            mask = f", mask=at < COLUMNS - {start}" if write.live(c) == "live" else ""
            place = f"sums + ({n} * COLUMNS + {start}) + at"
            after.append(f"tl.store({place}, tl.sum({name}_{c}, 0){mask})")
    return write.text(
        f"{codegen.describe(program)}, residual, LayerNorm: backward.",
        "\n\n".join([codegen.function_text(program), codegen.function_text(gradient, "gradient")]),
        kernel_name(program, "backward"),
        before,
        body,
        after,
        dropout,
    )
