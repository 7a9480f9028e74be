"""What all pictures share: colours, numbers as text, a figure without a window, whole files.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; shape or label says
the same again. Drawn without pyplot, so that no window system and no global state is involved.
"""

from pathlib import Path
from typing import Any

from .errors import UserError
from .files import atomic_path

BLACK, GREY, LIGHT = "#222222", "#777777", "#dddddd"
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY = "#CC79A7", "#56B4E9"
_DOTS = 150  # per inch


def figure(width: float, height: float, layout: str | None = "constrained") -> Any:
    """An empty figure of so many inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "pictures need matplotlib, which is not installed: pip install matplotlib"
        ) from None
    made = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(made)
    return made


def plain_axes(ax: Any, grid: str = "y") -> Any:
    """The axes without a box, with a faint grid behind what is drawn."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color=LIGHT, linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def save(drawn: Any, path: str | Path) -> Path:
    """Writes a figure; the name's ending says whether as PNG or as SVG. Returns the path."""
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    extra = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": _DOTS}
    with atomic_path(path) as temporary:
        drawn.savefig(temporary, format=kind, **extra)
    return path


def amount(number: float, digits: int = 3) -> str:
    """A number of so many digits and a unit, as pictures and tables write it: 1.18M, 225k, 96."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size * (1 - 0.5 * 10**-digits):  # what rounds up to the unit
            return f"{number / size:.{digits}g}{unit}"
    return f"{number:.{digits}g}"
