"""The ring: packets go from worker 0 through all the others and back to it.

A stage's work for a batch needs its own state after the batch before, the activations of the batch, and the batch's error
rows: nothing of later stages. So every worker takes the packets in the order in which they come, and only the rows could make
a difference. They are kept at worker 0, which reads those of a batch and sends them along, and writes what comes back in the
order of the steps. Before it reads for a batch, the rows of every step up to the last one that visited a sample of the batch
have been written (`Needs`), whoever was faster: nothing depends on time.

What is asked of everyone at a certain step (its stages for a checkpoint, the figures of a test batch, the end) is a packet too.
It meets each worker after the same step, so that nobody has to stop.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..base.data import Visit
from ..base.exceptions import InputError
from ..learn.step import F3Learner, Learner, Output
from ..network.sequential import Sequential
from .links import SLOTS, Clock, Gone, Packet, Receiver, Sender

Then = Callable[[Packet], None]
Files = dict[str, object]  # what a checkpoint's manifest says of files, by name
Write = Callable[[str, int, dict[str, Tensor]], Files]  # a worker's tensors, to a file of its own in a folder


class Alone:
    """The flow of steps of one worker: everything is done when it is asked for. `Ring` is the same of several."""

    def __init__(self, learner: Learner, model: Sequential) -> None:
        self.learner, self.model = learner, model

    def visit(self, visit: Visit, lr: float, done: Callable[[Output], None]) -> None:
        """Learn from a batch of samples; `done` gets the output when it is there, in the order of the visits."""
        done(self.learner.visit(visit, lr))

    def then(self, work: Callable[[], None]) -> None:
        """Do something when all that was asked for before is done."""
        work()

    def forward(self, x: Tensor, done: Callable[[Tensor], None]) -> None:
        """The network's output for `x [M, ...]`, in eval mode."""
        raise NotImplementedError

    def states(self, folder: str, done: Callable[[Files], None]) -> None:
        """Have each of several workers write its weights and moments to `folder`, as they are after the visits so far; `done`
        gets the files, none of one worker."""
        done({})

    def drain(self) -> None:
        """Return when everything is done."""

    def whole(self) -> None:
        """Drain, and have the weights of all workers in the model."""

    def end(self, about: dict[str, object]) -> list[dict[str, float]]:
        """No more steps, and what the others are to know of it; returns the workers' times."""
        return []

    @property
    def elsewhere(self) -> bool:
        """Whether there are others."""
        return False


class Needs:
    """`needs[t]`: the last packet before t by which a row of batch t is written. A pure function of the order."""

    def __init__(self, rows: int) -> None:
        self.last = torch.zeros(rows, dtype=torch.int64)

    def of(self, row: Tensor, reads: bool, number: int) -> int:
        """Those of the packet `number` (from 1), whose rows are `row [M]` on the host; 0 where it `reads` nothing."""
        needed = int(self.last.index_select(0, row).max()) if reads and len(row) else 0
        self.last.index_fill_(0, row, number)
        return needed


class Holding:
    """A worker's part of a model: what belongs to it, and what does not and need not be there."""

    def __init__(self, learner: F3Learner, worker: int) -> None:
        self.learner, self.model, self.worker = learner, learner.model, worker

    def owns(self, name: str) -> bool:
        """Whether a parameter or buffer of the whole model belongs to this worker; worker 0 has what is in no stage."""
        found = re.match(r"(?:stages|heads)\.(\d+)\.", name)
        return int(found[1]) in self.learner.part if found else self.worker == 0

    def weights(self) -> dict[str, Tensor]:
        """The own ones, under `network.`."""
        return {f"network.{name}": t for name, t in self.model.state_dict().items() if self.owns(name)}

    def states(self) -> dict[str, Tensor]:
        """The own weights, and the moments under `moments.`; the count of steps, which all have, is worker 0's `moments`."""
        moments = {f"moments.{name}".rstrip("."): t for name, t in self.learner.state().items() if name or self.worker == 0}
        return self.weights() | moments

    def let_go(self) -> None:
        """Free the others' weights."""
        for name, tensor in self._tensors().items():
            if not self.owns(name):
                tensor.data = tensor.new_empty(0)

    def fill(self, weights: dict[str, Tensor]) -> None:
        """Take the others' weights (`network.` and their names)."""
        for name, tensor in self._tensors().items():
            found = weights.get(f"network.{name}")
            if found is not None and not self.owns(name):
                tensor.data = found.to(tensor.device)

    def _tensors(self) -> dict[str, Tensor]:
        kept = self.model.state_dict().keys()
        return {n: t for n, t in [*self.model.named_parameters(), *self.model.named_buffers()] if n in kept}


