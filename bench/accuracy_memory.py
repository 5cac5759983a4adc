"""Accuracy against memory of training: errors of `bench.local`, and what each method keeps, by the arithmetic of `--dry-run`.

Nothing is measured here: `bench.report` makes a table and a picture of the committed results of `bench.local`. Memory is that
of weights, moments, feedback, error rows (float32, in memory), activations and gradients at the task's batch; what a run holds
beside them is alike for all. Backpropagation with checkpointing has the errors of backpropagation, and keeps the inputs of
segments of stages and the activations of the largest of them, with the number of segments that needs least (Chen et al. 2016,
arXiv 1604.06174).
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

import f3triton as f3
from f3triton.run.budget import Budget, estimate
from f3triton.run.curves import COLOURS, new_figure, plain_axes, save, scale_values
from f3triton.run.dry_run import budget_by

from .common import read_result, table, where
from .local import OWN, grouped, task_of

MIB = 2**20
MARKERS = "os^Dv*P"
# What a network is made for: features or shape of a sample, outputs, predictions of a sample, samples.
DATA = {
    "mnist": SimpleNamespace(in_features=784, shape=(1, 28, 28), outputs=10, positions=1, samples=60_000),
    "cifar10-short": (images := SimpleNamespace(in_features=3072, shape=(3, 32, 32), outputs=10, positions=1, samples=50_000)),
    "cifar10": images,
    "text": SimpleNamespace(in_features=64, shape=(64,), outputs=65, positions=64, samples=9600),
}
TITLES = {
    "mnist": "MNIST, 784-500x3-10",
    "cifar10-short": "CIFAR-10, convolutional, 5 epochs",
    "cifar10": "CIFAR-10, convolutional, 20 epochs",
    "text": "Tiny Shakespeare, 4 blocks",
}
CHECKPOINTED = "backprop, checkpointing"
PARTS = {"weights and moments": ("weights", "moments"), "feedback and errors": ("feedback", "errors")}
PARTS["activations and gradients"] = ("activations", "gradients")


def budget(name: str, method: str) -> Budget:
    """What a method keeps in a task's network."""
    task, data = task_of(name), DATA[name]
    options = task.methods["backprop" if method == CHECKPOINTED else method]
    settings = {key: value for key, value in options.items() if key not in OWN}
    trainer = f3.Trainer(task.network(data, options), task.loss, f3.Adam(), batch_size=task.batch, device="cpu", **settings)
    network = trainer.model.to("meta")
    kind = torch.int64 if name == "text" else torch.float32
    x = torch.zeros(task.batch, *(data.shape if name == "text" else (data.in_features,)), dtype=kind, device="meta")
    kept = trainer.settings.resolved_signal is not None and trainer.settings.resolved_signal.delayed
    rows = (options.get("window") or data.samples) * data.positions if kept else 0
    found = budget_by(trainer.settings, network, x, data.outputs, data.positions, error_bytes=rows * data.outputs * 4)
    if method != CHECKPOINTED:
        return found
    return replace(found, memory=found.memory | {"activations": checkpointed(trainer, network, x)})


def checkpointed(trainer: f3.Trainer, network: f3.Sequential, x: torch.Tensor) -> int:
    """Bytes of activations where segments of stages are computed again on the way back, with the best number of them."""
    inputs = [x]
    with torch.no_grad():
        for stage in network.stages:
            inputs.append(stage(inputs[-1]))
    rule, types, count = trainer.settings.rule, trainer.settings.types, len(network)

    def needed(segments: int) -> int:
        starts = [count * i // segments for i in range(segments + 1)]
        own = [
            estimate(f3.Sequential(*network.stages[start:end]), inputs[start], rule, None, types).memory["activations"]
            for start, end in itertools.pairwise(starts)
        ]
        return sum(inputs[start].nbytes for start in starts[1:-1]) + max(own)

    return min(needed(segments) for segments in range(1, count + 1))


@cache
def figures() -> dict[str, dict[str, tuple[float, int, dict[str, float]]]]:
    """By task and method: mean error over the seeds, their number, and MiB by what they are for."""
    found: dict[str, dict[str, tuple[float, int, dict[str, float]]]] = {}
    for name in DATA:
        groups = grouped(read_result(f"local-{name}.json")["runs"])
        for method in [*(m for m in task_of(name).methods if m in groups), CHECKPOINTED]:
            if "local_positions" in task_of(name).methods.get(method, {}):  # as many bytes and bits as few candidates have
                continue
            scores = [one["score"] for one in groups["backprop" if method == CHECKPOINTED else method]]
            memory = budget(name, method).memory
            parts = {part: sum(memory[key] for key in keys) / MIB for part, keys in PARTS.items()}
            found.setdefault(name, {})[method] = statistics.mean(scores), len(scores), parts
    return found


def show() -> str:
    """The tables, the method that keeps least first."""
    tables = []
    for name, methods in figures().items():
        lines = [
            [method, f"{score:.2f}", seeds, *(f"{mib:.1f}" for mib in parts.values()), f"{sum(parts.values()):.1f}"]
            for method, (score, seeds, parts) in sorted(methods.items(), key=lambda one: sum(one[1][2].values()))
        ]
        header = [f"{TITLES[name]}: {task_of(name).metric}", "", "seeds", *(f"{part}, MiB" for part in PARTS), "sum, MiB"]
        tables.append(table(header, lines))
    return "\n\n".join(tables)


def draw(path: Path) -> None:
    """A panel for each task: error against memory, a point for each method, F3 in blue and local errors in red."""
    found = figures()
    figure = new_figure(4.6 * len(found), 5.2, layout="constrained")
    for axes, (name, methods) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        seen: dict[str, int] = {}
        for method, (score, _, parts) in methods.items():
            colour = COLOURS[0] if method.startswith("F3") else COLOURS[1] if method.startswith("local") else COLOURS[-1]
            seen[colour] = place = seen.get(colour, -1) + 1
            axes.plot(sum(parts.values()), score, MARKERS[place], color=colour, ms=7, alpha=0.85, label=method)
        axes.set(title=TITLES[name], xlabel="memory of training, MiB", ylabel=task_of(name).metric)
        axes.margins(0.1)
        scale_values(axes, "y", [score for score, *_ in methods.values()], log=True)
        axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        plain_axes(axes, "both")
    origin = where(read_result("local-mnist.json"))
    figure.suptitle(f"errors: bench.local, {origin}; memory: by arithmetic", fontsize=9, color="#555555")
    save(figure, path)
