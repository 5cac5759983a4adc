"""What F3 is good for and what it is not: the sentences of docs/methods.md with their figures, from `bench/results/`.

Nothing is measured here. `bench.report` writes the two tables, and a test fails where a sentence does not hold in the results.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .common import read_result, table

CHECKPOINTED = "backprop, checkpointing"
NETWORKS = ("1 tanh", "1 ReLU, layer norm", "3 ReLU, layer norm")  # of the time to 2 percent


@dataclass(frozen=True)
class Claim:
    """A sentence, the figures that it rests on, whether they bear it out, and the result that has them."""

    text: str
    figures: str
    holds: bool
    file: str


def medians(file: str, **wanted: object) -> dict[str, float]:
    """The figures of a result by method, of those rows that have all of `wanted`."""
    rows = read_result(file)["rows"]
    return {row["method"]: row["median"] for row in rows if all(row[key] == value for key, value in wanted.items())}


def means(task: str) -> dict[str, float]:
    """The error of `bench.local` by method: the mean over the seeds that are shown."""
    from .local import grouped

    groups = grouped(read_result(f"local-{task}.json")["runs"])
    return {method: statistics.mean(one["score"] for one in group) for method, group in groups.items()}


def memory_of(task: str) -> dict[str, float]:
    """MiB of training by method: weights, moments, feedback, errors, activations and gradients, by arithmetic."""
    from .accuracy_memory import figures

    return {method: sum(parts.values()) for method, (_, _, parts) in figures()[task].items()}


def last(file: str, recipe: str) -> dict[str, float]:
    """The last epoch of a recipe's runs, mean over the seeds."""
    runs = read_result(file)["runs"][recipe]
    return {name: statistics.mean(run["last"] for run in seeds.values()) for name, seeds in runs.items()}


def seconds(network: str, cores: str = "one core") -> dict[str, float]:
    """Of the fastest that got to 2 percent on MNIST: F3 in any form, local errors, backpropagation; drawn by error or not."""
    found = medians("time-to-accuracy.json", metric="seconds to the target", network=network, x=cores)
    kinds = {kind: [time for method, time in found.items() if method.startswith(kind)] for kind in ("f3", "local", "bp")}
    return {kind: min(times) for kind, times in kinds.items() if times}


