"""How busy workers are in a pipeline, by a simulation of its events: `python -m bench.pipeline --simulate`.

Time is counted in forward products of one worker for a whole batch; F = B = W = 1 (forward, the gradient of the input, the
gradient of the weight), whatever a schedule does with them. Of F3 a worker does F and W of a batch at once, 2 units and no B.
A packet may start at a worker when the worker is free and the packet has come over a link, which takes `delay`; links hold four
packets. Efficiency is the work of all workers over their time, from the first event to the last.

- F3: 1,000 batches go through a ring; `drain every 100` waits for the last of each 100, as an order does in which every batch
needs
  the one before (windows one after the other).
- GPipe, 1F1B, ZB1P (arXiv 2401.10241), each with as many microbatches as workers, and four times as many. GPipe and 1F1B do B
and
  W together; ZB1P does W when there is nothing else to do. A step ends for all at once (the optimizer).
- ZBV of that paper has no bubble with equal F, B and W, and twice the activations of 1F1B; it is shown as the bound that it is.

Imbalance: one worker in the middle is 20 % slower. Jitter: every task takes (1 + 30 % of a normal draw) of its time. Neither is
cured by having no bubble: nothing is faster than the slowest worker, and accuracy is not in this picture at all.
"""

from __future__ import annotations

import random

from .common import result, row

SLOTS, BATCHES = 4, 1000
WORKERS = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


class Durations:
    """What a task takes at a worker."""

    def __init__(self, workers: int, slow: float, jitter: float) -> None:
        self.draw = random.Random(7)
        self.factor = [1 + slow * (worker == workers // 2) for worker in range(workers)]
        self.jitter = jitter
        self.total = 0.0

    def of(self, worker: int, units: float) -> float:
        noise = 1 + self.jitter * self.draw.gauss(0, 1) if self.jitter else 1
        taken = units * self.factor[worker] * max(0.1, noise)
        self.total += units  # of work, at an even worker's pace
        return taken


def f3(workers: int, durations: Durations, delay: float, drain: int = 0, batches: int = BATCHES) -> float:
    """Efficiency of the ring."""
    finished = [[0.0] * workers for _ in range(SLOTS + 1)]  # of the last few batches, at each worker
    last = begin = 0.0
    for number in range(batches):
        if drain and number % drain == 0:
            begin = last + delay
        before, now = finished[(number - 1) % (SLOTS + 1)], finished[number % (SLOTS + 1)]
        oldest = list(now)  # of the batch SLOTS + 1 before: a link is full until the next worker has begun on it
        there = begin
        for worker in range(workers):
            start = max(there, before[worker])
            if worker + 1 < workers and number > SLOTS:
                start = max(start, oldest[worker + 1] - 2 * durations.factor[worker + 1])
            now[worker] = start + durations.of(worker, 2)
            there = now[worker] + delay
        last = now[-1]
    return durations.total / (workers * last)


def steps(workers: int, micro: int, kind: str, durations: Durations, delay: float) -> float:
    """Efficiency of one step of a schedule with so many microbatches, each of 1 / micro of a batch."""
    unit, split = 1 / micro, kind == "ZB1P"
    order: list[list[tuple[str, int]]] = []
    for worker in range(workers):
        warm = micro if kind == "GPipe" else min(micro, workers - worker)
        own, forward, backward = [("F", n) for n in range(warm)], warm, 0
        while backward < micro:
            own.append(("B", backward))
            backward += 1
            if forward < micro:
                own.append(("F", forward))
                forward += 1
        order.append(own)
    done: dict[tuple[str, int, int], float] = {}
    free, place, weights = [0.0] * workers, [0] * workers, [0] * workers
    waiting = list(range(workers))
    while waiting:
        moved = []
        for worker in waiting:
            while place[worker] < len(order[worker]):
                what, number = order[worker][place[worker]]
                if what == "F":
                    needed = 0.0 if worker == 0 else done.get((what, worker - 1, number))
                else:
                    needed = done.get(("F", worker, number)) if worker == workers - 1 else done.get((what, worker + 1, number))
                if needed is None:
                    break
                ready = needed + delay * (needed > 0)
                while split and weights[worker] and free[worker] + unit <= ready:  # W fills the gap
                    free[worker] += durations.of(worker, unit)
                    weights[worker] -= 1
                taken = durations.of(worker, unit * (1 if what == "F" or split else 2))
                free[worker] = done[what, worker, number] = max(free[worker], ready) + taken
                weights[worker] += split and what == "B"
                place[worker] += 1
                moved.append(worker)
        if not moved:
            raise RuntimeError("the schedule cannot go on")
        waiting = [worker for worker in waiting if place[worker] < len(order[worker])]
    for worker in range(workers):
        free[worker] += sum(durations.of(worker, unit) for _ in range(weights[worker]))
    return durations.total / (workers * max(free))


def simulate_all(quick: bool) -> dict:
    """The result file's content."""
    counts = WORKERS[:3] if quick else WORKERS
    cases = {
        "even workers": (0.0, 0.0, 0.0),
        "one worker 20 % slower": (0.2, 0.0, 0.0),
        "30 % jitter": (0.0, 0.3, 0.0),
        "links of half a forward pass": (0.0, 0.0, 0.5),
    }
    rows = []
    for part, (slow, jitter, delay) in cases.items():
        for workers in counts:

            def add(name: str, efficiency: float, part: str = part, workers: int = workers) -> None:
                rows.append(row(name, workers, "efficiency, %", 100 * efficiency, x_name="workers", part=part, scale="log"))

            add("F3", f3(workers, Durations(workers, slow, jitter), delay))
            add("F3, drained every 100 batches", f3(workers, Durations(workers, slow, jitter), delay, 100))
            for kind in ("GPipe", "1F1B", "ZB1P"):
                for times in (1, 4):
                    if workers * workers * times > 1 << 18:
                        continue  # the events of more are too many
                    name = f"{kind}, {times} x workers microbatches" if times > 1 else f"{kind}, as many microbatches"
                    micro = workers * times
                    # a microbatch's transfer is as short as it is
                    add(name, steps(workers, micro, kind, Durations(workers, slow, jitter), delay / micro))
            if not (slow or jitter or delay):
                add("bound: ZBV by its paper", 1.0)
            print(f"{part}, {workers} workers", flush=True)
    setting = {"batches": BATCHES, "slots": SLOTS, "forward, input's and weight's gradient": [1, 1, 1]}
    return result("pipeline", rows, setting, simulated=True)
