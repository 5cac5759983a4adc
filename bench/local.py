"""Errors at the stage itself beside backpropagation, DFA and F3, every method at its own best learning rate of three.

    python -m bench.local mnist --data ylecun/mnist
    python -m bench.local cifar10 --data uoft-cs/cifar10
    python -m bench.local vit-mnist --data ylecun/mnist
    python -m bench.local vit-cifar10 --data uoft-cs/cifar10
    python -m bench.local text --data path/to/tiny-shakespeare/input.txt
    python -m bench.local tried --data uoft-cs/cifar10     what others propose, and this library has no option for

Networks, order and number of visits are the same for all methods of a task (`TASKS`), but for windows, whose order is their
own and whose epochs are rounded up to whole visits; optimizer Adam with cosine decay. A learning rate is chosen in runs (for
images shorter ones) on a validation split, the last sixth of the training samples (after a shuffle, but for text), with one
seed; the runs that are shown train on all training samples, with other seeds. `exit` is what a
stage says by itself, `mean` the mean of all. A run that is in the result file already is not repeated, so the command can be
stopped and started again, and `--only` and `--seeds` can be given one after another; `--jobs N` makes N runs side by side.
`--quick` is a small grid on the bundled digits and on this repository's README.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

import f3triton as f3
from f3triton.data.text import TextDataset
from f3triton.run.dry_run import budget_by
from f3triton.run.tally import Diverged

from .common import RESULTS, needs_gpu, result, row, runs_in, save, table
from .local_tried import changed

Settings = dict[str, object]
LOCAL: dict[str, Settings] = {
    "local": {"method": "local"},
    "local, reach 2": {"method": "local", "reach": 2},
}
OTHERS: dict[str, Settings] = {
    "backprop": {"method": "bp"},
    "DFA": {"method": "dfa"},
    "F3 in windows": {"method": "f3", "window": 500, "visits": 2},
}
SHUFFLE = 7  # seed of the validation split


@dataclass(frozen=True)
class Task:
    """A data set, a network and what learns it."""

    network: Callable[[f3.Dataset, Settings], f3.Sequential]  # of a training set and a method's own options
    methods: dict[str, Settings]
    rates: tuple[float, ...]
    batch: int
    epochs: int
    choose_epochs: int  # of the runs that choose a learning rate
    loss: str = "bce"
    images: int | None = None  # of the training images, all by default
    metric: str = "test error, %"

    def score(self, record: dict) -> float:
        """The figure of the task in an evaluation."""
        return record["test_error"] if "test_error" in record else record["test_loss"] / math.log(2)


def mlp(train: f3.Dataset, options: Settings) -> f3.Sequential:
    """784-500x3-10, relu and a layer normalisation without parameters for all methods alike."""
    return f3.models.MLP([train.in_features, *options.get("hidden", [500] * 3), train.outputs], "relu", norm="layer")


def gpt(train: TextDataset, options: Settings) -> f3.Sequential:
    """Blocks of 64 features and 4 heads."""
    return f3.models.GPT(train.outputs, train.positions, options.get("blocks", 4), heads=4, dim=options.get("dim", 64))


def convnet(train: f3.Dataset, options: Settings) -> f3.Sequential:
    """Four convolutions with batch normalisation and a hidden layer, relu; 0.9 million parameters."""
    return f3.models.ConvNet(train.shape, train.outputs, [32, 64, 128, 256], 3, [512], "relu", norm="batch")


def small_convnet(train: f3.Dataset, options: Settings) -> f3.Sequential:
    """Three convolutions with batch normalisation and a hidden layer, relu."""
    return f3.models.ConvNet(train.shape, train.outputs, [16, 32, 64], 3, [256], "relu", norm="batch")


def vit(train: f3.Dataset, options: Settings) -> f3.Sequential:
    """The authors' vision transformer (arXiv 2304.13372): 4 blocks, 16 tokens of 32."""
    channels, size, _ = train.shape
    sizes = {"depth": 4, "heads": 8, "dim": 32, "head_dim": 64, "mlp_width": 128}
    return f3.models.ViT(size, channels, train.outputs, size // 4, **sizes)


VIT = {**LOCAL, "local, heads with a block": {"method": "local", "local_head_depth": 1}, **OTHERS}
TASKS = {
    "mnist": Task(
        mlp,
        {**LOCAL, "local, random feedback": {"method": "local", "local_feedback": "random"}, **OTHERS, "F3": {"method": "f3"}},
        (5e-4, 1e-3, 2e-3),
        batch=100,
        epochs=20,
        choose_epochs=6,
    ),
    "cifar10": Task(
        convnet,
        {name: its | {"augment": "crop-flip"} for name, its in (LOCAL | OTHERS).items()},
        (1e-3, 2e-3, 4e-3),
        batch=100,
        epochs=20,
        choose_epochs=3,
    ),
    "vit-mnist": Task(vit, VIT, (5e-4, 1e-3, 3e-3), 100, 5, choose_epochs=2, loss="cross-entropy", images=10_000),
    "vit-cifar10": Task(vit, VIT, (5e-4, 1e-3, 3e-3), 100, 5, choose_epochs=2, loss="cross-entropy", images=10_000),
    "tried": Task(
        small_convnet,
        {
            "backprop": {"method": "bp"},
            **LOCAL,
            "heads with a stage": {"method": "local", "local_head_depth": 1},
            "heads with a stage, reach 2": {"method": "local", "local_head_depth": 1, "reach": 2},
            "similarity matching": {"method": "local", "idea": "similarity"},
            "reconstruction": {"method": "local", "idea": "reconstruction"},
            "quieter early stages, reach 2": {"method": "local", "reach": 2, "idea": "quieter"},
            "early stages that fade, reach 2": {"method": "local", "reach": 2, "idea": "fading"},
            "read through the next stage only": {"method": "local", "reach": 2, "idea": "following"},
            "heads with one trunk": {"method": "local", "idea": "one trunk"},
            "heads with one trunk, reach 2": {"method": "local", "reach": 2, "idea": "one trunk"},
            "blended with the delayed error": {"method": "local", "idea": "blend"},
        },
        (1e-3, 2e-3, 4e-3),
        batch=100,
        epochs=5,
        choose_epochs=2,
        images=10_000,
    ),
    "text": Task(
        gpt,
        {
            "backprop": {"method": "bp"},
            "local": {"method": "local"},
            "local, read by the last block": {"method": "local", "local_head_depth": 1},
            "local, read by the last 2 blocks": {"method": "local", "local_head_depth": 2},
            "local, heads with a block": {"method": "local", "local_head": "own", "local_head_depth": 1},
            "local, heads with a block, reach 2": {
                "method": "local",
                "local_head": "own",
                "local_head_depth": 1,
                "reach": 2,
            },
            "local, heads with one block for all, reach 2": {
                "method": "local",
                "local_head": "own",
                "local_head_depth": 1,
                "reach": 2,
                "idea": "one block",
            },
            "local, read by the last block, early blocks fade, reach 2": {
                "method": "local",
                "local_head_depth": 1,
                "reach": 2,
                "idea": "fading",
            },
            "local, read by the last block, reach 2": {"method": "local", "local_head_depth": 1, "reach": 2},
            "local, reach 2": {"method": "local", "reach": 2},
            "local, reach 3": {"method": "local", "reach": 3},
            "backprop, 1 block": {"method": "bp", "blocks": 1},
            "backprop, 2 blocks": {"method": "bp", "blocks": 2},
            "local, a tenth of the positions": {"method": "local", "local_positions": 0.1},
            "local, 16 candidates": {"method": "local", "local_candidates": 16},
            "DFA": {"method": "dfa"},
            "F3 in windows": {"method": "f3", "window": 64, "visits": 5},
            "F3 in windows of 640": {"method": "f3", "window": 640, "visits": 5},
        },
        (3e-3, 6e-3, 1.2e-2),
        batch=32,
        epochs=5,
        choose_epochs=5,
        loss="cross-entropy",
        metric="test bits a character",
    ),
}


@dataclass(frozen=True)
class Place:
    """Where runs are made: on which data, device and number of threads."""

    data: str | None
    device: str = "cpu"
    threads: int = 1


QUICK = ("mnist", "text")
OWN = {"hidden", "blocks", "dim", "idea"}  # options of a method that are not the trainer's: the network's, and what is tried
TEXT_WINDOWS = 9600  # of the training text


def load(name: str, data: str | None, quick: bool) -> tuple[f3.Dataset, f3.Dataset]:
    """(training set, test set) of a task."""
    if name == "text":
        if quick:
            readme = Path(__file__).resolve().parents[1] / "README.md"
            return f3.load_text(readme, context=16, tokenizer="bytes", max_train_samples=96)
        return f3.load_text(data, max_train_samples=TEXT_WINDOWS)
    return f3.load_dataset("digits" if quick else data, max_train_samples=None if quick else TASKS[name].images)


def split(train: f3.Dataset) -> tuple[f3.Dataset, f3.Dataset]:
    """The training samples in two parts: to train on, and to choose by."""
    at = len(train) * 5 // 6
    if isinstance(train, TextDataset):
        at *= train.positions
        return tuple(TextDataset(train.name, part, train.preprocessing) for part in (train.stream[: at + 1], train.stream[at:]))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SHUFFLE))
    parts = order[:at], order[at:]
    return tuple(f3.Dataset(train.name, train.inputs[part], train.targets[part], train.preprocessing) for part in parts)


