"""Draw two pictures of the docs and write the tables of README and docs from the files in `bench/results/`.

    python -m bench.report           rewrite README.md, docs/*.md and docs/overview.png
    python -m bench.report --check   exit with 1 if a table is not that of its results

A document has its tables between `<!-- table: NAME -->` and `<!-- end -->`, where NAME is one of `TABLES`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from functools import partial
from pathlib import Path

from f3triton.run.curves import COLOURS, can_draw, label_ends, new_figure, plain_axes, save

from . import accuracy_memory
from .common import RESULTS, read_result, table, where
from .memory_child import METHODS

ROOT = Path(__file__).resolve().parents[1]
PICTURE, AGAINST_MEMORY = ROOT / "docs" / "overview.png", ROOT / "docs" / "accuracy-memory.png"


def documents() -> list[Path]:
    """README and everything in `docs/`."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def source(name: str) -> str:
    """Where a table's figures come from; the link is from the project's root."""
    content = read_result(name)
    return f"`{content['command']}` on {where(content)}; [bench/results/{name}](bench/results/{name})"


def paper_table(recipe: str, name: str = "paper.json") -> str:
    from .paper import show

    content = read_result(name)
    whole = "epochs" not in content["settings"]
    return f"{show(recipe, content['runs'][recipe], whole)}\n\n{source(name)}"


def by_x(name: str, part: str, metric: str, shown: str, number: str = "median", order: tuple[str, ...] = ()) -> str:
    """A line for each method, a column for each x."""
    rows = [row for row in read_result(name)["rows"] if row["part"] == part and row["metric"] == metric and number in row]
    if not rows:
        raise KeyError(f"{name} has no rows of {part!r}, {metric!r}")
    head = f"{metric}, by {rows[0]['x_name']}" if rows[0]["x_name"] else metric
    return crossed(rows, "x", head, shown, number, order)


def crossed(rows: list[dict], across: str, head: str, shown: str, number: str = "median", order: tuple[str, ...] = ()) -> str:
    """A line for each method, those of `order` first, and a column for each value of `across` in the rows."""
    columns = list(dict.fromkeys(row[across] for row in rows))
    found = {(row["method"], row[across]): row[number] for row in rows}
    methods = [method for method in order if any(row["method"] == method for row in rows)]
    methods += [method for method in dict.fromkeys(row["method"] for row in rows) if method not in methods]
    lines = [[method, *(f"{found[method, x]:{shown}}" if (method, x) in found else "" for x in columns)] for method in methods]
    return table([head, *map(str, columns)], lines)


def step_table() -> str:
    rates = by_x("step-cpu.json", "hidden layers", "steps/s", ".0f")
    ratios = by_x("step-cpu.json", "hidden layers", "steps/s", ".2f", "f3_is_faster").replace(
        "steps/s, by", "steps/s of f3triton f3 over those of each, by"
    )
    return f"{rates}\n\n{ratios}\n\n{source('step-cpu.json')}"


def memory_table(part: str) -> str:
    figures = by_x("memory-scaling.json", part, "activations and gradients, MiB", ".0f", order=METHODS)
    return f"{figures}\n\n{source('memory-scaling.json')}"


def largest_table() -> str:
    name = "memory-scaling-largest.json"
    parts = list(dict.fromkeys(row["part"] for row in read_result(name)["rows"]))
    tables = (f"{part}:\n\n{by_x(name, part, 'hidden layers', '.0f', order=METHODS)}" for part in parts)
    return "\n\n".join([*tables, source(name)])


def bytes_table() -> str:
    name = "memory-scaling-bytes.json"
    return f"{crossed(read_result(name)['rows'], 'x', 'bytes a weight', '.2f')}\n\n{source(name)}"


def budget_table() -> str:
    name = "memory-scaling.json"
    return f"{by_x(name, 'peak of a run beside its data', 'MiB', '.1f')}\n\n{source(name)}"


