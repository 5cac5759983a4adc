"""The error store in files, against plain numpy memmap, HDF5, zarr and LMDB: random batches read and written.

    python -m bench.error_store            the whole, about half an hour and 35 GB of disk
    python -m bench.error_store --quick    a minute, in a file of its own, to see that all of it works

Every provider keeps two generations of float16 rows and does what an epoch of F3 does: for each batch of 256 samples of a
random permutation, read the old rows as float32 and write new ones. Every run is a process of its own; runs of the providers
alternate, and medians are shown. `warm`: the old rows are in the system's cache; `cold`: they were dropped from it
(`posix_fadvise`) before. Resident memory: by how much the run raised it.

A second part trains an MLP (64-500-C, batch 256) from a store in memory and from one in files, and says how long the steps
took and which share of them was spent waiting for the store's threads.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import f3triton as f3

from .common import RESULTS, result, row, save, table
from .error_store_peers import PROVIDERS, make_rows

BATCH = 256
OPTIONAL = ("h5py", "zarr", "lmdb")
SECONDS = 4.0  # after which a run stops, wherever it is
SIZES = [(60_000, 10), (60_000, 1000), (1_280_000, 10), (1_280_000, 1000)]
STEPS = [(60_000, 10), (1_280_000, 1000)]


def resident() -> tuple[int, int]:
    """(bytes now, most so far) of this process's resident memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return tuple(1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))


def drop_from_cache(folder: Path) -> None:
    """Make the system forget the contents of all files in a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def load_to_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 22):
                    pass


def work(job: dict) -> dict:
    """One run, in a process of its own: prepare a provider's files, or read and write batches and time it."""
    torch.set_num_threads(1)
    folder, samples, width = Path(job["folder"]), job["samples"], job["width"]
    provider = PROVIDERS[job["provider"]](folder, samples, width)
    if job["what"] == "prepare":
        began = time.perf_counter()
        provider.prepare()
        return {"seconds": time.perf_counter() - began}
    batches = torch.randperm(samples, generator=torch.Generator().manual_seed(job["seed"])).split(BATCH)[: job["batches"]]
    provider.begin()
    if job["what"] == "cold":
        drop_from_cache(folder)
    else:
        load_to_cache(folder)
    new = make_rows(torch.arange(BATCH), width) / 2
    before = resident()[0]
    began = time.perf_counter()
    done = 0
    for index in provider.plan(batches):
        rows = provider.read(index)
        provider.write(index, new[: len(index)])
        done += len(index)
        if done <= BATCH:
            assert torch.equal(rows, make_rows(index, width)), "rows that were not those written"
        if time.perf_counter() - began > SECONDS:
            break
    provider.drain()
    seconds = time.perf_counter() - began
    most = resident()[1]
    provider.check(index, new[: len(index)])
    provider.end()
    return {
        "rows_per_second": round(done / seconds),
        "gb_per_second": round(done * width * 2 * 2 / seconds / 1e9, 4),
        "rows": done,
        "resident_bytes": most,
        "resident_growth_bytes": max(0, most - before),
    }


