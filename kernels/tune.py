"""Which backend is faster on this very GPU: measured once, kept in a file, read by `--backend auto`.

    python -m f3triton.kernels.tune                                                     a default list of layers
    python -m f3triton.kernels.tune --sizes 784 500 10 --batch-size 50 --precision float32     those of one network

Every operation of every layer is timed through the torch and the Triton backend, in turn, as a CUDA graph (so by the device's
time and not by the host's), with Adam. The operations work in place, and so each backend has operands of its own, made here and
thrown away. Times are kept by device, versions, precision and shape, each size rounded up to a power of two, in `tune.json` in
`$F3TRITON_CACHE`, or `~/.cache/f3triton`. Deleting the file is always safe; measuring again may change what `auto` chooses, and
with it the last bits of results.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType, SimpleNamespace

import torch

from . import dispatch, eager
from .rules import Adam, Update, new_state
from .times import Table, Work, circumstances, write

OPERATIONS = ("forward", "update", "step", "backward")
ERRORS = 10  # columns of the error
DEFAULT = (([784, 500, 10], 50), *(([width, width], rows) for width in (1024, 4096) for rows in (64, 256, 4096)))
ROUNDS = 3

Operations = ModuleType | SimpleNamespace
Timer = Callable[[Callable[[], object]], float]  # seconds of a call


def prepare(work: Work, ops: Operations, precision: str, device: torch.device) -> Callable[[], object]:
    """A call of the operation on operands of its own, always of the same values."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    _, rows, inputs, outputs = work
    products = dispatch.PRODUCTS[precision]
    x, delta = (random(rows, size).to(products) for size in (inputs, outputs))
    weight, bias = random(outputs, inputs) / inputs**0.5, random(outputs)
    if precision == "bfloat16-weights":
        weight, bias = weight.to(products), bias.to(products)
    error, feedback = random(rows, ERRORS), random(ERRORS, outputs)
    rule = Adam()
    states = new_state(weight, rule, 0, products if getattr(ops, "READS_SHADOWS", False) else None), new_state(bias, rule, 1)
    # a learning rate of 0: nothing grows however often this is run
    update = Update(rule, torch.zeros((), device=device), torch.ones((), dtype=torch.int64, device=device), seed=0)
    source = weight if states[0].shadow is None else states[0].shadow
    return {
        "forward": partial(ops.linear_keep, x, source, bias, "tanh"),
        "update": partial(ops.outer_product_update_, weight, bias, delta, x, *states, update),
        "step": partial(ops.linear_step_, x, weight, bias, error, feedback, *states, update, "tanh"),
        "backward": partial(ops.linear_backward_update_, weight, bias, delta, x, *states, update),
    }[work.operation]


def on_device(call: Callable[[], object]) -> float:
    """Seconds of a call in a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(call, return_mode="median") / 1e3


@torch.no_grad()
def measure(
    work: Iterable[Work], backends: dict[str, Operations], precision: str, device: torch.device, timer: Timer = on_device
) -> Table:
    """The table of `work`: medians of rounds in which the backends take turns."""
    table = {}
    for one in work:
        calls = {name: prepare(one, ops, precision, device) for name, ops in backends.items()}
        times = [{name: timer(call) for name, call in calls.items()} for _ in range(ROUNDS)]
        table[one.key(precision)] = seconds = {name: statistics.median(found[name] for found in times) for name in calls}
        shown = ", ".join(f"{name} {1e6 * value:.1f} us" for name, value in seconds.items())
        print(f"{one.operation} {precision}, {one.rows} x {one.inputs} -> {one.outputs}: {shown}", flush=True)
    return table


def main(arguments: list[str] | None = None, device: torch.device | None = None, timer: Timer = on_device) -> None:
    """Measure and keep; on another device than the present GPU, and with another clock, for tests."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("f3triton.kernels.tune", description=__doc__, formatter_class=raw)
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="inputs, hidden units of each layer, outputs")
    parser.add_argument("--batch-size", type=int, default=50, metavar="N", help="rows of a step, with --sizes (default: 50)")
    parser.add_argument("--precision", choices=dispatch.PRODUCTS, default="float32", help="default: float32")
    options = parser.parse_args(arguments)
    sizes, batch = options.sizes, options.batch_size
    if sizes is not None and (len(sizes) < 2 or min(*sizes, batch) < 1):
        parser.error(f"--sizes needs two or more sizes of at least 1, and so the batch size, got {sizes} and {batch}")
    if device is None and not torch.cuda.is_available():
        print("f3triton.kernels.tune: error: needs a CUDA or ROCm device, and this machine has none", file=sys.stderr)
        sys.exit(2)
    device = device or torch.device("cuda", torch.cuda.current_device())
    torch.set_float32_matmul_precision("high" if options.precision == "tf32" else "highest")
    networks = DEFAULT if sizes is None else [(sizes, batch)]
    layers = [(rows, *pair) for widths, rows in networks for pair in itertools.pairwise(widths)]
    work = dict.fromkeys(Work(operation, *layer) for layer in layers for operation in OPERATIONS)
    try:
        backends = {"torch": eager, "triton": dispatch.choose("triton", device, options.precision).operations}
        table = measure(work, backends, options.precision, device, timer)
        print(f"kept in {write(device, table)} for {circumstances(device)}")
    except (ValueError, OSError) as error:
        print(f"f3triton.kernels.tune: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
