"""Each Triton kernel against the best that torch offers for the same work, in turn, on one GPU.

    python -m bench.kernels                  the sizes of the table, bfloat16 products
    python -m bench.kernels --quick          small sizes, few rounds

For every operation: this library's kernel, the same work by torch's libraries (cuBLAS, fused optimizer kernels), and by
`torch.compile(mode="max-autotune-no-cudagraphs")`. `GEMM alone` is cuBLAS's product without what has to follow it. Every round
times each of them once by device events over a few calls, with the operands of three sets in turn so that none stays in the
cache, replayed as a CUDA graph so that no launch from the host is timed; medians over rounds. Beside them: TFLOP/s and GB/s
that the operation's own count of work gives, and the time that the machine's ceilings allow, which are measured here (a large
copy, a large product).

Needs a CUDA or ROCm device; a kernel that misses its reference by more than rounding is not timed but reported.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from f3triton.kernels import SGD, Adam, State, Update, eager, new_state, reference
from f3triton.kernels.gpu import ops as triton_ops

from .common import RESULTS, needs_gpu, noted, result, row, save, table

Call = Callable[[], object]
Rule = Callable[[Tensor, Tensor, State, Update], None]
WIDTH = 16  # columns of the error
SETS = 1 if os.environ.get("TRITON_INTERPRET") == "1" else 3  # operand sets in turn


class Operands:
    """One set of operands for a layer of K inputs and N outputs at M rows."""

    def __init__(self, m: int, k: int, n: int, rule: SGD | Adam, dtype: torch.dtype, device: torch.device) -> None:
        self.x = torch.randn(m, k, device=device, dtype=dtype)
        self.weight = torch.randn(n, k, device=device) / k**0.5
        self.bias = torch.randn(n, device=device)
        self.half_bias = self.bias.to(dtype)
        self.error = torch.randn(m, WIDTH, device=device)
        self.feedback = torch.randint(-1, 2, (WIDTH, n), device=device).float()
        self.delta = torch.randn(m, n, device=device, dtype=dtype)
        self.weight_state, self.bias_state = new_state(self.weight, rule, shadow=dtype), new_state(self.bias, rule, 1)
        self.shadow = self.weight if self.weight_state.shadow is None else self.weight_state.shadow
        self.update = Update(rule, 1e-6, torch.ones((), dtype=torch.int64, device=device))

    def state(self) -> tuple:
        return self.weight_state, self.bias_state, self.update


def forward_torch(o: Operands, _: object = None) -> tuple[Tensor, Tensor]:
    h = torch.tanh(functional.linear(o.x, o.shadow, o.half_bias))
    delta = torch.mm(o.error.to(h.dtype), o.feedback.to(h.dtype)) * (1 - h * h)
    return h, delta


def update_torch(o: Operands, rule: Rule = eager.update_, delta: Tensor | None = None) -> None:
    """The gradient by cuBLAS, then torch's fused optimizer, then the copy for the next product."""
    delta = o.delta if delta is None else delta
    rule(o.weight, (delta.t() @ o.x).float(), o.weight_state, o.update)
    rule(o.bias, delta.sum(0, dtype=torch.float32), o.bias_state, o.update)


def step_torch(o: Operands, rule: Rule = eager.update_) -> Tensor:
    h, delta = forward_torch(o)
    update_torch(o, rule, delta)
    return h


def backward_torch(o: Operands, rule: Rule = eager.update_) -> Tensor:
    dx = o.delta @ o.shadow
    update_torch(o, rule)
    return dx


def compiled(function: Callable[..., object]) -> Callable[[Operands], object]:
    """Compiled with the rule's plain formulas, which the compiler fuses; torch's fused optimizers it cannot look into."""
    return torch.compile(lambda o: function(o, reference.update_), mode="max-autotune-no-cudagraphs", dynamic=False)