def in_a_process(job: dict) -> dict:
    command = [sys.executable, "-m", "bench.error_store", "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{job}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, samples: int, width: int, rounds: int, batches: int, providers: list[str]) -> dict:
    """All providers at one size: `rounds` alternating runs, warm and cold."""
    runs: dict[str, dict[str, list[dict]]] = {name: {"warm": [], "cold": []} for name in providers}
    for name in providers:
        job = {"provider": name, "samples": samples, "width": width, "batches": batches}
        in_a_process({**job, "folder": str(folder / name.replace(" ", "-")), "what": "prepare"})
    for number in range(rounds):
        for what in ("warm", "cold"):
            for name in providers:
                job = {"provider": name, "samples": samples, "width": width, "batches": batches, "seed": number, "what": what}
                run = in_a_process({**job, "folder": str(folder / name.replace(" ", "-"))})
                runs[name][what].append(run)
                print(f"  {samples:,} x {width:,} {what} {name}: {run['rows_per_second']:,} rows/s", flush=True)
    for name in providers:
        shutil.rmtree(folder / name.replace(" ", "-"))
    return runs


def train(job: dict) -> dict:
    """Steps of an MLP, from the second epoch on, when there are rows to read: seconds a step, and the share that waited."""
    torch.set_num_threads(1)
    samples, width = job["samples"], job["width"]
    steps = min(job["steps"], samples // BATCH - 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 64, generator=generator)
    y = torch.randint(0, width, (samples,), generator=generator)
    data = f3.Dataset.from_tensors(x, y, classes=width)
    torch.manual_seed(0)
    trainer = f3.Trainer(
        f3.models.MLP([64, 500, width]), "cross-entropy", batch_size=BATCH, device="cpu", error_dtype="float16",
        error_store=job["home"],
    )  # fmt: skip
    order = torch.randperm(samples, generator=generator).split(BATCH)
    count, marks = 0, []

    def on_step(_: int) -> None:
        nonlocal count
        count += 1
        ahead = getattr(trainer.learner.store, "ahead", None)
        if count in (5, steps):  # the first four find caches cold
            marks.append((time.perf_counter(), 0.0 if ahead is None else ahead.waited))

    def batches(epoch: int) -> list[torch.Tensor]:
        nonlocal count
        count = 0
        marks.clear()
        return list(order[:1] if epoch == 0 else order[1 : steps + 1])

    before = resident()[0]
    trainer.fit(data, 2, batches=batches, on_step=on_step)
    (began, waited_before), (ended, waited) = marks
    return {
        "ms_per_step": round(1000 * (ended - began) / (steps - 5), 3),
        "waiting_percent": round(100 * (waited - waited_before) / (ended - began), 2),
        "resident_growth_bytes": resident()[1] - before,
    }


def training(folder: Path, samples: int, width: int, rounds: int, steps: int) -> dict:
    runs: dict[str, list[dict]] = {"memory": [], "files": []}
    for _ in range(rounds):
        for name, found in runs.items():
            store = folder / "store"
            job = {"samples": samples, "width": width, "steps": steps, "home": str(store) if name == "files" else name}
            found.append(in_a_process({**job, "what": "train"}))
            print(f"  training on {samples:,} x {width:,} from {name}: {found[-1]}", flush=True)
            shutil.rmtree(store, ignore_errors=True)
    return runs


def rows_of(content: dict) -> list[dict]:
    """Rows a second and resident memory by size, warm and cold; and how long training steps waited."""
    rows = []
    for size, providers in content["batches"].items():
        for name, by_heat in providers.items():
            for heat, found in by_heat.items():
                place = {"x": size, "part": f"{heat}, {size}"}
                speed, moved, grown = (
                    [run[key] for run in found] for key in ("rows_per_second", "gb_per_second", "resident_growth_bytes")
                )
                rows.append(
                    row(name, metric="rows/s", values=speed, scale="log", gb_per_second=statistics.median(moved), **place)
                )
                rows.append(row(name, metric="resident memory added, MiB", values=[value / 2**20 for value in grown], **place))
    for size, homes in content["training"].items():
        for name, found in homes.items():
            place = {"x": size, "part": f"training, {size}"}
            waited = statistics.median(run["waiting_percent"] for run in found)
            rows.append(
                row(name, metric="ms a step", values=[run["ms_per_step"] for run in found], waiting_percent=waited, **place)
            )
    return rows


def show(content: dict) -> str:
    """The result as Markdown tables."""

    def median(found: list[dict], key: str) -> float:
        return statistics.median(run[key] for run in found)

    parts, sizes = [], content["batches"]
    names = list(next(iter(sizes.values())))
    for heat in ("warm", "cold"):
        rows = [[name, *(f"{median(size[name][heat], 'rows_per_second'):,.0f}" for size in sizes.values())] for name in names]
        parts.append(table([f"rows a second, {heat}", *sizes], rows))
    rows = [
        [name, *(f"{median(size[name]['warm'], 'resident_growth_bytes') / 2**20:,.0f}" for size in sizes.values())]
        for name in names
    ]
    parts.append(table(["MiB of resident memory that the run added, warm", *sizes], rows))
    rows = [
        [size, home, f"{median(found, 'ms_per_step'):.2f}", f"{median(found, 'waiting_percent'):.1f} %"]
        for size, homes in content["training"].items()
        for home, found in homes.items()
    ]
    parts.append(table(["MLP 64-500-C", "error store", "ms a step", "of which waiting for the store's threads"], rows))
    return "\n\n".join(parts)


def installed() -> list[str]:
    """The providers whose packages are there; the others are named."""
    missing = [name for name in PROVIDERS if name in OPTIONAL and importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out, not installed (pip install 'f3triton[bench]'): {', '.join(missing)}", flush=True)
    return [name for name in PROVIDERS if name not in missing]


def size_of(text: str) -> tuple[int, int]:
    samples, _, width = text.partition("x")
    return int(samples), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    parser.add_argument("--folder", type=Path, help="where the files are put; default: a temporary folder")
    parser.add_argument("--sizes", type=size_of, nargs="+", metavar="NxC", help="of the batches; default: all four")
    parser.add_argument("--training", type=size_of, nargs="+", metavar="NxC", help="of the training; default: both")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--output", type=Path, help="default: bench/results/error-store.json, -quick.json with --quick")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # what a process of its own is to do
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        print(json.dumps(train(job) if job["what"] == "train" else work(job)))
        return
    rounds, sizes, steps = options.rounds, options.sizes or SIZES, options.training or STEPS
    if options.quick:
        rounds, sizes, steps = 1, [(60_000, 10), (20_000, 1000)], [(20_000, 1000)]
    output = options.output or RESULTS / ("error-store-quick.json" if options.quick else "error-store.json")
    folder = Path(tempfile.mkdtemp(prefix="error-store-", dir=options.folder))
    content: dict = {"batches": {}, "training": {}}

    def keep() -> None:
        save(output, result("error_store", rows_of(content), {"batch": BATCH, "rounds": rounds, "threads": 1}, **content))

    try:
        for samples, width in steps:
            found = training(folder, samples, width, rounds, 60 if options.quick else 400)
            content["training"][f"{samples:,} x {width:,}"] = found
            keep()
        for samples, width in sizes:
            found = compare(folder, samples, width, rounds, 40 if options.quick else 234, installed())
            content["batches"][f"{samples:,} x {width:,}"] = found
            keep()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(show(content))


if __name__ == "__main__":
    main()
