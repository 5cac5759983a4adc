"""The paper's experiments by name, several seeds, in the authors' setting and in this library's default one.

    python -m bench.paper --list
    python -m bench.paper --data mnist=ylecun/mnist wine-quality=path/to/wine-quality --seeds 1 2 3
    python -m bench.paper --quick                        two runs of a few epochs on the bundled digits

The experiments are the recipes of `f3triton/recipes`, which `train.py --recipe` takes too. A run that is in the result file
already is not repeated, so the command can be stopped and started again; `--only` picks runs by name. `published` figures are
those of the authors' own code (Helmholtz-AI-Energy/f3, unchanged, seed 1) in the same setting.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from f3triton import Trainer
from f3triton.base.exceptions import InputError
from f3triton.data.columns import listed
from f3triton.recipes import Recipe, read_recipe, recipe_names
from f3triton.run.options import make_settings, parse
from f3triton.run.parts import load_data, make_network, network_of

from .common import RESULTS, result, row, runs_in, save, table

WATCHED = (1, 2, 5, 10, 20, 50, 100, 200)


def run(recipe: str, name: str, seed: int, source: str, data: dict, extra: list[str]) -> dict:
    """One training run as `train.py --recipe` does it; its figures by epoch. `data` keeps what was loaded."""
    arguments = ["--recipe", f"{recipe}/{name}", "--dataset", source, *extra]
    options = parse([*arguments, "--seed", str(seed)])
    key = options.image, options.target, options.task, options.features
    if key not in data:  # the test split, where there is none, is the same for all seeds
        data[key] = load_data(parse([*arguments, "--seed", "1"]))
    train_set, test_set = data[key]
    trainer = Trainer(make_network(options, network_of(options, train_set)), settings=make_settings(options))
    found = trainer.fit(train_set, options.epochs, test_set)
    figure = "test_error" if train_set.task == "classification" else "test_mse"
    values = [record[figure] for record in found.history]
    return {
        "metric": "test error, %" if figure == "test_error" else "test MSE",
        "best": round(min(values), 4),
        "last": round(values[-1], 4),
        "by_epoch": {str(epoch): round(values[epoch - 1], 4) for epoch in WATCHED if epoch <= len(values)},
        "steps": found.steps,
        "steps_per_second": round(found.steps / found.learning_seconds, 1),
    }


def described(recipe: Recipe) -> str:
    """What the network gets of a recipe's data, and what it is to predict."""
    target = recipe.options.get("target", "label")
    means = {name: f"{name}, the mean of {', '.join(parts)}" for name, parts in recipe.data.get("mean", {}).items()}
    parts = {part for group in recipe.data.get("mean", {}).values() for part in group}
    inputs = {name: kind for name, kind in recipe.schema.items() if name != target and name not in parts}
    left = [name for name in recipe.data.get("names", ()) if name not in recipe.schema]
    count = {kind: sum(value.startswith(kind) for value in inputs.values()) for kind in ("integer", "number", "word")}
    table = f"{count['integer'] + count['number']} columns of numbers and {count['word']} of words"
    seen = next((kind for kind in inputs.values() if kind.startswith("image")), table)
    return f"{seen}{f', without {listed(left)}' if left else ''}; target {means.get(target, target)}"


def over_seeds(runs: dict[str, dict], figure: str) -> tuple[float, float, int]:
    """(mean, standard deviation, number) of a figure over the seeds of one experiment."""
    values = [run[figure] for run in runs.values()]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values)


def show(recipe: str, results: dict[str, dict[str, dict]], whole: bool = True) -> str:
    """Ours beside the published figures, best and last epoch: mean, and standard deviation over the seeds. Runs that are not as
    long as those (`whole`) stand alone."""
    known = read_recipe(recipe)

    def ours(runs: dict[str, dict], figure: str) -> str:
        mean, deviation, seeds = over_seeds(runs, figure)
        digits = 2 if mean > 1 else 4
        return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if seeds > 1 else "")

    def theirs(name: str, figure: str) -> str:
        value = known.published.get(name, {}).get(figure)
        return "" if value is None else f"{value:.2f}" if value > 1 else f"{value:.4f}"

    lines = []
    for name in known.runs:
        if name in results:
            figures = [
                shown for figure in ("best", "last") for shown in (*[theirs(name, figure)] * whole, ours(results[name], figure))
            ]
            lines.append([name, len(results[name]), *figures])
    header = [f"{whose}{figure}" for figure in ("best", "last") for whose in (*["authors, "] * whole, "ours, " * whole)]
    return table(["run", "seeds", *header], lines)


def rows_of(runs: dict[str, dict[str, dict[str, dict]]]) -> list[dict]:
    """Last and best figures as bars, and the curves."""
    rows = []
    for recipe, experiments in runs.items():
        for name, seeds in experiments.items():
            metric = next(iter(seeds.values()))["metric"]
            rows.append(row(name, "last epoch", metric, [run["last"] for run in seeds.values()], part=recipe))
        for name, seeds in experiments.items():
            metric = next(iter(seeds.values()))["metric"]
            for epoch in next(iter(seeds.values()))["by_epoch"]:
                values = [run["by_epoch"][epoch] for run in seeds.values() if epoch in run["by_epoch"]]
                rows.append(row(name, int(epoch), metric, values, x_name="epoch", part=f"{recipe}, over training", scale="log"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="RECIPE=DATASET", help="recipes to run, and where their data is"
    )
    parser.add_argument("--only", nargs="+", metavar="RUN", help="these runs only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--list", action="store_true", help="name the experiments and stop")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="default: bench/results/paper.json; with --quick, paper-quick.json")
    options = parser.parse_args()
    if options.list:
        for name in recipe_names():
            recipe = read_recipe(name)
            print(f"{name}: {recipe.title}\n  data: {recipe.data.get('dataset') or recipe.data['get']}")
            print(f"  gets: {described(recipe)}")
            print("\n".join(f"  {name}/{run}" for run in recipe.runs))
        return
    torch.set_num_threads(options.threads)
    output = options.output or RESULTS / ("paper-quick.json" if options.quick else "paper.json")
    extra = [] if options.epochs is None else ["--epochs", str(options.epochs)]
    settings = {"threads": options.threads} | ({} if options.epochs is None else {"epochs": options.epochs})
    if options.quick:
        options.data, options.only, extra = ["mnist=digits"], ["bp", "f3-default"], ["--epochs", "10", "--hidden", "100"]
    runs = runs_in(output)
    try:
        for name, _, source in (item.partition("=") for item in options.data):
            data: dict = {}
            for experiment in read_recipe(name).runs:
                if options.only and experiment not in options.only:
                    continue
                for seed in options.seeds:
                    done = runs.setdefault(name, {}).setdefault(experiment, {})
                    if str(seed) not in done:
                        done[str(seed)] = found = run(name, experiment, seed, source, data, extra)
                        print(f"{name}/{experiment} seed {seed}: best {found['best']}, last {found['last']}", flush=True)
                        save(output, result("paper", rows_of(runs), settings, runs=runs))
    except InputError as error:
        parser.error(str(error))
    for name, results in runs.items():
        metric = next(iter(next(iter(results.values())).values()))["metric"]
        print(f"\n{name}: {metric}\n\n{show(name, results, whole=options.epochs is None)}")


if __name__ == "__main__":
    main()