def windows_table(part: str) -> str:
    rows = [row for row in read_result("windows.json")["rows"] if row["part"] == part]
    lines = [[row["method"], f"{row['median']:.2f}", row["n"]] for row in rows]
    return f"{table(['setting', 'test error in percent, last epoch', 'seeds'], lines)}\n\n{source('windows.json')}"


def fullest() -> list[dict]:
    """Of the compiled cases of each kernel, tile and type, the one with the most registers: the nearest to spilling."""
    most: dict[tuple[str, ...], dict] = {}
    for row in read_result("kernels-compiled.json")["rows"]:
        key = row["kernel"], row["tile"], row["dtype"]
        if row["part"] == "sm_90" and row["reg"] > most.get(key, {"reg": -1})["reg"]:
            most[key] = row
    return list(most.values())


def compiled_table() -> str:
    columns = ["kernel", "tile", "dtype", "reg", "stack", "shared_bytes", "tensor_core", "occupancy", "limit", "share"]
    rows = [[row.get(column, "") for column in columns] for row in fullest()]
    return f"{table(columns, rows)}\n\n{source('kernels-compiled.json')}"


def time_table() -> str:
    from .time_to_accuracy import show

    return f"{show(read_result('time-to-accuracy.json')['rows'])}\n\n{source('time-to-accuracy.json')}"


def accuracy_memory_table() -> str:
    sources = "; ".join(source(f"local-{name}.json") for name in accuracy_memory.DATA)
    return f"{accuracy_memory.show()}\n\nErrors: {sources}. Memory: by arithmetic"


def depth_table() -> str:
    from .depth import show

    return f"{show(read_result('depth.json')['runs'])}\n\n{source('depth.json')}"


def alignment_table() -> str:
    from .alignment import show

    return f"{show(read_result('alignment.json')['runs'])}\n\n{source('alignment.json')}"


def gpt_table() -> str:
    from .gpt import show

    return f"{show(read_result('gpt.json')['runs'])}\n\n{source('gpt.json')}"


def vit_table() -> str:
    from .vit import show

    return f"{show(read_result('vit.json')['runs'])}\n\n{source('vit.json')}"


def local_table(task: str) -> str:
    from .local import show, task_of

    name = f"local-{task}.json"
    return f"{show(task_of(task).metric, read_result(name)['runs'])}\n\n{source(name)}"


def choice_table(task: str) -> str:
    return by_x(f"local-{task}.json", f"{task}, the choice of a learning rate", "on the validation split", ".1f")


def store_table() -> str:
    from .error_store import show

    return f"{show(read_result('error-store.json'))}\n\n{source('error-store.json')}"


def codecs_table() -> str:
    from .error_codecs import show

    return f"{show(read_result('error-codecs.json')['rows'])}\n\n{source('error-codecs.json')}"


def simulated_table() -> str:
    """Of the simulation: columns are numbers of workers, lines are schedules, a table for each of two cases."""
    name = "pipeline-simulated.json"
    parts = ("even workers", "one worker 20 % slower")
    tables = (f"{part}:\n\n{by_x(name, part, 'efficiency, %', '.1f')}" for part in parts)
    return "\n\n".join([*tables, source(name)])


def rates_table() -> str:
    from .rates import show

    return f"{show(read_result('rates.json')['runs'])}\n\n{source('rates.json')}"


