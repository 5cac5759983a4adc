"""A run on several workers: what each holds, the links between them, and what the others do while worker 0 goes through
`fit`."""

from __future__ import annotations

import hashlib
import itertools
import signal
import statistics
import threading
from collections.abc import Callable
from typing import Any

import torch

from ..base.exceptions import InputError
from ..base.precision import autocast, matmul_precision, working_dtype
from ..data.identity import identity
from ..distributed.devices import DeviceReceiver, DeviceSender, LaterSender
from ..distributed.links import SLOTS, Clock, GlooReceiver, GlooSender, Gone, Receiver, Sender, ThreadLink
from ..distributed.mesh import Place, agree, exchange
from ..distributed.replicas import DataParallel, rows_alike
from ..distributed.ring import Alone, Helper, Needs, Ring, WorkerFailed, on_their_way
from ..distributed.shared import SharedReceiver, SharedSender, available, connect
from ..distributed.split import best_split, check_split, milliseconds, parts_of
from ..learn.step import Learner
from ..network.linear import Linear
from .checkpoint import Snapshot, write_part
from .identity import settings_of
from .plan import Plan
from .settings import Settings
from .state import Moments, Network, handling, require_same, restore
from .tally import Diverged

LOOKED_AT = 2000  # steps whose reuse distance is taken
Leave = Callable[[type | None, BaseException | None, object], None]


def replicas_of(seat: Place, settings: Settings) -> DataParallel | None:
    """What a worker knows of its replicas."""
    if seat.replicas == 1:
        return None
    return DataParallel(
        seat.mesh["data"].get_group(), seat.replica, seat.replicas, settings.data_parallel_by, settings.batch_size
    )


def arrange(trainer: Any, plan: Plan) -> list[int] | None:
    """How many stages each worker of a pipeline gets; None without one. Every process calls this, and all get the same.

    Raises InputError where the network cannot be divided like that, or settings, data or weights differ between processes.
    """
    seat, model, signal_ = trainer.seat, trainer.model, trainer.signal
    if seat.mesh is not None:
        facts = settings_of(trainer, identity(plan.train), plan.epochs, plan.eval_every)
        own = {"pipeline split": trainer.settings.split, "eval batch size": trainer.eval_batch_size, "torch": torch.__version__}
        agree(
            seat,
            {name.replace("_", " "): str(value) for name, value in (facts | own).items()} | {"first weights": digest(model)},
        )
    if seat.workers == 1:
        if trainer.settings.split is not None:
            raise InputError(
                f"pipeline split {trainer.settings.pipeline_split!r} is for {len(trainer.settings.split)} workers, and there "
                "is one; start as many by torchrun --nproc-per-node, or leave the split out"
            )
        return None
    # By local errors the last hidden stage learns with the output, and stages that nobody reads with the one behind them.
    last = 2 if signal_.local and len(model) > 1 else 1
    first = model.unread + 1 if signal_.local else 1
    if seat.workers + first - 1 + last - 1 > len(model):
        needs = [f"the {which} one needs {n} of them" for which, n in (("first", first), ("last", last)) if n > 1]
        least = f" ({', '.join(needs)})" * bool(needs)
        raise InputError(f"a pipeline of {seat.workers} workers needs as many stages{least}, and the network has {len(model)}")
    if any(stage.tied for stage in model.stages):
        raise InputError(
            "tied embeddings are read by the first stage and learnt by the last; a pipeline needs stages of their own"
        )
    if model.reading:
        raise InputError("shared heads read every stage's output through the last stages; a pipeline needs --local-head own")
    split = trainer.settings.split
    if split is not None:
        check_split(split, seat.workers, len(model), first, last)
    else:
        costs = []
        if seat.writes:
            costs = measured(trainer, plan)
        costs = exchange(seat, costs)[0]
        trainer.stage_milliseconds = costs
        split = best_split(costs, seat.workers, first, last)
    linear = [isinstance(stage, Linear) for stage in model.stages]
    if trainer.cuda_graph == "on" and not any(all(linear[part.start : part.stop]) for part in parts_of(split)):
        raise InputError("cuda graph 'on' needs a worker whose stages are all Linear; use 'auto'")
    return split


