"""What is in a store on disk: `python -m f3triton.error_store inspect PATH`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...base.exceptions import InputError
from ...base.text import readable_bytes, short
from .folder import take_lock
from .format import CHUNK, Generation, Kind, read_manifest, verify
from .mapped import MappedRows

EDGES = [a * 10.0**power for power in range(-6, 0) for a in (1, 3)] + [1.0]  # of the histogram's bins
BAR = 40  # characters
LARGEST = 1 << 26  # entries that are looked at, at most


def inspect(path: str | Path) -> Iterator[str]:
    """Lines about a store: what it holds, whether its files are as they were committed, and statistics of its last rows.

    Changes nothing. Raises InputError for a store that is damaged; of one that a run is using, only the manifest is read.
    """
    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    kind = manifest.kind
    yield f"error store {str(folder)!r}"
    yield f"  rows: {kind.samples:,} of {kind.width:,} entries, {kind.codec}, {kind.row_bytes:,} bytes each"
    data = ", ".join(f"{short(key)[1:-1]} {short(value)}" for key, value in (kind.data or {}).items())
    yield f"  data set: {data or 'not said'}"
    lock = take_lock(folder, shared=True)
    try:
        for generation in manifest.generations.values():
            if lock is not None:
                verify(folder, kind, generation)
            yield (
                f"  epoch {generation.epoch}: {generation.file}, {readable_bytes(generation.bytes)}, "
                f"{generation.carried:,} rows carried forward, {'not checked' if lock is None else 'whole'}"
            )
        if not manifest.generations:
            yield "  no epoch is finished: every row is its sample's target"
        elif lock is None:
            yield "  a run is using the store: its rows are not read"
        else:
            yield from statistics(folder, kind, manifest.generations[max(manifest.generations)])
    finally:
        if lock is not None:
            os.close(lock)


def statistics(folder: Path, kind: Kind, generation: Generation) -> Iterator[str]:
    """Lines about the rows of one generation: how large they are, and a histogram of each row's largest magnitude."""
    whole = kind.make_codec()
    file = MappedRows(folder / generation.file, kind, whole.storage, writable=False)
    codec = getattr(whole, "each", whole)  # of a sample's positions one by one: all together they may be large
    every = kind.samples * whole.positions
    lines = min(every, max(1, LARGEST // kind.width))
    edges = torch.tensor([0.0, *EDGES], dtype=torch.float64)
    counts = torch.zeros(len(edges) + 1, dtype=torch.int64)
    odd, total, square, low, high = 0, 0.0, 0.0, torch.inf, -torch.inf
    for start in range(0, lines, step := max(1, CHUNK // (codec.row_bytes + 8 * kind.width))):
        rows = codec.decode(file.rows.view(every, -1)[start : min(start + step, lines)].clone()).double()  # [<= step, C]
        file.touch(len(rows))
        finite = rows.isfinite().all(1)
        odd += int((~finite).sum())
        rows = rows[finite]
        if not len(rows):
            continue
        counts += _counts(rows.abs().amax(1), edges)
        total, square = total + float(rows.sum()), square + float(rows.square().sum())
        low, high = min(low, float(rows.min())), max(high, float(rows.max()))
    file.close()
    entries = (lines - odd) * kind.width
    some = f", the first {lines:,} of {every:,} rows" * (lines < every)
    yield f"entries of epoch {generation.epoch}{some}"
    if entries:
        mean = total / entries
        yield f"  smallest {low:.4g}, largest {high:.4g}, mean {mean:.4g}, root mean square {(square / entries) ** 0.5:.4g}"
    if odd:
        yield f"  {odd:,} rows hold NaN or infinity"
    yield "rows by their largest magnitude"
    names = ["0", f"to {EDGES[0]:g}", *(f"to {edge:g}" for edge in EDGES[1:]), f"over {EDGES[-1]:g}"]
    most = max(1, int(counts.max()))
    for name, count in zip(names, counts.tolist(), strict=True):
        bar = "#" * (-(-count * BAR // most))
        yield f"  {name:>9s} {count:13,d} {100 * count / lines:5.1f} % {bar}".rstrip()


def _counts(values: Tensor, edges: Tensor) -> Tensor:
    """How many values `[M]` are 0, up to each further edge, and beyond the last."""
    return torch.bincount(torch.bucketize(values, edges), minlength=len(edges) + 1)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 2 for a store that is damaged or not there."""
    import argparse
    import sys

    parser = argparse.ArgumentParser(prog="python -m f3triton.error_store", description="Look into a store of error rows.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="print what a store holds, and check every byte of it")
    command.add_argument("path", metavar="PATH", help="the store's folder, as given to --error-store")
    options = parser.parse_args(arguments)
    try:
        for line in inspect(options.path):
            print(line)
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0