def methods_table() -> str:
    """Each method on the same problems: errors on MNIST, memory, steps and time, from four results; empty: not measured."""

    def medians(name: str, **wanted: object) -> dict[str, float]:
        rows = read_result(name)["rows"]
        return {row["method"]: row["median"] for row in rows if all(row[key] == value for key, value in wanted.items())}

    runs = read_result("paper.json")["runs"]["mnist"]
    one = {name: run["last"] for name in runs for run in list(runs[name].values())[:1]}
    three = medians("windows.json", part="3 hidden, 20 epochs")
    memory = medians("memory-scaling.json", part="MLP, against hidden layers", metric="activations and gradients, MiB", x=100)
    steps = medians("step-cpu.json", metric="steps/s", x=10)
    local = medians("local-mnist.json", part="mnist", x="last epoch")
    rows = (  # shown, then the names in: paper, windows, local, memory, step
        ("F3", "f3-default", "f3", "", "f3", "f3triton f3"),
        ("F3, windows", "f3-windows", "50x2 skip", "", "", ""),
        ("local errors", "", "", "local", "", ""),
        ("DFA", "dfa-default", "dfa", "", "dfa", "f3triton dfa"),
        ("backpropagation", "bp-default", "bp", "backprop", "bp", "f3triton bp"),
    )
    sources, forms = (one, three, local, memory, steps), (".2f", ".2f", ".2f", ".0f", ".0f")
    lines = [
        [shown, *(f"{found[name]:{form}}" if name else "" for name, found, form in zip(names, sources, forms, strict=True))]
        for shown, *names in rows
    ]
    header = ["", "MNIST, 1 hidden layer, error %", "3 hidden layers, error %", "3 with normalisation, error %"]
    header += ["activations and gradients, 100 layers, MiB", "steps/s, 10 layers"]
    files = ("paper.json", "windows.json", "local-mnist.json", "memory-scaling.json", "step-cpu.json")
    return f"{table(header, lines)}\n\nFrom left to right: {'; '.join(map(source, files))}"


def gpu_step_table() -> str:
    """Steps a second on a GPU, with what F3 in its fastest form is to the others."""
    content = read_result("step-gpu.json")
    lines = [[one["x"], one["method"], f"{one['median']:,.0f}", f"{one['f3_is_faster']:.2f}"] for one in content["rows"]]
    header = ["network", "", "steps/s", "f3triton f3 in one launch is this many times as fast"]
    return f"{table(header, lines)}\n\n{source('step-gpu.json')}; {content['settings']['note']}"


def as_compiled(timed: dict) -> tuple[str, str]:
    """The case and the tile of `bench.kernel_report` that a row of `bench.tiles` timed."""
    operation, rule = timed["peers"].split()[0].rstrip(","), timed["peers"].split()[-1].lower()
    small = timed["size"] == "50 x 784 -> 500"
    words = [operation, timed["size"].replace(" -> ", "x").replace(" x ", "x") + "x16", "fp32" if small else "bf16"]
    words += [rule] if operation == "update" else ["tanh", "float32"]
    blocks, warps, _, stages, _, slices, _ = timed["method"].split()
    cut = f" {slices} slices" if int(slices) > 1 else ""
    return " ".join([*words, *([] if small else ["roomy"])]), f"{blocks} {warps}w {stages}s{cut}"


def gpu_kernels_table() -> str:
    """Microseconds of each operation: by the tile that the tables choose, beside what its traffic and instructions allow; by
    torch, compiled, and of a product alone."""
    bounds = {(row["case"], row["tile"]): row.get("bound_us") for row in read_result("kernels-compiled.json")["rows"]}
    theirs = {(row["part"], row["x"], row["method"]): row["median"] for row in read_result("kernels-gpu.json")["rows"]}
    lines = []
    for one in filter(lambda row: row["chosen"], read_result("tiles-gpu.json")["rows"]):
        peers = [theirs.get((one["peers"], one["size"], name)) for name in ("torch", "torch.compile", "GEMM alone")]
        times = ["" if t is None else f"{t:.0f}" for t in peers]
        bound = bounds.get(as_compiled(one))
        allowed = ["", ""] if bound is None else [f"{bound:.1f}", f"{bound / one['median']:.2f}"]
        shares = [f"{one['share_of_bound']:.2f}", *allowed]
        lines.append([one["peers"], one["size"], f"{one['median']:.0f}", *shares, *times, one["method"]])
    header = ["", "rows x inputs -> outputs", "f3triton, us", "share of bound", "the launch's bound, us", "share of it"]
    header += ["torch", "torch.compile", "GEMM alone", "tile"]
    return f"{table(header, lines)}\n\n{source('tiles-gpu.json')}; the others: {source('kernels-gpu.json')}"


