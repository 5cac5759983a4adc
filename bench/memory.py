"""Peak memory of a training step against depth, beyond weights, moments, feedback, errors and data.

    python -m bench.memory

What is left is activations and gradients: of one layer at a time in F3, of all layers in backpropagation. Each figure
comes from a process of its own, in which a first small step has made everything that lasts; then the peak of resident
memory (on CUDA: of allocated memory) over three large steps is read, less what was in use before. Against backpropagation
with activation checkpointing (`bp-checkpoint`: segments of about the square root of the depth, recomputed on the way back)
the gap is smaller, for a third more arithmetic. DFA waits for the output and keeps all activations, as backpropagation does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import f3triton as f3

from .common import RESULTS, origin, table, write_result

METHODS = ("f3", "dfa", "bp", "bp-checkpoint")


class Checkpointed(f3.Block):
    """Layers whose activations are recomputed on the way back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False) if torch.is_grad_enabled() else super().forward(x)


def reset_peak(device: torch.device) -> int:
    """Start measuring anew; returns the bytes in use."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark becomes the present size
    return peak(device)


def peak(device: torch.device) -> int:
    """The most bytes in use since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def child(method: str, depth: int, width: int, batch: int, device: torch.device) -> int:
    """Peak bytes over three steps."""
    torch.manual_seed(0)
    model = f3.models.MLP([width, *[width] * depth, 10])
    if method == "bp-checkpoint":
        layers, segment = list(model.stages), math.isqrt(depth + 1)
        parts = (nn.Sequential(*layers[start : start + segment]) for start in range(0, len(layers), segment))
        model = f3.Sequential(*map(Checkpointed, parts))
    trainer = f3.Trainer(model, "bce", method=method.split("-")[0], device=device, batch_size=batch)
    inputs, targets = torch.randn(batch, width), torch.randint(0, 10, (batch,))
    data = f3.Dataset.from_tensors(inputs, targets, classes=10)
    trainer.fit(data, 1, batches=lambda epoch: [torch.arange(2, device=device)])
    everything = torch.arange(batch, device=device)
    before = reset_peak(device)
    for _ in range(3):
        trainer.learner.step(everything, 1e-4)
    return peak(device) - before


def measure(method: str, depth: int, options: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "bench.memory", "--child", method, "--depth", str(depth)]
    command += ["--width", str(options.width), "--batch", str(options.batch), "--device", options.device]
    # Freed blocks go back to the system at once, so that resident memory is memory in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", default=[1, 10, 50, 100], help="numbers of hidden layers")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory-depth.json")
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.child:
        print(child(options.child, options.depth[0], options.width, options.batch, device))
        return
    peaks = {method: {str(depth): measure(method, depth, options) for depth in options.depth} for method in METHODS}
    rows = [[method, *(f"{count / 2**20:.1f}" for count in counts.values())] for method, counts in peaks.items()]
    one = options.width * options.batch * 4 / 2**20
    print(f"MiB over three steps, width {options.width}, batch {options.batch}; one layer's output is {one:.1f} MiB\n")
    print(table(["hidden layers", *map(str, options.depth)], rows))
    setting = {key: getattr(options, key) for key in ("width", "batch")}
    write_result(options.output, {**origin("bench.memory", device), "setting": setting, "peak_bytes": peaks})


if __name__ == "__main__":
    main()
