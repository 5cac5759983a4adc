"""Training steps on a GPU: F3 against the best backpropagation that torch offers. Run by `bench.step --device cuda`.

Backpropagation runs in three forms, each with torch's fused Adam and the same precision: eager; with the whole step, optimizer
included, in a CUDA graph; and compiled (`max-autotune-no-cudagraphs`) in a graph. F3 runs as `Trainer` runs
it, with and without its graph, and where that can be as a hundred steps in one launch. Every round times each of them once, by
device events; medians over rounds.

Bound: a step's matrix products (F3 4MKN + 2MCN a layer, backpropagation 6MKN) at the rate that a large library product reaches
here, or the bytes of weights, moments and shadows (float32 Adam: 26 bytes a weight with a shadow in half precision, 24 without)
at the rate of a large copy, whichever takes longer.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import f3triton as f3
from f3triton.base.data import Visit
from f3triton.run.gathered import Gathered

from .common import noted
from .kernels import ceilings

Step = Callable[[Tensor], object]
LR = 1.5e-4
SAMPLES = 6000
TOGETHER = 100
# name: (layer sizes, batch, precision)
SETTINGS = {
    "784-500-10, batch 50, float32": ([784, 500, 10], 50, "float32"),
    "784-500x3-10, batch 50, float32": ([784, 500, 500, 500, 10], 50, "float32"),
    "8 x 4096, batch 256, bfloat16": ([4096] * 8 + [16], 256, "bfloat16"),
    "8 x 4096, batch 4096, bfloat16": ([4096] * 8 + [16], 4096, "bfloat16"),
}
QUICK = {"20-30-4, batch 8, float32": ([20, 30, 4], 8, "float32")}


def data(sizes: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = functional.one_hot(torch.randint(0, sizes[-1], (SAMPLES,), generator=generator), sizes[-1]).float()
    return torch.randn(SAMPLES, sizes[0], generator=generator).to(device), y.to(device)


def library(sizes: list[int], batch: int, precision: str, device: torch.device, graph: str, backend: str) -> Step:
    """A step of this library's trainer."""
    trainer = trained(sizes, batch, precision, device, cuda_graph=graph, backend=backend)
    return lambda index: trainer.learner.visit(Visit(index, index), LR)


def trained(sizes: list[int], batch: int, precision: str, device: torch.device, **how: str) -> f3.Trainer:
    """The trainer after an epoch."""
    trainer = f3.Trainer(f3.models.MLP(sizes), "bce", f3.Adam(lr=LR), lr_schedule="constant", device=device, batch_size=batch,
                         precision=precision, **how)  # fmt: skip
    trainer.fit(data(sizes, device), 1)
    return trainer


def launched(sizes: list[int], batch: int, precision: str, device: torch.device) -> Step:
    """The same, many in one launch: the last of `TOGETHER` steps does them all. (A row may be twice among them here.)"""
    trainer = trained(sizes, batch, precision, device, backend="triton", epoch_launch="on")
    flow = Gathered(trainer.learner, trainer.model, batch)
    flow.most = TOGETHER
    return lambda index: flow.visit(Visit(index, index), LR, lambda *_: None)


def backprop(sizes: list[int], batch: int, precision: str, device: torch.device, compiled: bool, graphed: bool) -> Step:
    """A step of backpropagation in plain torch."""
    x, y = data(sizes, device)
    layers = [module for k, n in itertools.pairwise(sizes) for module in (nn.Linear(k, n), nn.Tanh())][:-1]
    model = nn.Sequential(*layers).to(device)
    fused = device.type == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True, capturable=fused)
    static = torch.zeros(batch, dtype=torch.int64, device=device)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            a = model(inputs)
        return functional.binary_cross_entropy_with_logits(a.float(), targets)

    if compiled:
        loss_of = torch.compile(loss_of, mode="max-autotune-no-cudagraphs")

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(x.index_select(0, static), y.index_select(0, static)).backward()
        optimizer.step()

    if graphed:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    else:
        replay = run

    def step(index: Tensor, kept: Callable = run) -> None:  # a graph does not keep the tensors alive that it reads and writes
        static.copy_(index)
        replay()

    return step


def contestants(sizes: list[int], batch: int, precision: str, device: torch.device) -> dict[str, Callable[[], Step]]:
    """By name, what builds each step."""
    setting = sizes, batch, precision, device
    found = {
        "f3triton f3": lambda: library(*setting, "on" if device.type == "cuda" else "off", "auto"),
        "f3triton f3, torch backend": lambda: library(*setting, "off", "torch"),
        "backprop, fused Adam": lambda: backprop(*setting, compiled=False, graphed=False),
    }
    if device.type == "cuda" and precision == "float32":
        found["f3triton f3, many steps in one launch"] = lambda: launched(*setting)
    if device.type == "cuda":
        found |= {
            "f3triton f3, no graph": lambda: library(*setting, "off", "auto"),
            "f3triton f3, torch backend, graph": lambda: library(*setting, "on", "torch"),
            "backprop, fused Adam, graph": lambda: backprop(*setting, compiled=False, graphed=True),
            "backprop, fused Adam, compiled, graph": lambda: backprop(*setting, compiled=True, graphed=True),
        }
    return found


def rate(step: Step, indices: list[Tensor], device: torch.device) -> float:
    """Steps a second."""
    step(indices[0])
    if device.type != "cuda":
        began = time.perf_counter()
        for index in indices:
            step(index)
        return len(indices) / (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for index in indices:
        step(index)
    end.record()
    end.synchronize()
    return len(indices) / (start.elapsed_time(end) / 1e3)


def bound(sizes: list[int], batch: int, precision: str, ceiling: dict[str, float]) -> float:
    """Steps a second that the machine's ceilings allow F3."""
    pairs = list(itertools.pairwise(sizes))
    flops = sum(4 * batch * k * n for k, n in pairs) + sum(2 * batch * sizes[-1] * n for _, n in pairs[:-1])
    moved = sum(k * n for k, n in pairs) * (24 if precision == "float32" else 26)
    return 1 / max(flops / ceiling["flops"], moved / ceiling["bytes"])


def measure(name: str, device: torch.device, rounds: int) -> tuple[dict[str, list[float]], dict[str, str], dict[str, object]]:
    """(rates of all contestants in one setting, in turn; why some have none; the bound and the machine's ceilings)."""
    sizes, batch, precision = {**SETTINGS, **QUICK}[name]
    count = 300 if max(sizes) < 1000 else 20
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}  # such as a compiler that is not there: the others stay in the race
    for who, build in contestants(sizes, batch, precision, device).items():
        with noted(failed, who):
            steps[who] = build()
    rates: dict[str, list[float]] = {who: [] for who in steps}
    for _ in range(rounds):
        indices = [torch.randint(0, SAMPLES, (batch,), device=device) for _ in range(count)]
        for who in [who for who in rates if who not in failed]:
            with noted(failed, who):
                rates[who].append(rate(steps[who], indices, device))
    ceiling = ceilings(device, 8192 if device.type == "cuda" else 256, getattr(torch, precision), 5)
    bounds = {"steps_per_second": bound(sizes, batch, precision, ceiling), **ceiling}
    return {who: values for who, values in rates.items() if who not in failed}, failed, bounds