@cache
def loaded(name: str, data: str | None, choosing: bool) -> tuple[f3.Dataset, f3.Dataset]:
    """The data of a task, or those to choose a learning rate by; read once a process. `data`: None for the bundled ones."""
    found = load(name, data, data is None)
    return split(found[0]) if choosing else found


def costs(trainer: f3.Trainer, train: f3.Dataset) -> dict[str, int]:
    """What the training needs by arithmetic: parameters with those of heads, and for a step FLOPs and bytes of activations."""
    network = copy.deepcopy(trainer.model).to("meta")
    x = train.fetch(torch.zeros(trainer.batch_size, dtype=torch.int64), torch.float32).to("meta")
    found = budget_by(trainer.settings, network, x, train.outputs, train.positions)
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "flops": found.flops,
        "activations": found.memory["activations"],
    }


def run(name: str, task: Task, place: Place, choosing: bool, epochs: int, seed: int, rate: float, method: Settings) -> dict:
    """One training run: the task's figure on the second data set, that of every exit, and what it cost."""
    torch.set_num_threads(place.threads)
    train, test = loaded(name, place.data, choosing)
    visits = method.get("visits", 1)
    epochs = math.ceil(epochs / visits) * visits
    torch.manual_seed(seed)
    model = task.network(train, method)
    settings = {name: value for name, value in method.items() if name not in OWN}
    trainer = f3.Trainer(model, task.loss, f3.Adam(lr=rate), batch_size=task.batch, seed=seed, device=place.device, **settings)
    try:
        with changed(method.get("idea"), train, model) as seen:
            found = trainer.fit(seen, epochs, test, eval_every=epochs)
    except Diverged:
        return {"score": None, "rate": rate}
    exits = {}
    if model.exits > 1:
        for place in (*range(1, model.exits + 1), "mean"):
            model.exit = place
            exits[str(place)] = round(task.score(trainer.evaluate(test)), 4)
        model.exit = None
    return {
        "score": round(task.score(found.history[-1]), 4),
        "exits": exits,
        "rate": rate,
        "steps_per_second": round(found.steps / found.learning_seconds, 2),
        **costs(trainer, train),
    }


