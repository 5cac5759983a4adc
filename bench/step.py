"""Training steps a second on this machine: this library's F3 and its peers against plain PyTorch, in turn, in one run.

    python -m bench.step                      784-500-10, batch 50, one thread; against depth, width and batch
    python -m bench.step --device cuda        see bench/step_gpu.py

The yardsticks are written here in plain PyTorch: `autograd F3` is F3 as one writes it with hooks on autograd (the
gradient between layers replaced, torch's default Adam: how the authors' code works), `backprop` uses torch's default
Adam, `backprop, fused Adam` its fastest one, and `backprop, compiled` that one under `torch.compile`. Every round runs each
of them once; medians over rounds are reported.

Bound: the matrix products of an F3 step are 4MKN a layer (forward, weight gradient), those of backpropagation 6MKN
(4MKN in the first layer). `floor` is the time of those products and of one fused Adam pass alone, measured here.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import f3triton as f3
from f3triton.base.data import Visit
from f3triton.kernels import Update, eager, new_state

from .common import RESULTS, needs_gpu, result, row, save, table

INPUTS, CLASSES, SAMPLES = 784, 10, 6000
LR = 1.5e-4
Step = Callable[[Tensor], None]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = functional.one_hot(torch.randint(0, CLASSES, (SAMPLES,), generator=generator), CLASSES).float()
    return torch.randn(SAMPLES, INPUTS, generator=generator), y


class ReplaceGradient(torch.autograd.Function):
    """Identity; on the way back, another gradient."""

    @staticmethod
    def forward(ctx: object, h: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return h.detach()

    @staticmethod
    def backward(ctx: object, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


def plain_torch(width: int, depth: int, f3_rule: bool, fused: bool, compiled: bool = False) -> Step:
    """A step in plain PyTorch: backpropagation, or F3 by replacing gradients."""
    x, y = data()
    sizes = [INPUTS, *[width] * depth]
    hidden = nn.ModuleList(nn.Sequential(nn.Linear(i, o), nn.Tanh()) for i, o in itertools.pairwise(sizes))
    top = nn.Sequential(nn.Linear(width, CLASSES), nn.Sigmoid())
    feedback = [torch.randint(-1, 2, (CLASSES, width)).float() for _ in hidden]
    errors = y.clone()
    optimizer = torch.optim.Adam([*hidden.parameters(), *top.parameters()], lr=LR, fused=True if fused else None)

    def forward(h: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy(top(nn.Sequential(*hidden)(h)), target)

    if compiled:
        forward = torch.compile(forward)

        def compiled_step(index: Tensor) -> None:
            optimizer.zero_grad()
            forward(x[index], y[index]).backward()
            optimizer.step()

        return compiled_step

    def step(index: Tensor) -> None:
        h, target = x[index], y[index]
        optimizer.zero_grad()
        for layer, b in zip(hidden, feedback, strict=True):
            h = layer(h)
            if f3_rule:
                h = ReplaceGradient.apply(h, errors[index] @ b)
        output = top(h)
        functional.binary_cross_entropy(output, target).backward()
        optimizer.step()
        if f3_rule:
            errors[index] = (target - output).detach()

    return step


def library(method: str, width: int, depth: int, norm: bool = False) -> Step:
    """A step of this library's trainer; with `norm` of a network of relu and layer normalisations, as local errors want it."""
    sizes = [INPUTS, *[width] * depth, CLASSES]
    model = f3.models.MLP(sizes, "relu", norm="layer") if norm else f3.models.MLP(sizes)
    trainer = f3.Trainer(model, "bce", f3.Adam(lr=LR), method=method, lr_schedule="constant", device="cpu")
    trainer.fit(data(), 1, batches=lambda epoch: [torch.arange(50)])
    return lambda index: trainer.learner.visit(Visit(index, index), LR)


def floor(width: int, depth: int, batch: int) -> Step:
    """The products and the Adam pass of an F3 step, and nothing else."""
    sizes, rule = [INPUTS, *[width] * depth, CLASSES], f3.Adam(lr=LR)
    update, layers = Update(rule, LR, torch.ones(())), []
    for k, n in itertools.pairwise(sizes):
        weight = torch.randn(n, k)
        layers.append((torch.randn(batch, k), torch.randn(batch, n), weight, torch.zeros_like(weight), new_state(weight, rule)))

    @torch.no_grad()
    def step(_: Tensor) -> None:
        for x, delta, weight, gradient, state in layers:
            torch.mm(x, weight.t())
            torch.mm(delta.t(), x, out=gradient)
            eager.update_(weight, gradient, state, update)

    return step


def contestants(width: int, depth: int, batch: int, compiled: bool) -> dict[str, Step]:
    steps = {
        "autograd F3": plain_torch(width, depth, f3_rule=True, fused=False),
        "backprop": plain_torch(width, depth, f3_rule=False, fused=False),
        "backprop, fused Adam": plain_torch(width, depth, f3_rule=False, fused=True),
        "f3triton f3": library("f3", width, depth),
        "f3triton dfa": library("dfa", width, depth),
        "f3triton bp": library("bp", width, depth),
        "f3triton f3, relu + norm": library("f3", width, depth, norm=True),
        "f3triton local, relu + norm": library("local", width, depth, norm=True),
        "floor": floor(width, depth, batch),
    }
    if compiled:
        torch.compiler.reset()
        steps["backprop, compiled"] = plain_torch(width, depth, f3_rule=False, fused=True, compiled=True)
    return steps


