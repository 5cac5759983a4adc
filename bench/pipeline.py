"""A pipeline of workers: steps a second, idle time and memory of F3 on several workers, and of backpropagation on as many.

    python -m bench.pipeline                 steps by wall clock, on two idle cores; about ten minutes
    python -m bench.pipeline --simulate      no clock: up to 1,024 workers, see `bench.pipeline_simulation`

A network of 784 inputs, ten hidden layers of 500 (tanh) and 10 outputs learns random samples; nothing is evaluated. Every
figure is a process's (or torchrun's) of its own, one after the other, in several rounds. F3: one worker, two workers as
processes and as threads, two threads inside the products. Backpropagation: one worker, two threads inside the products,
DistributedDataParallel, and torch's own pipeline schedules 1F1B and ZBV, which divide a batch into microbatches. All learn by
Adam.

`steps a CPU second of the busiest worker` is what the wall clock would show if nobody waited for anybody, on idle cores: other
load changes it little. `idle` is the part of the wall clock in which a worker did not use its core: it waited for another
worker, or for the machine, which had other work (the load is noted). `memory` is the most that a worker's process had, of
which torch itself is a good part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import f3triton as f3
from f3triton.distributed.mesh import join, part
from f3triton.run.summary import peak_memory_bytes

from .common import RESULTS, noted, result, row, save

# name: (processes, torch's threads in each, what they do, its argument)
RUNS: dict[str, tuple[int, int, str, str]] = {
    "F3, one worker": (1, 1, "f3", "off"),
    "F3, two processes": (2, 1, "f3", "auto"),
    "F3, two threads": (1, 2, "f3", "threads:2"),
    "F3, two threads inside the products": (1, 2, "f3", "off"),
    "backprop, one worker": (1, 1, "bp", "1"),
    "backprop, two threads inside the products": (1, 2, "bp", "1"),
    "backprop, two processes, DDP": (2, 1, "bp", "2"),
    "backprop, two processes, 1F1B, 4 microbatches": (2, 1, "1f1b", "4"),
    "backprop, two processes, 1F1B, 8 microbatches": (2, 1, "1f1b", "8"),
    "backprop, two processes, ZBV, 4 microbatches": (2, 1, "zbv", "4"),
}
CPU = "steps a CPU second of the busiest worker"
ADAM = f3.Adam(lr=5e-4)


def sizes(options: argparse.Namespace) -> list[int]:
    return [784, *[options.width] * options.depth, 10]


def samples(batch: int, batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """So many batches of random samples, of 784 inputs and 10 classes."""
    generator = torch.Generator().manual_seed(0)
    count = batch * batches
    return torch.randn(count, 784, generator=generator), torch.randint(10, (count,), generator=generator)


class Timed:
    """Wall clock and CPU seconds inside."""

    def __enter__(self) -> Timed:
        self.cpu, self.wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu, self.wall = time.process_time() - self.cpu, time.perf_counter() - self.wall


def by_trainer(
    model: Callable[[], f3.Sequential], batch: int, batches: int, epochs: int, **settings: object
) -> tuple[Timed, int]:
    """(times, steps) of a fit to so many batches, after one of a few steps."""
    x, y = samples(batch, batches)
    for rows, visits in ((5 * batch, settings.get("visits", 1)), (len(x), epochs)):
        torch.manual_seed(0)
        trainer = f3.Trainer(model(), "bce", ADAM, batch_size=batch, device="cpu", **settings)
        train = f3.Dataset.from_tensors(x[:rows], y[:rows])
        trainer.check(train, None, visits, visits)  # and the stages are measured
        with Timed() as timed:
            trainer.fit(train, visits, eval_every=visits)
    return timed, trainer.result.steps


def by_schedule(options: argparse.Namespace, zbv: bool, microbatches: int) -> tuple[Timed, int]:
    """(times, steps) of torch's own pipeline on two processes."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleZBVZeroBubble

    join("auto", 1)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    layers = []
    for i, o in zip(sizes(options), sizes(options)[1:], strict=False):
        layers += [nn.Sequential(nn.Linear(i, o), nn.Tanh() if o != 10 else nn.Identity())]
    count = 2 * world if zbv else world
    cuts = [round(len(layers) * n / count) for n in range(count + 1)]
    own = [rank, count - 1 - rank] if zbv else [rank]
    modules = {place: nn.Sequential(*layers[cuts[place] : cuts[place + 1]]) for place in own}
    stages = [PipelineStage(module, place, count, torch.device("cpu")) for place, module in modules.items()]
    optimizer = torch.optim.Adam([p for m in modules.values() for p in m.parameters()], lr=ADAM.lr, fused=True)
    loss = nn.functional.cross_entropy
    make = ScheduleZBVZeroBubble if zbv else Schedule1F1B
    schedule = make(stages if zbv else stages[0], microbatches, loss_fn=loss)
    x, y = samples(options.batch, min(options.steps, 50))
    batches = list(zip(x.split(options.batch), y.split(options.batch), strict=True))
    has_last = count - 1 in own

    def step(number: int) -> None:
        inputs, target = batches[number % len(batches)]
        schedule.step(*([inputs] if 0 in own else []), **({"target": target, "losses": []} if has_last else {}))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for number in range(5):
        step(number)
    dist.barrier()
    with Timed() as timed:
        for number in range(options.steps):
            step(number)
        dist.barrier()
    return timed, options.steps