def pipeline_table() -> str:
    """Steps a second, the idle part and memory of a worker, at each batch size; and the machine's load."""
    name = "pipeline.json"
    content = read_result(name)
    found = {(row["method"], row["part"], row["metric"]): row["median"] for row in content["rows"]}
    parts, metrics = (list(dict.fromkeys(row[key] for row in content["rows"])) for key in ("part", "metric"))
    lines = []
    for method in dict.fromkeys(row["method"] for row in content["rows"]):
        cells = [found.get((method, part, metric)) for part in parts for metric in metrics]
        lines.append([method, *("" if cell is None else f"{cell:.{1 if cell < 100 else 0}f}" for cell in cells)])
    header = ["", *(f"{metric}, {part}" for part in parts for metric in metrics)]
    low, high = content["settings"]["load_average"]
    load = f"Load average of the machine's {content['settings']['cores']} cores before each run: {low} to {high}."
    return f"{table(header, lines)}\n\n{load}\n\n{source(name)}"


def transformers_table() -> str:
    """MiB of the methods, by the result's parts."""
    name = "huggingface.json"
    return f"{crossed(read_result(name)['rows'], 'part', 'MiB', ',.0f')}\n\n{source(name)}"


def moments_table() -> str:
    from .moments import show

    return f"{show(read_result('moments.json')['runs'])}\n\n{source('moments.json')}"


def claims_table(kind: str) -> str:
    from . import claims

    return claims.show(getattr(claims, kind)())


def times_table() -> str:
    """The seconds of `time_table`: a line for each method, a column for each network and number of cores."""
    name = "time-to-accuracy.json"
    rows = [row for row in read_result(name)["rows"] if row["metric"] == "seconds to the target"]
    rows = [{**row, "network": f"{row['network']}; {row['x']}"} for row in rows]
    return f"{crossed(rows, 'network', 'seconds to 2 % on MNIST, by hidden layers', '.1f')}\n\n{source(name)}"


def layers_table() -> str:
    """What was measured of `largest_table`."""
    name = "memory-scaling-largest.json"
    part = "largest MLP of width 512, batch 512, measured"
    return f"{by_x(name, part, 'hidden layers', '.0f', order=METHODS)}\n\n{source(name)}"


LOCAL_TASKS = ("mnist", "cifar10-short", "cifar10", "text", "vit-mnist", "vit-cifar10", "tried")
TABLES = {
    "good-for": lambda: claims_table("good"),
    "not-good-for": lambda: claims_table("not_good"),
    "times": times_table,
    "layers": layers_table,
    "moments": moments_table,
    "methods": methods_table,
    "transformers": transformers_table,
    "rates": rates_table,
    "pipeline": pipeline_table,
    "pipeline-simulated": simulated_table,
    "step-gpu": gpu_step_table,
    "kernels-gpu": gpu_kernels_table,
    "error-codecs": codecs_table,
    "error-store": store_table,
    "gpt": gpt_table,
    **{f"local-{task}": partial(local_table, task) for task in LOCAL_TASKS},
    "local-tried-choice": lambda: choice_table("tried"),
    "vit": vit_table,
    "mnist": lambda: paper_table("mnist"),
    "mnist-seeds": lambda: paper_table("mnist", "paper-seeds.json"),
    "wine-quality": lambda: paper_table("wine-quality", "paper-wine.json"),
    "wine-quality-classes": lambda: paper_table("wine-quality-classes", "paper-wine.json"),
    "cifar10": lambda: paper_table("cifar10", "paper-cifar10.json"),
    "kddcup99": lambda: paper_table("kddcup99", "paper-tables.json"),
    "census-income-kdd": lambda: paper_table("census-income-kdd", "paper-tables.json"),
    "step": step_table,
    "memory": lambda: memory_table("MLP, against hidden layers"),
    "memory-transformer": lambda: memory_table("transformer, against blocks"),
    "memory-largest": largest_table,
    "memory-bytes": bytes_table,
    "memory-budget": budget_table,
    "windows-1": lambda: windows_table("1 hidden, 20 epochs"),
    "windows-3": lambda: windows_table("3 hidden, 20 epochs"),
    "windows-10": lambda: windows_table("10 hidden, 20 epochs"),
    "kernels-compiled": compiled_table,
    "time-to-accuracy": time_table,
    "accuracy-memory": accuracy_memory_table,
    "depth": depth_table,
    "alignment": alignment_table,
}
BLOCK = re.compile(r"<!-- table: ([\w-]+) -->.*?<!-- end -->", re.DOTALL)


