"""Links: what one worker sends to the next, in order, with a few packets on the way.

Between threads a link is a queue. Between processes of one host it is memory that both have (see `shared`), and between others
torch.distributed's `isend` and `irecv` by gloo, which moves bytes of the host; a thread at the receiving end has the next
packets there before they are asked for. That thread waits inside torch, which lets other threads of Python run.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

SLOTS = 4  # packets on a link
ALIGNED = 64  # bytes at which each tensor of a packet begins
SIZE_TAG, BYTES_TAG = 1, 2


class Packet(NamedTuple):
    """What travels: its kind, numbers and words (of JSON's types) about it, and tensors by name."""

    kind: str
    about: dict[str, object]
    tensors: dict[str, Tensor]


class Clock:
    """Seconds that a worker has waited for others, and the moment of its first visit."""

    def __init__(self) -> None:
        self.waited, self.began, self.steps = 0.0, 0.0, 0

    def step(self) -> None:
        """A visit is about to be done."""
        if not self.steps:
            self.waited, self.began = 0.0, time.perf_counter()
        self.steps += 1

    def times(self, worker: int, stages: int) -> dict[str, float]:
        """Milliseconds a step, since the first one."""
        each = 1000 / max(self.steps, 1)
        total = time.perf_counter() - self.began if self.steps else 0.0
        found = {"busy_ms": round((total - self.waited) * each, 3), "waiting_ms": round(self.waited * each, 3)}
        return {"worker": worker, "stages": stages, **found}


class Sender(Protocol):
    """The end of a link at which packets go in."""

    def put(self, packet: Packet) -> None:
        """Send; returns when there is room for one more. Raises Gone where nobody is at the other end."""


class Receiver(Protocol):
    """The end of a link at which they come out."""

    def get(self) -> Packet:
        """The next packet, when it is there. Raises Gone where nobody is at the other end."""

    def ready(self) -> bool:
        """Whether there is one now."""

    def close(self) -> None:
        """After the last packet."""


class Gone(RuntimeError):
    """A worker has ended without a word."""


class ThreadLink:
    """Both ends of a link between two threads of one process; tensors are handed over as they are. `slots` 0: no limit.

    `sender`, `receiver`: the clocks of the two workers.
    """

    def __init__(self, sender: Clock, receiver: Clock, slots: int = SLOTS) -> None:
        self.queue: queue.Queue[Packet] = queue.Queue(slots)
        self.sender, self.receiver = sender, receiver

    def put(self, packet: Packet) -> None:
        """See `Sender`."""
        if self.queue.maxsize and self.queue.full():
            began = time.perf_counter()
            self.queue.put(packet)
            self.sender.waited += time.perf_counter() - began
        else:
            self.queue.put(packet)

    def get(self) -> Packet:
        """See `Receiver`."""
        began = time.perf_counter()
        packet = self.queue.get()
        self.receiver.waited += time.perf_counter() - began
        return packet

    def ready(self) -> bool:
        """See `Receiver`."""
        return not self.queue.empty()

    def close(self) -> None:
        """See `Receiver`."""


def memory(size: int) -> Tensor:
    """So many bytes."""
    return torch.empty(size, dtype=torch.uint8)


Shapes = list[list[object]]  # [name, type, shape, first byte] of tensors that lie in one memory


def layout(tensors: dict[str, Tensor]) -> tuple[Shapes, int]:
    """Where each tensor's bytes are to be, and how many there are in all."""
    shapes, place = [], 0
    for name, tensor in tensors.items():
        shapes.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), place])
        place += -(-tensor.nbytes // ALIGNED) * ALIGNED
    return shapes, place


def views(whole: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """The tensors whose bytes lie in `whole [bytes]`."""
    found = {}
    for name, word, shape, start in shapes:
        dtype = getattr(torch, word)
        own = whole[start:][: torch.Size(shape).numel() * dtype.itemsize]
        found[name] = own.view(dtype).view(shape) if len(own) else own.new_empty(shape, dtype=dtype)
    return found


def pack(packet: Packet, memory: Callable[[int], Tensor] = memory) -> Tensor:
    """A packet as bytes, in `memory` of that size: the length of a JSON text, the text, and the tensors' bytes."""
    shapes, size = layout(packet.tensors)
    text = json.dumps([packet.kind, packet.about, shapes]).encode()
    head = -(-(8 + len(text)) // ALIGNED) * ALIGNED
    whole = memory(head + size)
    whole[:8].view(torch.int64)[0] = len(text)
    whole[8 : 8 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    for name, place in views(whole[head:], shapes).items():
        place.copy_(packet.tensors[name].detach())
    return whole


def unpack(whole: Tensor, device: torch.device) -> Packet:
    """The packet of such bytes, its tensors on `device`."""
    length = int(whole[:8].view(torch.int64)[0])
    kind, about, shapes = json.loads(whole[8 : 8 + length].numpy().tobytes())
    head = -(-(8 + length) // ALIGNED) * ALIGNED
    return Packet(kind, about, {name: tensor.to(device) for name, tensor in views(whole[head:], shapes).items()})


class GlooSender:
    """Sends to the process of rank `peer`; `name` says who that is."""

    def __init__(self, peer: int, group: dist.ProcessGroup, clock: Clock, name: str) -> None:
        self.peer, self.group, self.clock, self.name = peer, group, clock, name
        self.pending: deque[tuple[list[dist.Work], list[Tensor]]] = deque()  # what is on its way, and must not be freed

    def put(self, packet: Packet) -> None:
        """See `Sender`."""
        whole = pack(packet)
        size = torch.tensor([whole.numel()])
        try:
            works = [dist.isend(part, self.peer, self.group, tag) for part, tag in ((size, SIZE_TAG), (whole, BYTES_TAG))]
            self.pending.append((works, [size, whole]))
            began = time.perf_counter()
            while len(self.pending) > (packet.kind != "end"):
                for work in self.pending.popleft()[0]:
                    work.wait()
            self.clock.waited += time.perf_counter() - began
        except RuntimeError as error:
            raise Gone(f"{self.name} is gone ({short(error)})") from None


class GlooReceiver:
    """Receives from the process of rank `peer` until an `end`; `slots` 0: as many packets as come."""

    def __init__(
        self, peer: int, group: dist.ProcessGroup, clock: Clock, name: str, device: torch.device, slots: int = SLOTS
    ) -> None:
        self.peer, self.group, self.clock, self.name, self.device = peer, group, clock, name, device
        # Of the slots, one is in the thread's hands, and one at the sender.
        self.queue: queue.Queue[Packet | Gone] = queue.Queue(max(1, slots - 2) if slots else 0)
        self.thread = threading.Thread(target=self._receive, name="f3triton-link", daemon=True)
        self.thread.start()

    def _receive(self) -> None:
        try:
            while True:
                size = torch.empty(1, dtype=torch.int64)
                dist.irecv(size, self.peer, self.group, SIZE_TAG).wait()
                whole = torch.empty(int(size), dtype=torch.uint8)
                dist.irecv(whole, self.peer, self.group, BYTES_TAG).wait()
                packet = unpack(whole, self.device)
                self.queue.put(packet)
                if packet.kind == "end":
                    return
        except (RuntimeError, ValueError) as error:
            self.queue.put(Gone(f"{self.name} is gone ({short(error)})"))

    def get(self) -> Packet:
        """See `Receiver`."""
        began = time.perf_counter()
        packet = self.queue.get()
        self.clock.waited += time.perf_counter() - began
        if isinstance(packet, Gone):
            raise packet
        return packet

    def ready(self) -> bool:
        """See `Receiver`."""
        return not self.queue.empty()

    def close(self) -> None:
        """See `Receiver`. A thread that is still on its way out of torch when Python ends would abort the process."""
        self.thread.join()


@contextmanager
def watching(who: str) -> Iterator[None]:
    """Inside, what gloo or NCCL says of a lost connection to `who` raises Gone."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise Gone(f"{who} is gone ({short(error)})") from None


def short(error: Exception) -> str:
    """What gloo says of a lost connection, without where in its source."""
    return str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0].rstrip(".")
