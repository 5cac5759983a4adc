"""Draw results: `python -m bench.draw bench/results/*.json` writes a PNG beside each of them.

One panel for each `part` of a result and each metric in it. Where a method has several numbers on the x axis, lines with the
20th to 80th percentile around them; else bars. A row may ask for a logarithmic axis with `"scale": "log"`. Needs matplotlib
(`pip install f3triton[plots]`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

COLOURS = ("#1f6fb4", "#d9641e", "#3a923a", "#8a5cb0", "#c2185b", "#00838f", "#b08d2c", "#7a7a7a", "#111111", "#8fb8da")
PANEL = (5.2, 3.6)  # inches
MOST_PANELS = 16


def colour(method: str, methods: list[str]) -> str:
    """F3 is blue wherever it appears."""
    first = next((name for name in methods if name.lower().startswith(("f3", "f3triton f3"))), methods[0])
    order = [first, *(name for name in methods if name != first)]
    return COLOURS[order.index(method) % len(COLOURS)]


def draw_panel(axes: object, rows: list[dict], methods: list[str]) -> None:
    """One panel: rows of one part and one metric."""
    numbers = all(isinstance(row["x"], int | float) for row in rows) and len({row["x"] for row in rows}) > 1
    shown = [method for method in methods if any(row["method"] == method for row in rows)]
    if numbers:
        for method in shown:
            line = sorted((row for row in rows if row["method"] == method), key=lambda row: row["x"])
            x = [row["x"] for row in line]
            dashed = method.startswith("bound")
            axes.plot(x, [row["median"] for row in line], "--" if dashed else "-", marker="" if dashed else "o", markersize=4,
                      label=method, color=colour(method, methods))  # fmt: skip
            axes.fill_between(x, [row["p20"] for row in line], [row["p80"] for row in line], color=colour(method, methods),
                              alpha=0.15, linewidth=0)  # fmt: skip
        values = [row["x"] for row in rows]
        if min(values) > 0 and max(values) / min(values) > 50:
            axes.set_xscale("log")
        axes.set(xlabel=rows[0]["x_name"], ylabel=rows[0]["metric"])
        axes.legend(frameon=False, fontsize=7)
    else:
        one = len({row["x"] for row in rows}) == 1
        names = [row["method"] if one else f"{row['method']}, {row['x']}" for row in rows]
        places = range(len(rows))
        error = [[row["median"] - row["p20"] for row in rows], [row["p80"] - row["median"] for row in rows]]
        bars = axes.barh(places, [row["median"] for row in rows], xerr=error, error_kw={"linewidth": 0.8},
                         color=[colour(row["method"], methods) for row in rows])  # fmt: skip
        axes.bar_label(bars, [f" {row['median']:.3g}" for row in rows], fontsize=7)
        axes.set_yticks(places, names, fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(xlabel=rows[0]["metric"])
    if any(row.get("scale") == "log" for row in rows):
        (axes.set_yscale if numbers else axes.set_xscale)("log")
    else:
        (axes.set_ylim if numbers else axes.set_xlim)(min(0, min(row["p20"] for row in rows)))
    axes.set_title(rows[0]["part"], fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw(content: dict, path: Path) -> None:
    """Draw a result `content` (see `common`) into a PNG at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[dict]] = {}
    for row in content["rows"]:
        if row.get("median") is not None and math.isfinite(row["median"]):
            panels.setdefault((row["part"], row["metric"]), []).append(row)
    if not panels:
        raise ValueError("the result has no rows to draw")
    methods = list(dict.fromkeys(row["method"] for row in content["rows"]))
    found = list(panels.values())[:MOST_PANELS]
    columns = min(len(found), 3)
    lines = math.ceil(len(found) / columns)
    tallest = max(len(rows) if isinstance(rows[0]["x"], str) or len({r["x"] for r in rows}) == 1 else 0 for rows in found)
    height = max(PANEL[1], 0.19 * tallest + 1.0)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(PANEL[0] * columns, height * lines), squeeze=False, constrained_layout=True
    )
    for axes, rows in zip(grid.flat, found, strict=False):
        draw_panel(axes, rows, methods)
    for axes in list(grid.flat)[len(found) :]:
        axes.axis("off")
    where = f"{content['processor']}, {content['device']}, torch {content['versions']['torch']}, {content['date']}"
    figure.suptitle(f"bench.{content['benchmark']}: {where}", fontsize=9, color="#555555")
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results, *.json")
    for path in parser.parse_args().files:
        try:
            draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
        except (OSError, ValueError, KeyError, ImportError) as error:
            print(f"bench.draw: error: cannot draw {str(path)!r}: {error}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