OPERATIONS: dict[str, dict[str, Callable[[Operands], object]]] = {
    "forward with error signal": {
        "f3triton": lambda o: triton_ops.linear_forward(o.x, o.shadow, o.bias, "tanh", o.error, o.feedback),
        "torch": forward_torch,
        "linear and tanh alone": lambda o: torch.tanh(functional.linear(o.x, o.shadow, o.half_bias)),
    },
    "update": {
        "f3triton": lambda o: triton_ops.outer_product_update_(o.weight, o.bias, o.delta, o.x, *o.state()),
        "torch": update_torch,
        "GEMM alone": lambda o: o.delta.t() @ o.x,
    },
    "step": {
        "f3triton": lambda o: triton_ops.linear_step_(o.x, o.weight, o.bias, o.error, o.feedback, *o.state(), "tanh"),
        "torch": step_torch,
    },
    "backward and update": {
        "f3triton": lambda o: triton_ops.linear_backward_update_(o.weight, o.bias, o.delta, o.x, *o.state()),
        "torch": backward_torch,
        "two GEMMs alone": lambda o: (o.delta @ o.shadow, o.delta.t() @ o.x),
    },
}  # fmt: skip


def cost(operation: str, m: int, k: int, n: int, moments: int, item: int) -> tuple[int, int]:
    """(FLOPs, fewest bytes): every operand read once, every result written once; weight and moments float32 with a shadow."""
    state = (8 + 8 * moments + item) * n * k
    product, signal = 2 * m * k * n, 2 * m * WIDTH * n
    if operation == "forward with error signal":
        return product + signal, item * (m * k + n * k + 2 * m * n)
    if operation == "update":
        return product, item * (m * k + m * n) + state
    if operation == "step":
        return 2 * product + signal, item * (m * k + m * n) + state
    return 2 * product, item * (2 * m * k + m * n) + state


def check(operation: str, dtype: torch.dtype, device: torch.device, rule: SGD | Adam) -> str | None:
    """The kernel against the torch path at a small ragged size; a word where they differ by more than rounding."""
    size = (150, 300, 130) if device.type == "cuda" else (70, 20, 24)
    torch.manual_seed(0)
    ours = Operands(*size, rule, dtype, device)
    torch.manual_seed(0)
    theirs = Operands(*size, rule, dtype, device)
    results = [run(o) for run, o in ((OPERATIONS[operation]["f3triton"], ours), (OPERATIONS[operation]["torch"], theirs))]
    pairs = [(ours.weight, theirs.weight), *zip(ours.weight_state.moments, theirs.weight_state.moments, strict=True)]
    if results[0] is not None:
        one, other = (result if isinstance(result, tuple) else (result,) for result in results)
        pairs += list(zip(one, other, strict=True))
    for got, wanted in pairs:
        off = float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
        if not off < 1e-2:
            return f"off by {off:.1e} of its norm"
    return None


def timed(call: Call, device: torch.device, repeats: int) -> float:
    """Seconds a call."""
    if device.type != "cuda":  # Triton's interpreter, for the test of this benchmark
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def as_graph(call: Call, device: torch.device) -> Call:
    """A call as a CUDA graph, which keeps what the call refers to; elsewhere the call itself."""
    if device.type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return lambda call=call: graph.replay()