def filled(path: Path) -> str:
    """A document with every marked block replaced by its table, links made for where the document is."""
    up = os.path.relpath(RESULTS.parent, path.parent)

    def block(found: re.Match) -> str:
        if found[1] not in TABLES:
            raise SystemExit(f"{path.name} asks for a table {found[1]!r}; there are: {', '.join(TABLES)}")
        made = TABLES[found[1]]().replace("](bench/", f"]({up}/")
        return f"<!-- table: {found[1]} -->\n{made}\n<!-- end -->"

    return BLOCK.sub(block, path.read_text(encoding="utf-8"))


def draw() -> None:
    """Two panels: memory against depth, and accuracy on MNIST."""
    memory = [row for row in read_result("memory-scaling.json")["rows"] if row["part"] == "MLP, against hidden layers"]
    runs = read_result("paper.json")["runs"]["mnist"]
    figure = new_figure(11, 3.8, layout="constrained")
    left, right = figure.subplots(1, 2)
    blue, red, _, _, orange, grey = COLOURS
    ends = []
    for method, label, colour, dash in (
        ("bp", "backprop", grey, "-"),
        ("dfa", "DFA", red, "--"),  # lies on backpropagation
        ("bp-checkpoint", "backprop, checkpointing", grey, ":"),
        ("bp-checkpoint-in-backward", "backprop, checkpointing, optimizer in backward", orange, ":"),
        ("f3", "F3", blue, "-"),
    ):
        line = [(row["x"], row["median"]) for row in memory if row["method"] == method and row["metric"].startswith("act")]
        left.plot(*zip(*line, strict=True), dash, marker="o", ms=4, color=colour, label=label)
        ends.append((*line[-1], colour))
    left.set(title="Activations and gradients of a step", xlabel="hidden layers", ylabel="MiB", ylim=0)
    left.legend(frameon=False, fontsize=8)
    label_ends(left, ends)
    bars = {
        "backprop": ("bp-default", grey),
        "DFA": ("dfa-default", red),
        "F3, windows": ("f3-windows", blue),
        "F3, falling learning rate": ("f3-default", blue),
        "F3, the best of the paper's four": ("f3-error-masked-trinomial", blue),
        "DRTP": ("drtp-trinomial", grey),
        "last layer only": ("last-layer", grey),
    }
    bars = {label: bar for label, bar in bars.items() if bar[0] in runs}
    means = [sum(run["last"] for run in runs[name].values()) / len(runs[name]) for name, _ in bars.values()]
    drawn = right.barh(list(bars), means, color=[colour for _, colour in bars.values()])
    right.bar_label(drawn, fmt="%.2f", padding=3)
    right.invert_yaxis()
    right.set(title="MNIST, 784-500-10, 100 epochs", xlabel="test error in percent", xlim=(0, max(means) * 1.12))
    for axes, grid in ((left, "y"), (right, "x")):
        plain_axes(axes, grid)
    PICTURE.parent.mkdir(exist_ok=True)
    save(figure, PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    options = parser.parse_args()
    made = {path: filled(path) for path in documents()}
    changed = [path for path, text in made.items() if text != path.read_text(encoding="utf-8")]
    if options.check:
        sys.exit(f"{changed[0].name}: a table is not that of its results; run python -m bench.report" if changed else 0)
    for path in changed:
        path.write_text(made[path], encoding="utf-8")
    if not can_draw():
        sys.exit("bench.report: tables are written; error: the pictures need matplotlib (pip install matplotlib)")
    draw()
    accuracy_memory.draw(AGAINST_MEMORY)


if __name__ == "__main__":
    main()