def measured(trainer: Any, plan: Plan) -> list[float]:
    """Milliseconds a batch of every stage."""
    x, row = first_batch(trainer, plan)
    with one_thread_each(trainer.seat), matmul_precision(trainer.precision):
        return milliseconds(trainer.model, x, row, plan.signal, trainer.arithmetic())


def describe(trainer: Any, plan: Plan) -> list[str]:
    """What each of several workers does: a line for a pipeline, with what comes of its order, and one for replicas."""
    seat, replicas, lines = trainer.seat, trainer.replicas, []
    if plan.split is not None:
        kind = "threads" if seat.threads else "processes"
        each = ", ".join(f"{cost:g}" for cost in trainer.stage_milliseconds)
        why = f"; by the milliseconds of a batch in each stage: {each}" if each else ""
        lines.append(f"pipeline of {seat.workers} {kind}: {', '.join(map(str, plan.split))} stages{why}")
        lines += reuse_lines(trainer, plan)
    if replicas is not None and trainer.method != "bp":
        rows = trainer.batch_size * plan.train.positions
        lines.append(replicas.describe(trainer.model, rows, rows_are_alike(trainer, plan)))
    return lines


def reuse_lines(trainer: Any, plan: Plan) -> list[str]:
    """After how many steps a batch needs the last of the rows that it reads, and whether a pipeline has to wait for them."""
    if plan.errors is None:
        return []
    order, needs, found, number = trainer.order_of(plan, torch.device("cpu")), Needs(plan.errors[1]), [], 0
    for visit in itertools.islice(itertools.chain.from_iterable(map(order.visits, range(plan.epochs))), LOOKED_AT):
        number += 1
        needed = needs.of(visit.row, visit.teach == "signal", number)
        found += [number - needed] if needed else []
    if not found:
        return []
    waiting = sum(distance < trainer.seat.workers for distance in found) / number
    line = f"reuse distance: {min(found)} steps or more, {statistics.median_low(found)} mostly; shorter than the pipeline in "
    lines = [f"{line}{waiting:.1%} of the steps"]
    if waiting > 0.05:
        way = "take --window-order turns, or fewer workers" if trainer.windows is not None else "take fewer workers"
        lines.append(f"warning: in those the pipeline runs empty; {way}")
    return lines


