"""Draw results: `python -m bench.draw` writes a PNG beside each file in `bench/results/`, or beside those that are named.

One panel for each `part` of a result and each metric in it. Where a method has several numbers on the x axis, lines with the
20th to 80th percentile around them; else bars. An axis is logarithmic where its values are far apart (see
`f3triton.run.curves`), and where a row asks for it with `"scale": "log"`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from f3triton.run.curves import COLOURS, label_ends, new_figure, plain_axes, save, scale_values, short

from .common import RESULTS, where

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = ("-", "--", "-.")  # by which methods beyond the sixth are told apart
PANEL = (5.2, 3.6)  # inches
BAR, FEWEST = 0.21, 5  # inches of a bar; bars that a panel has room for at least
PEERS = (
    "bp",
    "backprop",
    "autograd",
    "dfa",
    "sdfa",
    "drtp",
    "fa",
    "last-layer",
    "torch",
    "gemm alone",
    "two gemms",
    "linear and tanh",
    "numpy",
    "h5py",
    "zarr",
    "lmdb",
    "inference",
)
MOST_PANELS = 16
MOST_LABELLED = 6  # lines of a panel with their last values beside them


def colour(method: str) -> str:
    """Bars have their names beside them: ours are blue, and what they are compared with is grey."""
    return COLOURS[-1] if method.lower().removeprefix("f3triton ").startswith(PEERS) else COLOURS[0]


def style(method: str, methods: list[str]) -> dict[str, str]:
    """Colour and dash of a line, the same in every panel; the first F3 is blue."""
    first = next((name for name in methods if name.lower().startswith(("f3", "f3triton f3"))), methods[0])
    place = [first, *(name for name in methods if name != first)].index(method)
    dash = ":" if method.startswith("bound") else DASHES[place // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": dash}


def is_lines(rows: list[dict]) -> bool:
    """Whether a panel has numbers on its x axis, and more than one."""
    return all(isinstance(row["x"], int | float) for row in rows) and len({row["x"] for row in rows}) > 1


def draw_panel(axes: Axes, rows: list[dict], methods: list[str]) -> None:
    """One panel: rows of one part and one metric."""
    lines, log = is_lines(rows), any(row.get("scale") == "log" for row in rows)
    if lines:
        ends = []
        for method in dict.fromkeys(row["method"] for row in rows):
            line = sorted((row for row in rows if row["method"] == method), key=lambda row: row["x"])
            x, looks = [row["x"] for row in line], style(method, methods)
            marker = "" if method.startswith("bound") else "o"
            axes.plot(x, [row["median"] for row in line], marker=marker, ms=3, label=method, **looks)
            axes.fill_between(x, [row["p20"] for row in line], [row["p80"] for row in line], color=looks["color"], alpha=0.15,
                              linewidth=0)  # fmt: skip
            ends.append((x[-1], line[-1]["median"], looks["color"]))
        scale_values(axes, "x", [row["x"] for row in rows])
        scale_values(axes, "y", [row[key] for row in rows for key in ("p20", "p80")], log)
        axes.set(xlabel=rows[0]["x_name"], ylabel=rows[0]["metric"])
        if len(ends) > MOST_LABELLED:
            axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        else:
            axes.legend(frameon=False, fontsize=7)
            label_ends(axes, ends)
    else:
        one = len({row["x"] for row in rows}) == 1
        names = [row["method"] if one else f"{row['method']}, {row['x']}" for row in rows]
        error = [[row["median"] - row["p20"] for row in rows], [row["p80"] - row["median"] for row in rows]]
        bars = axes.barh(range(len(rows)), [row["median"] for row in rows], xerr=error, error_kw={"linewidth": 0.8},
                         color=[colour(row["method"]) for row in rows])  # fmt: skip
        axes.bar_label(bars, [f" {short(row['median'])}" for row in rows], fontsize=7)
        axes.set_yticks(range(len(rows)), names, fontsize=7)
        axes.set_ylim(max(len(rows), FEWEST) - 0.4, -0.6)  # the first on top
        scale_values(axes, "x", [row["p80"] for row in rows] + [row["median"] for row in rows], log)
        low, high = axes.get_xlim()
        axes.set(xlabel=rows[0]["metric"], xlim=(low, high * (high / low) ** 0.2 if axes.get_xscale() == "log" else 1.2 * high))
    axes.set_title(textwrap.fill(rows[0]["part"], 48), fontsize=9)
    plain_axes(axes, "y" if lines else "x")


def draw(content: dict, path: Path) -> None:
    """Draw a result `content` (see `common`) into a PNG at `path`. Raises ValueError where it has nothing to draw."""
    panels: dict[tuple[str, str], list[dict]] = {}
    for row in content["rows"]:
        if row.get("median") is not None and math.isfinite(row["median"]):
            panels.setdefault((row["part"], row["metric"]), []).append(row)
    if not panels:
        raise ValueError("the result has no rows to draw")
    methods = list(dict.fromkeys(row["method"] for row in content["rows"]))
    found = list(panels.values())[:MOST_PANELS]
    columns = min(len(found), 3)
    grid = [found[start : start + columns] for start in range(0, len(found), columns)]
    heights = [max(PANEL[1], *(0 if is_lines(rows) else BAR * len(rows) + 1 for rows in line)) for line in grid]
    figure = new_figure(PANEL[0] * columns, sum(heights), layout="constrained")
    places = figure.subplots(len(grid), columns, squeeze=False, height_ratios=heights)
    for axes, rows in zip(places.flat, found, strict=False):
        draw_panel(axes, rows, methods)
    for axes in list(places.flat)[len(found) :]:
        axes.axis("off")
    title = textwrap.fill(f"bench.{content['benchmark']}: {where(content)}", 75 * columns)
    figure.suptitle(title, fontsize=9, color="#555555")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results, *.json; default: all")
    for path in parser.parse_args().files or sorted(RESULTS.glob("*.json")):
        try:
            draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
        except (OSError, ValueError, KeyError, ModuleNotFoundError) as error:
            print(f"bench.draw: error: cannot draw {str(path)!r}: {error}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