def child(options: argparse.Namespace) -> None:
    """One worker's process."""
    processes, threads, kind, argument = RUNS[options.child]
    torch.set_num_threads(threads)
    if kind in ("f3", "bp"):
        settings = {"pipeline": argument} if kind == "f3" else {"method": "bp", "data_parallel": int(argument)}
        batches = min(options.steps, 50)  # no row is read while it is on its way, but at the epoch's ends
        found = by_trainer(lambda: f3.models.MLP(sizes(options)), options.batch, batches, options.steps // batches, **settings)
    else:
        found = by_schedule(options, kind == "zbv", int(argument))
    tell(*found, threads if processes == 1 else 1)


def tell(timed: Timed, steps: int, cores: int) -> None:
    """The figures of a worker's process that used so many cores, as a line of JSON for `launched`."""
    found = {
        "rank": int(os.environ.get("RANK", 0)),
        "steps_per_second": steps / timed.wall,
        "steps_per_cpu_second": steps / (timed.cpu / cores),
        "idle": max(0.0, 1 - timed.cpu / timed.wall / cores),
        "memory": peak_memory_bytes(torch.device("cpu")),
    }
    part()
    sys.stdout.write(f"\n@{json.dumps(found)}\n")


def launched(processes: int, module: str, *arguments: str) -> list[dict]:
    """What each of so many processes of a module has told, by rank. Raises RuntimeError where one has failed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = [line.partition("@")[2] for line in done.stdout.splitlines() if line.startswith("@")]
    if done.returncode or len(lines) != processes:
        said = [line for line in done.stderr.splitlines() if "Error" in line or "error:" in line or "terminate" in line]
        raise RuntimeError((said or ["no output"])[0])
    return sorted(map(json.loads, lines), key=lambda found: found["rank"])


def measured(name: str, options: argparse.Namespace) -> list[dict]:
    """What the workers of one run say."""
    own = (f"--{key}={getattr(options, key)}" for key in ("batch", "steps", "depth", "width"))
    return launched(RUNS[name][0], "bench.pipeline", "--child", name, *own)


def rows_of(runs: dict[tuple[str, int], list[list[dict]]]) -> list[dict]:
    """Steps a second of every run over its rounds, the idle part of its workers, and the memory of the largest one."""
    rows = []
    for (name, batch), rounds in runs.items():
        place = {"x_name": "batch", "part": f"batch {batch}"}
        rows += [
            row(name, batch, "steps/s", [workers[0]["steps_per_second"] for workers in rounds], **place),
            row(name, batch, CPU, [min(w["steps_per_cpu_second"] for w in workers) for workers in rounds], **place),
            row(name, batch, "idle, %", [100 * sum(w["idle"] for w in workers) / len(workers) for workers in rounds], **place),
            row(name, batch, "memory of a worker, MiB", [max(w["memory"] for w in ws) / 2**20 for ws in rounds], **place),
        ]
    return rows


def measure(options: argparse.Namespace, output: Path, say: Callable[[str], None]) -> None:
    runs: dict[tuple[str, int], list[list[dict]]] = {}
    failed: dict[str, str] = {}
    loads = []
    setting = {"sizes": [784, f"{options.width} x {options.depth}", 10], "rounds": options.rounds, "cores": os.cpu_count()}
    for _ in range(options.rounds):
        for batch, steps in zip(options.batches, options.steps_of, strict=True):
            options.batch, options.steps = batch, steps
            for name, (_, _, kind, argument) in RUNS.items():
                if kind in ("1f1b", "zbv") and batch % int(argument):
                    continue  # microbatches of one size only
                loads.append(os.getloadavg()[0])
                with noted(failed, f"{name}, batch {batch}"):
                    workers = measured(name, options)
                    runs.setdefault((name, batch), []).append(workers)
                    say(f"{name}, batch {batch}: {workers[0]['steps_per_second']:.1f} steps/s")
            load = {"load_average": [round(min(loads), 2), round(max(loads), 2)], "steps": options.steps_of}
            save(output, result("pipeline", rows_of(runs), setting | load, failed=failed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="an event simulation in place of a measurement")
    parser.add_argument("--quick", action="store_true", help="a small network, few steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="default: bench/results/pipeline.json, or pipeline-simulated.json")
    for name, default in (("batch", 50), ("steps", 400), ("depth", 10), ("width", 500)):
        parser.add_argument(f"--{name}", type=int, default=default, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=tuple(RUNS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    if options.simulate:
        from .pipeline_simulation import simulate_all

        save(options.output or RESULTS / "pipeline-simulated.json", simulate_all(options.quick))
        return
    options.batches, options.steps_of = [50, 256], [300, 100]
    if options.quick:
        options.depth, options.width, options.rounds, options.batches, options.steps_of = 3, 32, 1, [8], [20]
    output = options.output or RESULTS / ("pipeline-quick.json" if options.quick else "pipeline.json")
    measure(options, output, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