def on_their_way(workers: int) -> int:
    """How many packets are between worker 0 and worker 0, at most: with more all would wait for room on the way back."""
    return (workers - 1) * (SLOTS + 1) + 1


class Ring(Alone):
    """Worker 0's end. `learner` has the store and the first stages, `write` writes for a checkpoint, `rows` is the number of
    rows of the store (0: none), `classes`: whether targets are one-hot; `shared`: whether all workers have one model between
    them (threads).
    """

    def __init__(
        self,
        learner: F3Learner,
        workers: int,
        out: Sender,
        back: Receiver,
        clock: Clock,
        write: Write,
        rows: int,
        classes: bool,
        shared: bool,
    ) -> None:
        super().__init__(learner, learner.model)
        self.workers, self.out, self.back, self.clock, self.classes = workers, out, back, clock, classes
        self.holding, self.write, self.shared, self.needs = Holding(learner, 0), write, shared, Needs(rows)
        self.bound = on_their_way(workers)
        self.sent = self.returned = 0
        self.waiting: deque[Then] = deque()
        self.after: deque[tuple[int, Callable[[], None]]] = deque()
        self.ended = False

    @property
    def elsewhere(self) -> bool:
        return True

    def visit(self, visit: Visit, lr: float, done: Callable[[Output], None]) -> None:
        learner = self.learner
        self.clock.step()
        if visit.window is not None:
            learner.data.load(visit.window)
        if learner.store is not None:
            reads = visit.teach == "signal"
            needed = self.needs.of(visit.row, reads, self.sent + 1)
            while self.returned < needed:
                self._take()
        visit = visit._replace(index=visit.index.to(learner.data.device))
        x, target, row, split = learner.given(visit)
        hidden = learner.teaches(visit)
        output, _ = learner.part_step(x, target, row, hidden, lr, split)
        tensors = {"x": output.a, "target": target.argmax(-1) if self.classes else target}
        tensors |= {} if row is None else {"row": row}

        def came_back(packet: Packet) -> None:
            found = packet.tensors
            learner.signal.after(visit, found.get("left"), target, learner.store)
            a = found.get("a")
            done(Output(a, None if a is None else target, found.get("losses"), found.get("hits")))

        about = {"lr": lr, "hidden": hidden, "split": split, "outputs": target.shape[1]}
        self._send(Packet("visit", about, tensors), came_back)

    def then(self, work: Callable[[], None]) -> None:
        if self.returned == self.sent:
            work()
        else:
            self.after.append((self.sent, work))

    def forward(self, x: Tensor, done: Callable[[Tensor], None]) -> None:
        self._send(Packet("forward", {}, {"x": self.learner.forward(x)}), lambda packet: done(packet.tensors["x"]))

    def states(self, folder: str, done: Callable[[Files], None]) -> None:
        own: Files = {}
        self._send(Packet("states", {"folder": folder, "files": {}}, {}), lambda packet: done(own | packet.about["files"]))
        own |= self.write(folder, 0, self.holding.states())  # while the others write theirs

    def drain(self) -> None:
        while self.returned < self.sent:
            self._take()

    def whole(self) -> None:
        if not self.shared:
            self._send(Packet("weights", {}, {}), lambda packet: self.holding.fill(packet.tensors))
        self.drain()

    def end(self, about: dict[str, object]) -> list[dict[str, float]]:
        if self.ended:
            return []
        self.ended = True
        weights = {}
        if about.get("status") in ("completed", "interrupted") and not self.shared:
            weights = {f"network.{name}": tensor for name, tensor in self.model.state_dict().items()}
        times = self.clock.times(0, len(self.learner.part))
        self.out.put(Packet("end", about | {"times": [times]}, weights))
        while (packet := self.back.get()).kind != "end":
            pass
        self.back.close()
        return packet.about["times"]

    def _send(self, packet: Packet, then: Then) -> None:
        while self.back.ready():
            self._take()
        while self.sent - self.returned >= self.bound:
            self._take()
        self.sent += 1
        self.waiting.append(then)
        self.out.put(packet)

    def _take(self) -> None:
        """What has come back next, and what was to be done then."""
        packet = self.back.get()
        if packet.kind == "error":
            raise (InputError if packet.about["input"] else WorkerFailed)(packet.about["text"])
        self.returned += 1
        self.waiting.popleft()(packet)
        while self.after and self.after[0][0] <= self.returned:
            self.after.popleft()[1]()