def rate(step: Step, batch: int, steps: int) -> float:
    """Steps a second over random batches, after three to warm up."""
    for _ in range(3):
        step(torch.randint(0, SAMPLES, (batch,)))
    began = time.perf_counter()
    for _ in range(steps):
        step(torch.randint(0, SAMPLES, (batch,)))
    return steps / (time.perf_counter() - began)


def measure(width: int, depth: int, batch: int, seconds: float, rounds: int, compiled: bool) -> dict[str, list[float]]:
    """Rates by name, one a round, the contestants in turn, each for about so many seconds."""
    steps = contestants(width, depth, batch, compiled)
    rates: dict[str, list[float]] = {}
    counts = {name: max(3, round(seconds * rate(step, batch, 3))) for name, step in steps.items()}
    for _ in range(rounds):
        for name, step in steps.items():
            rates.setdefault(name, []).append(rate(step, batch, counts[name]))
    return rates


# axis: (width, hidden layers, batch) by the value on the axis
AXES = {
    "hidden layers": {depth: (500, depth, 50) for depth in (1, 3, 10)},
    "width": {width: (width, 1, 50) for width in (128, 500, 2000)},
    "batch": {batch: (500, 1, batch) for batch in (16, 50, 256)},
}
QUICK = {"hidden layers": {depth: (128, depth, 50) for depth in (1, 2)}}


def on_cpu(options: argparse.Namespace) -> dict:
    """The rows of all settings; a setting that lies on several axes is measured once."""
    rows, found = [], {}
    rounds, seconds = (3, 0.03) if options.quick else (options.rounds, 0.4)
    for axis, settings in (QUICK if options.quick else AXES).items():
        for x, setting in settings.items():
            if setting not in found:
                found[setting] = measure(*setting, seconds, rounds, options.compile)
            width, depth, batch = setting
            medians = {name: statistics.median(values) for name, values in found[setting].items()}
            shown = []
            for name, values in found[setting].items():
                share, ratio = medians[name] / medians["floor"], medians["f3triton f3"] / medians[name]
                more = {"samples_per_second": round(batch * medians[name]), "share_of_floor": round(share, 3)}
                rows.append(row(name, x, "steps/s", values, x_name=axis, part=axis, f3_is_faster=round(ratio, 3), **more))
                shown.append([name, f"{medians[name]:.0f}", f"{ratio:.2f}", f"{share:.2f}"])
            print(f"\n{INPUTS}-{width} x {depth}-{CLASSES}, batch {batch}, {options.threads} thread(s)\n")
            print(table(["", "steps/s", "f3triton f3 is this many times as fast", "share of floor's rate"], shown), flush=True)
    return result("step", rows, {"threads": options.threads, "rounds": rounds, "inputs": INPUTS, "classes": CLASSES})


def on_gpu(device: torch.device, quick: bool, rounds: int) -> dict:
    """The rows of every setting of `step_gpu`; `failed` says what could not be measured."""
    from . import step_gpu

    rows, bounds, failed = [], {}, {}
    for name in step_gpu.QUICK if quick else step_gpu.SETTINGS:
        rates, broken, bounds[name] = step_gpu.measure(name, device, rounds)
        failed |= {f"{name}, {who}": reason for who, reason in broken.items()}
        bound = bounds[name]["steps_per_second"]
        ours = statistics.median(rates["f3triton f3"]) if "f3triton f3" in rates else math.nan
        shown = []
        for who, values in rates.items():
            value = statistics.median(values)
            ratio = {} if math.isnan(ours) else {"f3_is_faster": ours / value}
            rows.append(row(who, name, "steps/s", values, part=name, share_of_bound=value / bound, **ratio))
            shown.append([who, f"{value:.0f}", f"{ours / value:.2f}", f"{value / bound:.2f}"])
        print(f"\n{name}\n")
        print(table(["", "steps/s", "f3triton f3 is this many times as fast", "share of F3's bound"], shown), flush=True)
    return result("step", rows, {"rounds": rounds}, device, bounds=bounds, failed=failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile too")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny networks, three rounds")
    parser.add_argument("--output", type=Path, help="default: step-cpu.json or step-gpu.json in bench/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gpu = options.device == "cuda"
    if gpu:
        needs_gpu("bench.step")
    content = on_gpu(torch.device("cuda"), options.quick, 3 if options.quick else options.rounds) if gpu else on_cpu(options)
    save(options.output or RESULTS / f"step-{'gpu' if gpu else 'cpu'}.json", content)
    if content.get("failed"):
        sys.exit(f"failed: {', '.join(content['failed'])}")


if __name__ == "__main__":
    main()