def good() -> list[Claim]:
    """What it is good for."""
    memory, steps, gpu = "memory-scaling.json", "step-cpu.json", "step-gpu.json"
    deep, shallow = (medians(memory, part="MLP, against hidden layers", metric="activations and gradients, MiB", x=x)
                     for x in (100, 10))  # fmt: skip
    cpu = medians(steps, metric="steps/s", x=10)
    best = max(rate for method, rate in cpu.items() if "backprop" in method or method == "f3triton bp")
    launch = medians(gpu, part="784-500-10, batch 50, float32")
    compiled = launch["backprop, fused Adam, compiled, graph"]
    many = medians("pipeline.json", part="batch 256", metric="steps/s")
    two = many["F3, two threads"] / many["F3, one worker"]
    ddp, inside = (many[f"backprop, two {how}"] / many["backprop, one worker"]
                   for how in ("processes, DDP", "threads inside the products"))  # fmt: skip
    paper = last("paper.json", "mnist")
    mnist, images, more = means("mnist"), means("cifar10-short"), means("cifar10")
    kept = {task: memory_of(task) for task in ("mnist", "cifar10")}
    flat, conv = kept["mnist"], kept["cifar10"]
    times = {cores: [seconds(network, cores) for network in NETWORKS] for cores in ("one core", "two cores")}
    return [
        Claim(
            "F3's activations and gradients do not grow with depth",
            f"100 layers of 256, batch 4096: {deep['f3']:.0f} MiB (10 layers: {shallow['f3']:.0f}); backpropagation"
            f" {deep['bp']:.0f}, with checkpointing {deep['bp-checkpoint']:.0f}",
            deep["f3"] < 1.1 * shallow["f3"] < deep["bp-checkpoint"],
            memory,
        ),
        Claim(
            "A step is cheaper than backpropagation's, the more so the deeper the network",
            f"ten layers of 500, batch 50, one core, steps/s: F3 {cpu['f3triton f3']:.0f}, local errors"
            f" (normalised) {cpu['f3triton local, relu + norm']:.0f}, backpropagation at its best {best:.0f}",
            cpu["f3triton f3"] > cpu["f3triton local, relu + norm"] > best,
            steps,
        ),
        Claim(
            "On a GPU, many steps of a small network are one launch",
            f"784-500-10, batch 50, H100, steps/s: F3 {launch['f3triton f3, many steps in one launch']:,.0f}, backpropagation"
            f" compiled and in a CUDA graph {compiled:,.0f}",
            launch["f3triton f3, many steps in one launch"] > 2 * compiled,
            gpu,
        ),
        Claim(
            "No stage waits for a later one, so that workers are busy, with the bits of one worker",
            f"ten layers, batch 256, two cores against one: F3 {two:.2f} times, backpropagation {ddp:.2f} by DDP and"
            f" {inside:.2f} by two threads in its products",
            two > max(ddp, inside),
            "pipeline.json",
        ),
        Claim(
            "In a shallow network, F3 in windows is as accurate as DFA, and near backpropagation",
            f"MNIST, 784-500-10, 100 epochs, one seed, error: {paper['f3-windows']:.2f} %; DFA {paper['dfa-default']:.2f},"
            f" backpropagation {paper['bp-default']:.2f}, F3 without windows {paper['f3-default']:.2f}",
            paper["f3-windows"] < paper["dfa-default"] + 0.1 and paper["f3-windows"] < paper["f3-default"],
            "paper.json",
        ),
        Claim(
            "Local errors, which are not F3, are as accurate as backpropagation on MNIST, with less memory",
            f"784-500x3-10, 20 epochs, 3 seeds: {mnist['local']:.2f} % with {flat['local']:.1f} MiB; backpropagation"
            f" {mnist['backprop']:.2f} % with {flat['backprop']:.1f} MiB, with checkpointing {flat[CHECKPOINTED]:.1f}",
            abs(mnist["local"] - mnist["backprop"]) < 0.1 and flat["local"] < flat[CHECKPOINTED] < flat["backprop"],
            "local-mnist.json",
        ),
        Claim(
            "They are at 2 % on MNIST as soon as backpropagation",
            "1 tanh, 1 and 3 normalised ReLU layers, 3 seeds, each at its best, seconds, local errors / backpropagation: "
            + "; ".join(
                f"{cores} " + ", ".join(f"{one['local']:.1f} / {one['bp']:.1f}" for one in found)
                for cores, found in times.items()
            ),
            all(one["local"] <= one["bp"] for found in times.values() for one in found),
            "time-to-accuracy.json",
        ),
        Claim(
            "On a convolutional network they lose accuracy; a reach of 2 gives it back, and most of the saved memory with it",
            f"CIFAR-10, 5 epochs, 3 seeds (20 epochs, one seed): local errors {images['local']:.1f} % ({more['local']:.1f})"
            f" with {conv['local']:.0f} MiB, reach 2 {images['local, reach 2']:.1f} % ({more['local, reach 2']:.1f}) with"
            f" {conv['local, reach 2']:.0f}; backpropagation {images['backprop']:.1f} % ({more['backprop']:.1f}) with"
            f" {conv['backprop']:.0f}",
            all(one["local, reach 2"] < min(one["local"] - 1, one["backprop"] + 0.5) for one in (images, more))
            and conv["local"] < conv["local, reach 2"] < conv["backprop"],
            "local-cifar10-short.json",
        ),
    ]