class WorkerFailed(RuntimeError):
    """Something went wrong at another worker."""


class Helper:
    """A worker behind worker 0: the same `learn` over its own stages, for what comes in at `into`, results to `out`."""

    def __init__(
        self, learner: F3Learner, worker: int, into: Receiver, out: Sender, clock: Clock, write: Write, shared: bool
    ) -> None:
        self.learner, self.worker, self.into, self.out, self.clock = learner, worker, into, out, clock
        self.holding, self.write, self.shared = Holding(learner, worker), write, shared
        if not shared:
            self.holding.let_go()

    def serve(self) -> dict[str, object]:
        """Work until the end; returns what worker 0 says of it. What goes wrong here is told to worker 0, which ends it."""
        failed: BaseException | None = None
        while True:
            packet = self.into.get()
            if packet.kind == "end":
                times = self.clock.times(self.worker, len(self.learner.part))
                if not self.shared:
                    self.holding.fill(packet.tensors)
                self.out.put(packet._replace(about=packet.about | {"times": [*packet.about["times"], times]}))
                self.into.close()
                return packet.about
            if failed is not None:
                continue
            try:
                packet = packet if packet.kind == "error" else getattr(self, f"_{packet.kind}")(packet)
            except Gone:
                raise
            except Exception as error:
                failed = error
                text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                packet = Packet("error", {"text": f"worker {self.worker}: {text}", "input": isinstance(error, InputError)}, {})
            self.out.put(packet)

    def _visit(self, packet: Packet) -> Packet:
        self.clock.step()
        given, about = packet.tensors, packet.about
        target = given["target"]
        if target.dim() == 1:
            target = functional.one_hot(target, about["outputs"]).to(self.learner.dtype)
        row = given.get("row")
        output, left = self.learner.part_step(given["x"], target, row, about["hidden"], about["lr"], about["split"])
        if self.learner.last is None:
            return packet._replace(tensors=given | {"x": output.a})
        found = {"a": output.a, "left": left, "losses": output.sample_losses, "hits": output.sample_hits}
        return Packet("visit", {}, {name: tensor for name, tensor in found.items() if tensor is not None})

    def _forward(self, packet: Packet) -> Packet:
        return packet._replace(tensors={"x": self.learner.forward(packet.tensors["x"])})

    def _weights(self, packet: Packet) -> Packet:
        return packet._replace(tensors=packet.tensors | self.holding.weights())

    def _states(self, packet: Packet) -> Packet:
        files = self.write(packet.about["folder"], self.worker, self.holding.states())
        return packet._replace(about=packet.about | {"files": packet.about["files"] | files})


def lines_of(times: list[dict[str, float]]) -> list[str]:
    """The workers' times, for people."""
    each = "worker {worker}: {stages} stages, busy {busy_ms:.2f} ms a step, waiting {waiting_ms:.2f} ms"
    return [each.format(**one) for one in times]