def task_of(name: str) -> Task:
    """The task of a result file's name, `local-NAME.json`; a short one differs in its epochs."""
    return TASKS[name.removesuffix("-short")]


def grouped(runs: dict[str, dict]) -> dict[str, list[dict]]:
    """The runs that are shown, by method."""
    groups: dict[str, list[dict]] = {}
    for name, found in runs.items():
        if not name.startswith("choice"):
            groups.setdefault(name.split(", seed ")[0], []).append(found)
    return groups


def rows_of(name: str, metric: str, runs: dict[str, dict]) -> list[dict]:
    """Rows: the figure of every method over its seeds, of the exits, and of the choice of learning rates."""
    groups, rows = grouped(runs), []
    for method, group in groups.items():
        rows.append(row(method, "last epoch", metric, [one["score"] for one in group], part=name))
    for method, group in groups.items():
        for place in group[0]["exits"]:
            if place != "mean":
                scores = [one["exits"][place] for one in group]
                part = f"{name}, by the stage that answers"
                rows.append(row(method, int(place), metric, scores, x_name="exit", part=part))
    for choice, found in runs.items():
        if choice.startswith("choice") and found["score"] is not None:
            method, rate = choice.removeprefix("choice, ").split(", lr ")
            part = f"{name}, the choice of a learning rate"
            rows.append(row(method, float(rate), "on the validation split", found["score"], x_name="learning rate", part=part))
    return rows