def ceilings(device: torch.device, size: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """What this machine's library product and copy reach: FLOP/s and bytes (read and written) a second."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    block = torch.empty(size * size * 4, device=device)
    other = torch.empty_like(block)
    product = statistics.median(timed(lambda: a @ b, device, 3) for _ in range(rounds))
    copy = statistics.median(timed(lambda: other.copy_(block), device, 3) for _ in range(rounds))
    return {"flops": 2 * size**3 / product, "bytes": 2 * block.nbytes / copy}


def measure(
    operation: str, size: tuple[int, int, int], rule: SGD | Adam, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, object]:
    """The contestants' seconds, in turn."""
    sets = [Operands(*size, rule, dtype, device) for _ in range(SETS)]
    runs = dict(OPERATIONS[operation])
    if device.type == "cuda":
        runs["torch.compile"] = compiled(runs["torch"])
    calls, failed = {}, {}
    for name, run in runs.items():
        with noted(failed, f"{operation}, {name}"):
            run(sets[0])  # compiles
            calls[name] = as_graph(lambda run=run: [run(operands) for operands in sets], device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(timed(call, device, 3) / SETS)
    flops, moved = cost(operation, *size, rule.moments, torch.empty((), dtype=dtype).element_size())
    setting = {"operation": operation, "rule": type(rule).__name__, "rows": size[0], "inputs": size[1], "outputs": size[2]}
    return setting | {"flops": flops, "bytes": moved, "seconds": seconds, "failed": failed}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, three rounds")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of the products")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels-gpu.json")
    options = parser.parse_args(arguments)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted:
        needs_gpu("bench.kernels")
    device, dtype = torch.device("cpu" if interpreted else "cuda"), getattr(torch, options.dtype)
    large = [(4096, 4096, 4096), (8192, 8192, 8192), (4096, 8192, 8192), (256, 4096, 4096)]
    small = [(50, 784, 500), (16, 4096, 4096), (64, 4096, 4096)]
    if interpreted:
        large, small, options.rounds = [(70, 20, 24)], [(5, 20, 24)], 2
    elif options.quick:
        large, small, options.rounds = [(1024, 1024, 1024)], small[:1], 3
    ceiling = ceilings(device, 64 if interpreted else 8192, dtype, options.rounds)
    rows = []
    for operation in OPERATIONS:
        for rule in (SGD(), Adam()) if operation != "forward with error signal" else (SGD(),):
            wrong = check(operation, dtype, device, rule)
            if wrong is not None:
                rows.append({"operation": operation, "rule": type(rule).__name__, "wrong": wrong})
                continue
            for size in small if operation == "step" else large:
                rows.append(measure(operation, size, rule, dtype, device, options.rounds))
                torch.cuda.empty_cache()
    lines, figures = [], []
    for found in rows:
        if "wrong" in found:
            lines.append([found["operation"], found["rule"], "", "", f"WRONG: {found['wrong']}", "", "", "", ""])
            continue
        bound = max(found["flops"] / ceiling["flops"], found["bytes"] / ceiling["bytes"])
        ours = statistics.median(found["seconds"].get("f3triton", [math.nan]))
        size = f"{found['rows']} x {found['inputs']} -> {found['outputs']}"
        for name, seconds in found["seconds"].items():
            middle = statistics.median(seconds)
            rates = {"tflops": found["flops"] / middle / 1e12, "gigabytes_per_second": found["bytes"] / middle / 1e9}
            share, ratio = bound / middle, middle / ours
            shown = [f"{rates['tflops']:.1f}", f"{rates['gigabytes_per_second']:.0f}", f"{share:.2f}", f"{ratio:.2f}"]
            lines.append([found["operation"], found["rule"], size, name, f"{1e6 * middle:.1f}", *shown])
            part = f"{found['operation']}, {found['rule']}"
            more = {**rates, "share_of_bound": share} | ({} if math.isnan(ours) else {"f3triton_is_faster": ratio})
            figures.append(row(name, size, "us", [1e6 * s for s in seconds], part=part, scale="log", **more))
    header = ["operation", "rule", "size", "by", "us", "TFLOP/s", "GB/s", "share of bound", "f3triton is x times as fast"]
    print(f"ceilings measured here: {ceiling['flops'] / 1e12:.0f} TFLOP/s, {ceiling['bytes'] / 1e9:.0f} GB/s")
    print(table(header, lines))
    setting = {"dtype": options.dtype, "rounds": options.rounds, "ceilings": ceiling}
    wrong = [found for found in rows if "wrong" in found]
    failed = {f"{name}, {found['rule']}": reason for found in rows for name, reason in found.get("failed", {}).items()}
    save(options.output, result("kernels", figures, setting, device, wrong=wrong, failed=failed))
    if wrong or failed:
        sys.exit(f"failed: {', '.join([*(found['operation'] for found in wrong), *failed])}")


if __name__ == "__main__":
    main()