def not_good() -> list[Claim]:
    """What it is not."""
    mnist, images, more, text = (means(task) for task in ("mnist", "cifar10-short", "cifar10", "text"))
    needs = {"MNIST": memory_of("mnist"), "CIFAR-10": memory_of("cifar10"), "text": memory_of("text")}
    methods = ("local", "F3 in windows", CHECKPOINTED, "backprop")
    tables = "paper-tables.json"
    rare, census = last(tables, "kddcup99"), last(tables, "census-income-kdd")
    largest = medians("memory-scaling-largest.json", part="largest MLP of width 512, batch 512, measured", x=4.0)
    peer = "bp-checkpoint-in-backward"
    times = [seconds(network) for network in NETWORKS]
    angles = [row for row in read_result("alignment.json")["rows"] if row["part"] != "ViT" and row["method"] == "f3"]
    depth = max(row["x"] for row in angles)
    one, most = ([row["median"] for row in angles if row["x"] == x] for x in (1, depth))
    return [
        Claim(
            "F3 as the paper has it falls behind in deeper networks; windows help, and do not close the gap",
            f"MNIST, 784-500x3-10, 20 epochs, 3 seeds: F3 {mnist['F3']:.2f} %, in windows"
            f" {mnist['F3 in windows']:.2f}, DFA {mnist['DFA']:.2f}, backpropagation {mnist['backprop']:.2f}",
            mnist["F3"] > mnist["F3 in windows"] > mnist["DFA"] > mnist["backprop"],
            "local-mnist.json",
        ),
        Claim(
            "Random feedback, delayed or not, does not train convolutional networks well",
            f"CIFAR-10, 5 epochs, 3 seeds (20 epochs, one seed): F3 in windows {images['F3 in windows']:.1f} %"
            f" ({more['F3 in windows']:.1f}), DFA {images['DFA']:.1f} ({more['DFA']:.1f}), backpropagation"
            f" {images['backprop']:.1f} ({more['backprop']:.1f})",
            all(min(one["F3 in windows"], one["DFA"]) > one["backprop"] + 5 for one in (images, more)),
            "local-cifar10-short.json",
        ),
        Claim(
            "Nor language models: it does worse with four blocks than backpropagation with the first one alone",
            f"Tiny Shakespeare, bits a character: F3 in windows {text['F3 in windows']:.2f}, DFA {text['DFA']:.2f};"
            f" backpropagation {text['backprop']:.2f}, **with one block {text['backprop, 1 block']:.2f}** (3 seeds each)",
            min(text["F3 in windows"], text["DFA"]) > text["backprop, 1 block"],
            "local-text.json",
        ),
        Claim(
            "Local errors do train them, but later blocks add little: one or two blocks trained exactly do nearly as well",
            f"four blocks: read by the last block {text['local, read by the last block']:.2f}, read by the last layer"
            f" {text['local']:.2f}; backpropagation {text['backprop']:.2f}, **with one block"
            f" {text['backprop, 1 block']:.2f}**, with two {text['backprop, 2 blocks']:.2f}",
            abs(text["local, read by the last block"] - text["backprop, 2 blocks"]) < 0.05 < text["local"] - text["backprop"],
            "local-text.json",
        ),
        Claim(
            "Tables of mixed columns: F3 is behind DFA and backpropagation",
            f"3 seeds, 5 epochs, error: KDD Cup 99 F3 {rare['f3-error-trinomial']:.2f} %, DFA {rare['dfa-trinomial']:.2f},"
            f" backpropagation {rare['bp']:.2f}; Census Income (KDD) {census['f3-error-trinomial']:.2f},"
            f" {census['dfa-trinomial']:.2f}, {census['bp']:.2f}",
            all(one["f3-error-trinomial"] > one["dfa-trinomial"] > one["bp"] for one in (rare, census)),
            tables,
        ),
        Claim(
            "F3 is not the way to 2 % on MNIST",
            "1 tanh, 1 and 3 normalised ReLU layers, 3 seeds, each at its best, seconds of one core, F3 / backpropagation: "
            + ", ".join((f"{one['f3']:.1f}" if "f3" in one else "not there") + f" / {one['bp']:.1f}" for one in times),
            "f3" not in times[0] and all(one["f3"] > 1.9 * max(one["bp"], one["local"]) for one in times[1:]),
            "time-to-accuracy.json",
        ),
        Claim(
            "Checkpointing is exact, and for a second forward pass its memory is little more than that of methods that are not",
            "MiB of training, local errors / F3 in windows / backpropagation with checkpointing / without: "
            + "; ".join(f"{name} " + " / ".join(f"{kept[m]:.0f}" for m in methods) for name, kept in needs.items()),
            all(kept["local"] < kept[CHECKPOINTED] < 1.3 * kept["local"] for kept in needs.values()),
            "local-cifar10.json",
        ),
        Claim(
            "The largest model in a given memory: checkpointing, the optimizer in backward and 8-bit Adam allow as large a one",
            f"layers of 512 in 4 GiB, F3 / checkpointing: float32 {largest['f3']:.0f} / {largest[peer]:.0f}, 8-bit moments"
            f" {largest['f3-int8']:.0f} / {largest[f'{peer}-8bit']:.0f}, and bfloat16 {largest['f3-bf16-int8']:.0f} /"
            f" {largest[f'{peer}-8bit-bf16']:.0f}",
            largest["f3-int8"] <= largest[f"{peer}-8bit"] and largest["f3-bf16-int8"] <= largest[f"{peer}-8bit-bf16"],
            "memory-scaling-largest.json",
        ),
        Claim(
            "The update of a hidden layer is not always within 90 degrees of the gradient",
            f"share of layers and epochs below 90 degrees, by kind of network: {min(one):.0f} % with 1 hidden layer,"
            f" {min(most):.0f} to {max(most):.0f} % with {depth}",
            min(one) == 100 > min(most),
            "alignment.json",
        ),
    ]


def show(claims: list[Claim]) -> str:
    """A line for each; links are from the project's root."""
    lines = [[one.text, one.figures, f"[{one.file}](bench/results/{one.file})"] for one in claims]
    return table(["", "figures", "from"], lines)
