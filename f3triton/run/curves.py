"""A run's curves as a picture. matplotlib is imported when something is drawn, and none of its global state is touched."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float]]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#6b6b6b")  # told apart by the colour-blind, too
WIDE = 30  # the largest value over the smallest, beyond which an axis is logarithmic
CROWDED = {"x": 50, "y": 2000}  # the same, beyond which it has no room for 2 and 5 between the powers of ten
FEW = 20  # points of a curve, up to which each is marked
APART = 10  # points between numbers at the ends of lines


def new_figure(width: float, height: float, **settings: object) -> Figure:
    """An empty figure of so many inches, which `save` writes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), **settings)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path | BytesIO, dpi: int = 100) -> None:
    """Write a PNG that is the same for the same figure. Raises OSError where it cannot be written."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name
        figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})


def is_wide(values: Iterable[float]) -> bool:
    """Whether values are all positive and so far apart that only a logarithmic axis shows them all."""
    values = list(values)
    return bool(values) and min(values) > 0 and max(values) / min(values) > WIDE


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def scale_values(axes: Axes, which: str, values: Iterable[float], log: bool = False) -> None:
    """Scale the axis `which` (x or y) for values: logarithmic where they are wide, or with `log`; else from 0. Zeros, which
    have no logarithm, are then at its foot.
    """
    values = list(values)
    above = [value for value in values if value > 0]
    if above and (log or (min(values) >= 0 and is_wide(above))):
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set(**{f"{which}scale": "log"})
        axis = getattr(axes, f"{which}axis")
        far = max(above) / min(above)
        within = (1,) if far > CROWDED[which] else (1, 2, 5) if far > 10 else (1, 1.5, 2, 3, 5, 7)
        axis.set_major_locator(LogLocator(subs=within))
        axis.set_major_formatter(lambda value, _: short(value))
        if len(above) < len(values):
            axes.set(**{f"{which}lim": (min(above) / 1.5, 1.3 * max(above))})
        axis.set_minor_formatter(NullFormatter())
    else:
        axes.set(**{f"{which}lim": (min([0, *values]), 1.05 * max([0, *values]) or 1)})


def plain_axes(axes: Axes, grid: str = "y") -> None:
    """A light grid, and no frame above and to the right."""
    axes.grid(axis=grid, which="major", color="#e2e2e2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def short(value: float) -> str:
    """A number in three digits, or whole where it is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def label_ends(axes: Axes, ends: list[tuple[float, float, str]]) -> None:
    """Write the y of each last point `(x, y, colour)` as a number: beside the axes, where what would touch is moved apart, and
    at the point itself where the line ends long before.
    """
    foot = axes.get_ylim()[0]  # and the scale is final; a zero on a logarithmic axis is there
    pixels = axes.figure.dpi / 72  # of a point
    (left, bottom), (right, _) = axes.transAxes.transform([(0, 0), (1, 1)]) / pixels
    groups: list[list[tuple[float, float, str]]] = []  # (height in points, y, colour), one group above the other

    def middle(group: list[tuple[float, float, str]]) -> float:
        return max(sum(height for height, _, _ in group) / len(group), bottom + APART * (len(group) - 1) / 2)

    style = {"textcoords": "offset points", "fontsize": 8, "va": "center", "annotation_clip": False}
    for x, y, colour in sorted(ends, key=lambda end: end[1]):
        across, height = axes.transData.transform((x, max(y, foot))) / pixels
        if across - left < 0.9 * (right - left):
            axes.annotate(short(y), (x, max(y, foot)), xytext=(6, 0), color=colour, **style)
            continue
        groups.append([(height, y, colour)])
        while len(groups) > 1 and middle(groups[-1]) - middle(groups[-2]) < APART * (len(groups[-1]) + len(groups[-2])) / 2:
            groups[-2:] = [groups[-2] + groups[-1]]
    for group in groups:
        for number, (height, y, colour) in enumerate(group):
            place = middle(group) + APART * (number - (len(group) - 1) / 2)
            at = {"xycoords": ("axes fraction", "data"), "xytext": (4, place - height)}
            axes.annotate(short(y), (1, max(y, foot)), color=colour, **at, **style)


def draw_curves(path: Path | BytesIO, title: str, x_label: str, y_label: str, curves: dict[str, Curve]) -> None:
    """Draw curves `[(x, y), ...]` named `method, part` into a PNG at `path`: a colour for each method, dotted lines for the
    part `train`. Points that are not finite are left out.

    Writes nothing if there is no point at all, or no matplotlib. Raises OSError where the file cannot be written.
    """
    finite = {name: [(x, y) for x, y in curve if math.isfinite(x) and math.isfinite(y)] for name, curve in curves.items()}
    finite = {name: curve for name, curve in finite.items() if curve}
    if not finite or not can_draw():
        return
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8.6, 4.8)
    figure.subplots_adjust(left=0.09, right=0.93, bottom=0.12, top=0.91)
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(name.rpartition(", ")[0] for name in finite))
    ends = []
    for name, curve in finite.items():
        method, _, part = name.rpartition(", ")
        colour, marker = COLOURS[methods.index(method) % len(COLOURS)], "o" if len(curve) <= FEW else ""
        axes.plot(*zip(*curve, strict=True), ":" if part == "train" else "-", color=colour, marker=marker, ms=3, label=name)
        ends.append((*curve[-1], colour))
    scale_values(axes, "y", (y for curve in finite.values() for _, y in curve))
    xs = [x for curve in finite.values() for x, _ in curve]
    first, last = min(xs), max(xs)
    axes.set_xlim((first, last + 0.01 * (last - first)) if last > first else (first - 0.5, last + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(printable(title, 100), parse_math=False)
    plain_axes(axes)
    axes.legend(frameon=False, fontsize=9)
    label_ends(axes, ends)
    save(figure, path)
