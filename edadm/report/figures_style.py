"""How every figure looks, and how it is written: PNG and SVG, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from edadm.store import atomic_file

# Okabe and Ito: told apart by readers with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLUMN, PAGE = 3.5, 7.0  # inches: one column of a paper, both columns
LEGEND_CHARACTERS = 110  # that fit beside each other on a page
STEP_AXIS = "sampling step (1 = noise, last = image)"
_RC: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",
    "svg.hashsalt": "edadm",
}

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def styled(draw: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return the function that draws with our sizes of text and lines."""

    @wraps(draw)
    def drawing(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        from matplotlib import rc_context

        with rc_context(_RC):
            return draw(*args, **kwargs)

    return drawing


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, in inches, without any window system behind it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def step_axis(axes: Any, *, name: bool = True) -> None:
    """Put whole numbers on an axis of sampling steps, counted from 1, and name it unless told otherwise."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(STEP_AXIS if name else "")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def ratio_axis(axis: Any, low: float, high: float) -> None:
    """Put plain numbers on a logarithmic axis of ratios between low and high; 1 is among them."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ticks = [t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10) if t == 1 or low <= t <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def legend_below(figure: Any, axes: Any) -> None:
    """Put the legend of some axes below the figure, in as many columns as its names leave room for."""
    handles, names = axes.get_legend_handles_labels()
    columns = max(1, min(len(names), int(LEGEND_CHARACTERS / (max(map(len, names)) + 6))))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)


def save(figure: Any, path: Path, dpi: int = 200) -> list[Path]:
    """Write a figure to path as PNG and SVG and return both paths; the suffix of path does not matter."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    # the file holds no library version, no date and no random ids: the same figure gives the same bytes
    written = [Path(path).with_suffix(".png"), Path(path).with_suffix(".svg")]
    with atomic_file(written[0]) as temporary, open(temporary, "wb") as file:
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    with rc_context(_RC), atomic_file(written[1]) as temporary, open(temporary, "w", encoding="utf-8") as text:
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    return written
