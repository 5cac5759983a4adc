"""What a run would need, before anything of it is allocated."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from ..data import Dataset, StreamDataset
from ..error_store import check_home, is_folder
from ..models.build import build
from ..network.sequential import Sequential
from ..visits.streams import check_stream
from ..visits.windows import steps_per_epoch
from .budget import Budget, describe, estimate, with_local, with_rest
from .plan import add_readings, errors_of
from .report import store_line
from .settings import Settings


def dry_run(
    options: argparse.Namespace, settings: Settings, network: dict[str, object], data: tuple[Dataset, Dataset]
) -> list[str]:
    """The budget of a run in lines for people: shapes, FLOPs, memory, its error store and its steps.

    Raises InputError where the run could not begin.
    """
    if isinstance(data[0], StreamDataset):
        check_stream(data[0], settings.windows)
    error_bytes, line = _errors(options, settings, data[0])
    budget = budget_of(settings, network, data, error_bytes, rehearsed=True)
    steps = options.epochs * steps_per_epoch(len(data[0]), settings.batch_size, settings.windows)
    visits = f"steps {steps:,}, of {settings.batch_size} sample visits each, in {options.epochs:,} epochs"
    return [*describe(budget), line, visits]


def _errors(options: argparse.Namespace, settings: Settings, train_set: Dataset) -> tuple[int, str]:
    """Bytes of the error store in memory, and a line about it."""
    found = errors_of(settings, train_set, settings.types.working)
    if found is None:
        return 0, "error store: none"
    home, rows, codec = found
    if not options.overwrite and options.resume is None:
        check_home(home, rows, codec)
    return 0 if is_folder(home) else rows * codec.row_bytes, store_line(home, rows, codec)


def budget_of(
    settings: Settings,
    network: dict[str, object],
    data: tuple[Dataset, Dataset],
    error_bytes: int = 0,
    rehearsed: bool = False,
) -> Budget:
    """The budget by arithmetic, and if it is to be `rehearsed` with the rest of a run; of the network only the shapes are
    made."""
    train_set, test_set = data
    batch = torch.zeros(min(settings.batch_size, len(train_set)), dtype=torch.int64, device=train_set.device)
    x = train_set.fetch(batch, torch.float32).to("meta")  # the first sample again and again
    with torch.device("meta"):
        shapes = build(network)
    kept = error_bytes, sum(part.nbytes for part in data)
    budget = budget_by(settings, shapes, x, train_set.outputs, train_set.positions, *kept)
    if not rehearsed:
        return budget
    steps = steps_per_epoch(len(train_set), settings.batch_size, settings.windows)
    return rehearsed_too(budget, settings, shapes, x, train_set.outputs, train_set.positions, steps, len(test_set))


def rehearsed_too(budget: Budget, *run: object) -> Budget:
    """The budget with the rest of a `run`, see `rehearsal.rehearse`; as it is where torch has not what that is made of, which
    is private to it."""
    try:
        from .rehearsal import rehearse  # a second
    except ImportError:
        return budget
    return with_rest(budget, rehearse(*run))


def budget_by(
    settings: Settings, network: Sequential, x: Tensor, outputs: int, positions: int, error_bytes: int = 0, data_bytes: int = 0
) -> Budget:
    """The budget of a network on the meta device, which gets the readings that it needs, for batches like `x [M, ...]` on it
    as well, with so many outputs at each of a sample's positions."""
    signal = settings.resolved_signal
    local = signal is not None and signal.local
    if local:
        with torch.device("meta"), torch.no_grad():
            network.prepare(x[:1], outputs, None, positions)
            add_readings(network, settings, outputs, positions)
    kept = error_bytes, data_bytes
    update = settings.moments, settings.clip_norm is not None
    budget = estimate(network, x, settings.rule, signal, settings.types, settings.error_rank, *kept, *update)
    if not local:
        return budget
    return with_local(budget, network, x, settings.reach, settings.local_positions, settings.local_candidates)