def first_batch(trainer: Any, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """`(x [M, ...], row [rows, R])`: the first samples, and errors as good as any."""
    train, dtype = plan.train, working_dtype(trainer.model)
    index = torch.arange(min(trainer.batch_size, len(train)), device=train.device)
    size = len(index) * train.positions, trainer.error_rank or train.outputs
    row = torch.rand(size, generator=torch.Generator().manual_seed(0)).to(trainer.device, dtype)
    return train.fetch(index, dtype).to(trainer.device), row


def rows_are_alike(trainer: Any, plan: Plan) -> bool:
    """See `replicas.rows_alike`."""
    modes = [(module, module.training) for module in trainer.model.modules()]
    trainer.model.eval()
    with autocast(trainer.device, trainer.compute_dtype):
        alike = rows_alike(trainer.model, *first_batch(trainer, plan), trainer.seat.replicas)
    for module, mode in modes:
        module.training = mode
    return alike and trainer.settings.reach == 1  # what goes back through a stage is not compared


class one_thread_each:
    """torch's own threads divided among the workers that are threads, inside; so it is with the processes of torchrun."""

    def __init__(self, seat: Place) -> None:
        self.workers = seat.workers if seat.threads else 1

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(max(1, self.before // self.workers))

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def digest(model: torch.nn.Module) -> str:
    """Of all weights."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def lead(trainer: Any, plan: Plan) -> tuple[Alone, list[Learner], Leave]:
    """`(flow, others, leave)` of worker 0: how steps are done, what learns in other threads, and what is to be done at the end,
    whatever has happened."""
    seat, learner = trainer.seat, trainer.learner
    if seat.workers == 1:
        return Alone(learner, trainer.model), [], lambda *_: None
    rows = 0 if plan.errors is None else plan.errors[1]
    clock, threads, others = Clock(), [], []
    if seat.threads:
        clocks = [clock, *(Clock() for _ in range(seat.workers - 1))]
        links = [
            ThreadLink(clocks[worker], clocks[(worker + 1) % seat.workers], SLOTS if worker < seat.workers - 1 else 0)
            for worker in range(seat.workers)
        ]
        out, back = links[0], links[-1]
        for worker in range(1, seat.workers):
            others.append(trainer.learner_of(plan, worker))
            helper = Helper(others[-1], worker, links[worker - 1], links[worker], clocks[worker], write_part, shared=True)
            threads.append(threading.Thread(target=helper.serve, name=f"f3triton-worker-{worker}", daemon=True))
    else:
        out, back = ends(trainer, clock)
    classes = plan.train.task != "regression"
    ring = Ring(learner, seat.workers, out, back, clock, write_part, rows, classes, seat.threads)
    threads_of_torch = one_thread_each(seat)
    threads_of_torch.__enter__()
    for thread in threads:
        thread.start()

    def leave(kind: type | None, error: BaseException | None, trace: object) -> None:
        threads_of_torch.__exit__()
        about: dict[str, object] = {"status": trainer.result.status, "result": trainer.result.state()[1]}
        if isinstance(error, Diverged):
            about = {"status": "diverged", "step": error.step, "value": error.value}
        elif error is not None:
            about = {"status": "failed", "text": str(error) or type(error).__name__}
        if isinstance(error, Gone):
            trainer.device_links.abort()
            return
        try:
            trainer.result.workers = ring.end(about)
        except Gone:
            trainer.device_links.abort()
            if error is None:
                raise
        for thread in threads:
            thread.join()

    return ring, others, leave


def ends(trainer: Any, clock: Clock) -> tuple[Sender, Receiver]:
    """A worker's ends of the links to the next process and from the one before; every process calls this."""
    seat = trainer.seat
    group = seat.mesh["pipeline"].get_group()
    following, before = (seat.worker + 1) % seat.workers, (seat.worker - 1) % seat.workers
    names = [f"worker {following}", f"worker {before}"]
    out, back = connect(seat) if exchange(seat, available()).count(False) == 0 else (None, None)
    slots = SLOTS if following else on_their_way(seat.workers)
    peer, links = seat.peer(following), trainer.device_links
    sender: Sender = SharedSender(out, clock, names[0], slots) if out else GlooSender(peer, group, clock, names[0])
    receiver: Receiver
    if back:
        receiver = SharedReceiver(back, clock, names[1], trainer.device, copies=seat.worker == 0)
    else:
        receiver = GlooReceiver(seat.peer(before), group, clock, names[1], trainer.device, SLOTS if seat.worker else 0)
    if links.out is not None:
        sender = DeviceSender(sender, links, names[0])
    elif links.into is not None:
        sender = LaterSender(sender, links)
    return sender, receiver if links.into is None else DeviceReceiver(receiver, links, names[1])


def help_along(trainer: Any, plan: Plan, settings: dict[str, object], resume: Snapshot | None) -> None:
    """Be a worker behind worker 0 until the end, and have the whole network then.

    Raises what worker 0 has raised: Diverged, or WorkerFailed with the words of another error.
    """
    seat, result = trainer.seat, trainer.result
    trainer.model.train()
    trainer.learner = trainer.learner_of(plan, seat.worker)
    if resume is not None:
        require_same(resume, settings)
        restore({"network": Network(trainer.model), "moments": Moments(trainer.learner)}, resume)
    clock = Clock()
    out, into = ends(trainer, clock)
    helper = Helper(trainer.learner, seat.worker, into, out, clock, write_part, shared=False)
    # Worker 0 is told of them as well, and says what to do.
    with handling(lambda *_: None, signal.SIGINT, signal.SIGTERM), matmul_precision(trainer.precision):
        try:
            about = helper.serve()
        except Gone:
            trainer.device_links.abort()
            raise
    result.status = about["status"]
    if result.status == "diverged":
        raise Diverged(about["step"], about["value"])
    if result.status == "failed":
        raise WorkerFailed(about["text"])
    result.restore({}, about["result"])
