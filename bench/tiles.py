"""Times of the kernels by tile: what the tables of `f3triton/kernels/gpu/tiles.py` are chosen from. One GPU.

    python -m bench.tiles

Every candidate is compiled first, by several processes, then timed alone as a CUDA graph of calls on three sets of operands in
turn (see `bench.kernels`); medians of five. `update` is the weight's gradient with the rule, `forward` the product with
activation and error signal; bfloat16 products, but for 784 -> 500, which are float32. The bound is FLOPs or bytes by the
machine's ceilings, which are measured here.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from f3triton.kernels import SGD, Adam
from f3triton.kernels.gpu import ops, tiles
from f3triton.kernels.gpu.tiles import Tile

from .common import RESULTS, needs_gpu, noted, result, row, save, table
from .kernels import Operands, as_graph, ceilings, cost, timed

RULES = {"SGD": SGD(), "Adam": Adam()}
SMALL = (50, 784, 500)
SIZES = [(rows, 4096, 4096) for rows in (16, 64, 256, 4096)] + [(8192, 8192, 8192)]
UPDATE = [
    Tile((64, 64, 64), 8, 4), Tile((64, 128, 64), 8, 3), Tile((128, 128, 64), 8, 3, 4), Tile((128, 128, 64), 8, 4, 4),
    Tile((128, 256, 64), 8, 3, 8), Tile((128, 256, 64), 8, 4, 8), Tile((64, 128, 64), 4, 4, 4), Tile((64, 256, 64), 4, 3, 8),
    Tile((64, 256, 64), 8, 3, 8), Tile((32, 128, 64), 4, 4, 4), Tile((32, 64, 64), 4, 4, 2), Tile((64, 64, 32), 4, 3, 2),
    Tile((32, 128, 32), 4, 3, 2), Tile((128, 128, 64), 8, 3, 2),
]  # fmt: skip
# many rows: the rule while the next tile's operands are fetched, or while another program of the multiprocessor multiplies
HIDDEN = [
    Tile((128, 128, 64), 8, 4, 4, 1), Tile((128, 256, 64), 8, 3, 8, 1), Tile((64, 128, 64), 4, 4, 4, 2),
    Tile((128, 128, 64), 4, 3, 8), Tile((128, 128, 64), 8, 4, 4, 0, True), Tile((128, 128, 64), 8, 4, 4, 1, True),
    Tile((128, 256, 64), 8, 3, 8, 0, True), Tile((128, 256, 64), 8, 3, 8, 1, True),
]  # fmt: skip
SMALL_UPDATE = [
    Tile((32, 32, 32), 4, 3), Tile((32, 64, 32), 4, 3), Tile((16, 64, 32), 4, 3), Tile((16, 32, 64), 4, 2),
    Tile((32, 32, 64), 4, 2), Tile((64, 64, 32), 8, 4),
]  # fmt: skip
FORWARD = [
    Tile((64, 64, 32), 8, 3), Tile((16, 32, 64), 4, 3), Tile((16, 32, 64), 4, 5), Tile((32, 32, 64), 4, 4),
    Tile((64, 16, 64), 4, 4), Tile((64, 32, 64), 4, 4), Tile((16, 16, 128), 4, 3), Tile((16, 16, 64), 4, 5),
    Tile((32, 16, 64), 4, 4), Tile((64, 16, 32), 4, 6), Tile((64, 64, 64), 4, 4),
]  # fmt: skip
Job = tuple[str, str, tuple[int, int, int], Tile]  # operation, rule, (rows, inputs, outputs), tile


def jobs(quick: bool = False) -> list[Job]:
    """All that is timed."""
    if quick:
        return [("update", "Adam", SMALL, SMALL_UPDATE[0]), ("forward", "SGD", SMALL, FORWARD[1])]
    found = [("update", rule, size, tile) for rule in RULES for size in SIZES for tile in UPDATE]
    found += [("update", rule, size, tile) for rule in RULES for size in SIZES[-2:] for tile in HIDDEN]
    found += [("update", rule, SMALL, tile) for rule in RULES for tile in SMALL_UPDATE]
    return found + [("forward", "SGD", size, tile) for size in (SMALL, *SIZES[:2]) for tile in FORWARD]


def chosen(operation: str, rule: SGD | Adam, size: tuple[int, int, int], multiprocessors: int = 132) -> Tile:
    """What the tables choose on an H100 or H200."""
    rows, inputs, outputs = size
    half = size != SMALL
    if operation == "forward":
        return tiles.forward_tile(rows, outputs, half, True, False, multiprocessors)
    return tiles.update_tile(rows, outputs, inputs, half, rule.moments, True, multiprocessors)


def dtype_of(job: Job) -> torch.dtype:
    return torch.float32 if job[2] == SMALL else torch.bfloat16


def run(job: Job, sets: int = 3) -> float:
    """Microseconds of a call; with one set it is only compiled, and called."""
    operation, rule, size, tile = job
    tiles.forward_tile = tiles.update_tile = lambda *about: tile
    device = torch.device("cuda")
    operands = [Operands(*size, RULES[rule], dtype_of(job), device) for _ in range(sets)]

    def call() -> None:
        for o in operands:
            if operation == "update":
                ops.outer_product_update_(o.weight, o.bias, o.delta, o.x, *o.state())
            else:
                ops.linear_forward(o.x, o.shadow, o.bias, "tanh", o.error, o.feedback)

    call()
    if sets == 1:
        return 0.0
    replay = as_graph(call, device)
    replay()
    return 1e6 * statistics.median(timed(replay, device, 3) / sets for _ in range(5))


def rows_of(found: dict[Job, float], ceiling: dict[str, dict[str, float]]) -> list[dict]:
    """A row a tile; `share_of_bound` by the ceilings of the products' type, `chosen`: the one that the tables choose,
    and `peers`: the part of `bench.kernels` that has torch's times."""
    rows = []
    for job, microseconds in found.items():
        operation, rule, size, tile = job
        kind = str(dtype_of(job)).removeprefix("torch.")
        word = "forward with error signal" if operation == "forward" else operation
        flops, moved = cost(word, *size, RULES[rule].moments, dtype_of(job).itemsize)
        bound = 1e6 * max(flops / ceiling[kind]["flops"], moved / ceiling[kind]["bytes"])
        shape = f"{size[0]} x {size[1]} -> {size[2]}"
        part = f"{operation}, {rule}, {shape}"
        more = {"peers": f"{word}, {rule}", "size": shape, "chosen": tile == chosen(operation, RULES[rule], size)}
        more["share_of_bound"] = round(bound / microseconds, 3)
        name = f"{'x'.join(map(str, tile.blocks))} {tile.warps} warps, {tile.stages} stages, {tile.slices} slices"
        name += f", {tile.persistent} programs a multiprocessor share all" if tile.persistent else ""
        name += ", descriptors" * tile.descriptors
        rows.append(row(name, part, "us", microseconds, part=part, **more))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two tiles")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--output", type=Path, default=RESULTS / "tiles-gpu.json")
    options = parser.parse_args()
    needs_gpu("bench.tiles")
    all_jobs = jobs(options.quick)
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        list(pool.map(run, all_jobs, [1] * len(all_jobs)))
    found, failed = {}, {}
    for job in all_jobs:
        with noted(failed, str(job)):
            found[job] = run(job)
    device = torch.device("cuda")
    ceiling = {kind: ceilings(device, 8192, getattr(torch, kind), 5) for kind in ("float32", "bfloat16")}
    rows = rows_of(found, ceiling)
    print(
        table(["", "tile", "us", "share of bound"], [[r["part"], r["method"], r["median"], r["share_of_bound"]] for r in rows])
    )
    save(options.output, result("tiles", rows, {"ceilings": ceiling}, device, failed=failed))


if __name__ == "__main__":
    main()