def show(metric: str, runs: dict[str, dict]) -> str:
    """The table of the methods: mean over seeds and standard deviation, other answers, and costs by arithmetic."""
    lines = []
    for method, group in grouped(runs).items():
        first, scores = group[0], torch.tensor([one["score"] for one in group])
        exits = {place: sum(one["exits"][place] for one in group) / len(group) for place in first["exits"]}
        mean, best = exits.pop("mean", None), min(exits.values(), default=None)
        lines.append(
            [method, f"{scores.mean():.3f}" + (f" ± {scores.std():.3f}" if len(group) > 1 else ""),
             "" if mean is None else f"{mean:.3f}", "" if best is None else f"{best:.3f}", len(group), f"{first['rate']:g}",
             f"{first['parameters']:,}", f"{first['flops'] / 1e9:.2f}", f"{first['activations'] / 2**20:.1f}"]
        )  # fmt: skip
    figures = ["the network's output", "mean of the heads", "best exit", "seeds", "learning rate"]
    return table([metric, *figures, "parameters", "GFLOPs a step", "activations, MiB"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=tuple(TASKS))
    parser.add_argument("--data", metavar="DATASET", help="a hub name or a folder; for text a file")
    parser.add_argument("--quick", action="store_true", help="all tasks, small, on bundled data")
    parser.add_argument("--epochs", type=int, help="default: the task's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", help="to choose from; default: the task's; of one nothing is chosen")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="some of the task's methods")
    parser.add_argument("--choose-epochs", type=int, help="of the runs that choose a learning rate; default: the task's")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="default: bench/results/local-TASK.json, local-quick.json with --quick")
    options = parser.parse_args()
    if options.quick == (options.task is not None) or (options.task is not None and options.data is None):
        parser.error("give a task with --data DATASET, or --quick")
    if options.device == "cuda":
        needs_gpu("bench.local")
    output = options.output or RESULTS / f"local-{options.task or 'quick'}.json"
    runs = runs_in(output)
    rows: list[dict] = []
    for name in QUICK if options.quick else [options.task]:
        task = small(TASKS[name]) if options.quick else TASKS[name]
        lengths = options.epochs or task.epochs, options.choose_epochs or task.choose_epochs
        task = replace(task, epochs=lengths[0], choose_epochs=lengths[1])
        for wrong in set(options.only or ()) - set(task.methods):
            parser.error(f"method {wrong!r} is not one of {', '.join(map(repr, task.methods))}")
        measure(name, task, options, output, {} if options.quick else runs, rows)


def small(task: Task) -> Task:
    """A task of seconds."""
    method = {
        name: {**its, **({"hidden": [32] * 3} if task.network is mlp else {"dim": 16})} for name, its in task.methods.items()
    }
    return replace(task, methods=dict(list(method.items())[:3]), rates=task.rates[:2], epochs=2, choose_epochs=1)


def measure(name: str, task: Task, options: argparse.Namespace, output: Path, runs: dict[str, dict], rows: list[dict]) -> None:
    """All runs of a task; `runs` and the file grow with each, `rows` are those of the tasks before."""
    place = Place(None if options.quick else options.data, options.device, options.threads)
    chosen = {"rates": task.rates, "batch": task.batch, "epochs": task.epochs, "choose_epochs": task.choose_epochs}
    setting = {**chosen, "threads": options.threads}
    methods = {method: task.methods[method] for method in options.only or task.methods}

    def made(planned: dict[str, tuple]) -> None:
        """The runs that are planned, by title: (choosing, epochs, seed, rate, method)."""
        left = {title: (name, task, place, *how) for title, how in planned.items() if title not in runs}
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            started = {pool.submit(run, *how): title for title, how in left.items()}
            for done in as_completed(started):
                title = started[done]
                runs[title] = done.result()
                content = [*rows, *rows_of(name, task.metric, runs)], setting, torch.device(options.device)
                save(output, result("local", *content, runs=runs))
                print(f"{title}: {runs[title]['score'] or 'diverged'}", flush=True)

    def title(method: str, rate: float) -> str:
        return f"choice, {method}, lr {rate:g}"

    rates = options.rates or task.rates
    choices = itertools.product(methods.items(), rates if len(rates) > 1 else ())
    made({title(method, rate): (True, task.choose_epochs, 0, rate, its) for (method, its), rate in choices})
    scores = {name: {rate: runs.get(title(name, rate), {}).get("score") or math.inf for rate in rates} for name in methods}
    best = {name: min(its, key=its.get) for name, its in scores.items()}
    shown = itertools.product(methods.items(), [1] if options.quick else options.seeds)
    made({f"{method}, seed {seed}": (False, task.epochs, seed, best[method], its) for (method, its), seed in shown})
    rows += rows_of(name, task.metric, runs)
    print(f"\n{show(task.metric, runs)}\n")


if __name__ == "__main__":
    main()
