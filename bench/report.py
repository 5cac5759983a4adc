"""Draw the README's picture and write its tables from the files in `bench/results/`.

    python -m bench.report           rewrite README.md and docs/overview.png
    python -m bench.report --check   exit with 1 if the README's tables are not those of the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from .common import RESULTS, table
from .memory import METHODS
from .paper import MNIST, WINE_QUALITY, show

ROOT = Path(__file__).resolve().parents[1]
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "overview.png"


def result(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def source(content: dict, name: str) -> str:
    """Where a table's figures come from."""
    torch_version = content["versions"]["torch"]
    machine = f"{content['processor']}, {content['device']}, torch {torch_version}, {content['date']}"
    return f"`{content['command']}` on {machine}; [bench/results/{name}](bench/results/{name})"


def paper_table(dataset: str, experiments: dict) -> str:
    content = result("paper.json")
    return f"{show(experiments, content['runs'][dataset])}\n\n{source(content, 'paper.json')}"


def step_table() -> str:
    content = result("step-cpu.json")
    settings = content["steps_per_second"]
    names = list(next(iter(settings.values()))["median"])
    header = ["steps a second", *settings, *(f"f3triton f3 is x times as fast, {depth}" for depth in settings)]
    rows = []
    for name in names:
        rates = [run["median"][name] for run in settings.values()]
        ratios = [run["median"]["f3triton f3"] / run["median"][name] for run in settings.values()]
        rows.append([name, *(f"{rate:.0f}" for rate in rates), *(f"{ratio:.2f}" for ratio in ratios)])
    return f"{table(header, rows)}\n\n{source(content, 'step-cpu.json')}"


def memory_table() -> str:
    content = result("memory-depth.json")
    depths = list(content["peak_bytes"]["f3"])
    rows = [[method, *(f"{content['peak_bytes'][method][depth] / 2**20:.0f}" for depth in depths)] for method in METHODS]
    return f"{table(['MiB, at hidden layers', *depths], rows)}\n\n{source(content, 'memory-depth.json')}"


TABLES = {
    "mnist": lambda: paper_table("mnist", MNIST),
    "wine-quality": lambda: paper_table("wine-quality", WINE_QUALITY),
    "step": step_table,
    "memory": memory_table,
}


def filled(text: str) -> str:
    """The README with every marked block replaced by its table."""
    for name, make in TABLES.items():
        begin, end = f"<!-- table: {name} -->", "<!-- end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        block = f"{begin}\n{make()}\n{end}"
        text, count = pattern.subn(lambda _, block=block: block, text)
        if count != 1:
            raise SystemExit(f"README.md has {count} blocks {begin}, needed: 1")
    return text


def draw() -> None:
    """Two panels: memory against depth, and accuracy on MNIST."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    memory, runs = result("memory-depth.json")["peak_bytes"], result("paper.json")["runs"]["mnist"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    for method, label, colour in (
        ("bp", "backprop", "#7a7a7a"),
        ("dfa", "DFA", "#d9a11e"),
        ("bp-checkpoint", "backprop, checkpointing", "#b0b0b0"),
        ("f3", "F3", "#1f6fb4"),
    ):
        depths = [int(depth) for depth in memory[method]]
        style = "--" if method == "dfa" else "-"  # DFA lies on backpropagation
        left.plot(depths, [count / 2**20 for count in memory[method].values()], style, marker="o", color=colour, label=label)
    left.set(title="Activations and gradients of a step", xlabel="hidden layers", ylabel="MiB", ylim=0)
    left.legend(frameon=False)
    bars = {
        "backprop": ("bp-default", "#7a7a7a"),
        "DFA": ("dfa-default", "#d9a11e"),
        "F3, this library's default": ("f3-default", "#1f6fb4"),
        "F3, the paper's setting": ("f3-error-masked-trinomial", "#8fb8da"),
        "DRTP": ("drtp-trinomial", "#cccccc"),
        "last layer only": ("last-layer", "#cccccc"),
    }
    values = [runs[name]["last"] for name, _ in bars.values()]
    drawn = right.barh(list(bars), values, color=[colour for _, colour in bars.values()])
    right.bar_label(drawn, fmt="%.2f", padding=3)
    right.invert_yaxis()
    right.set(title="MNIST, 784-500-10, 100 epochs", xlabel="test error in percent", xlim=(0, max(values) * 1.12))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    options = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if options.check:
        sys.exit("README.md: a table is not that of its results; run python -m bench.report" if before != after else 0)
    README.write_text(after, encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
