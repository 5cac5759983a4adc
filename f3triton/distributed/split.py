"""Which stages a worker holds: stages in a row, so that the slowest worker is as fast as can be."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence as Numbers

import torch
from torch import Tensor

from ..base.exceptions import InputError
from ..base.precision import autocast
from ..base.seeds import drawing
from ..learn.signal import Signal
from ..network.sequential import Sequential
from ..network.stage import Stage
from ..network.updater import Arithmetic, Updater

REPEATS = 5


def best_split(costs: Numbers[float], workers: int, first: int = 1, last: int = 1) -> list[int]:
    """How many of the stages, in a row, each of so many `workers` gets: the one with the largest sum of `costs` has the
    smallest there can be. The first one gets at least `first`, the last one `last`.

    By dynamic programming over the first n stages and the first w workers; of equal splits the one whose last workers have the
    fewest stages.
    """
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    stages = len(costs)
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]  # by worker: stages so far -> (largest sum, where its own begin)
    for worker in range(1, workers + 1):
        found = {}
        for end in range(worker, stages + 1):
            if worker == workers and end < stages:
                continue
            own = max(first if worker == 1 else 1, last if worker == workers else 1)
            choices = [
                (max(sum_, before[end] - before[start]), -start) for start, (sum_, _) in best[-1].items() if end - start >= own
            ]
            if choices:
                largest, start = min(choices)
                found[end] = largest, -start
        best.append(found)
    split, end = [], stages
    for found in reversed(best[1:]):
        split.append(end - found[end][1])
        end = found[end][1]
    return split[::-1]


def parts_of(split: Numbers[int]) -> list[range]:
    """The places of each worker's stages."""
    ends = [sum(split[: number + 1]) for number in range(len(split))]
    return [range(end - count, end) for end, count in zip(ends, split, strict=True)]


def check_split(split: Numbers[int], workers: int, stages: int, first: int, last: int) -> None:
    """Raise InputError where these are not the stages of so many workers."""
    if len(split) != workers or sum(split) != stages or min(split) < 1 or split[0] < first or split[-1] < last:
        text, rest = ",".join(map(str, split)), f", of which the last worker needs {last}" * (last > 1)
        rest += f", of which the first worker needs {first}" * (first > 1)
        raise InputError(
            f"pipeline split '{text}' must be {workers} numbers of at least 1, one a worker, with the sum {stages}, the "
            f"network's stages{rest}"
        )


def milliseconds(model: Sequential, x: Tensor, row: Tensor | None, signal: Signal, how: Arithmetic) -> list[float]:
    """The time of each stage for a batch `x [M, ...]`: the best of a few steps of a copy, which are forgotten.

    `row [M, R]`: errors, where stages learn from them.
    """
    found = []
    last = len(model) - 1
    for place, stage in enumerate(model.stages):
        twin = copy.deepcopy(stage)
        learns = place == last or signal.source != "none"
        updater = Updater(twin, how, None if learns else [])
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            with torch.no_grad(), drawing(x.device, how.seed, "measure", place):
                h = _run(twin, x, row if place < last and not signal.local else None, updater, learns)
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            times.append(time.perf_counter() - began)
        if model.unread <= place < model.read:  # the reading, forward and backward
            with drawing(x.device, how.seed, "measure", place):
                times = [seconds + 3 * _forward_seconds(model, place, h) for seconds in times]
        found.append(round(1000 * min(times), 3))
        x = h
    return found


def _run(stage: Stage, x: Tensor, row: Tensor | None, updater: Updater, learns: bool) -> Tensor:
    step = updater.begin(0.0)
    if not learns:
        with autocast(x.device, step.compute_dtype):
            return stage(x)
    if row is not None:
        return stage.learn(x, row, step)
    h, kept = stage.keep(x, step)
    stage.finish(kept, torch.zeros_like(h), step)
    return h


def _forward_seconds(model: Sequential, place: int, h: Tensor) -> float:
    began = time.perf_counter()
    with torch.no_grad():
        model.answer(place, h)
    return time.perf_counter() - began
