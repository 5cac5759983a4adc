"""Links between GPUs: the tensors of a visit go from device to device by NCCL, and what they are by a link of the host.

What lies in a communicator holds up all that comes behind it. So each two neighbours have one of their own, used in one
direction; heads and tensors go in the same order, and a receive is asked for when its head is there. What is rare (weights,
checkpoints, the end) and what comes back to worker 0 stay with the host. What a computation needs it waits for in the device's
own queue, and no host waits for a device but in the thread of `LaterSender`; worker 0's does, which reads and writes rows.

With gloo in NCCL's place the same is done on a CPU, where the host waits. That is how it is tested.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections import deque
from contextlib import suppress
from itertools import chain, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ..base.exceptions import InputError
from .links import SLOTS, Gone, Packet, Receiver, Sender, layout, views, watching
from .mesh import Place, agree, exchange
from .shared import IN_SLOTS

BACKEND = "nccl"  # of the groups


class DeviceLinks:
    """A process's groups of two: with the worker before it and with the next one; None where tensors go through the host."""

    into: dist.ProcessGroup | None = None
    out: dist.ProcessGroup | None = None
    aborted = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def abort(self) -> None:
        """A worker is gone: what waits for it on the device ends, so that this process can."""
        self.aborted = True
        for group in (self.into, self.out):
            if group is not None:
                with suppress(RuntimeError):
                    group.abort()


def join_devices(place: Place, device: torch.device, word: str) -> DeviceLinks:
    """The links of a process, by a `word` of PIPELINE_LINKS; every process calls this. Raises InputError, in all of them, see
    `fault`."""
    agree(place, {"pipeline link": word})
    links = DeviceLinks(device)
    if word == "host" or place.workers == 1:
        return links
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type
    pipelines = place.mesh.mesh.tolist()
    found = fault(pipelines, exchange(place, [socket.gethostname(), gpu, dist.is_nccl_available()]))
    if found is not None and BACKEND == "nccl":
        raise InputError(f"pipeline link 'nccl' {found}; use 'host'")
    groups = {  # all processes make all of them, in one order
        pair: dist.new_group(list(pair), timeout=dist.default_pg_timeout, backend=BACKEND)
        for pair in chain.from_iterable(map(pairwise, pipelines))
    }
    ranks = [None, *pipelines[place.replica], None]
    before, own, after = ranks[place.worker : place.worker + 3]
    links.into, links.out = groups.get((before, own)), groups.get((own, after))
    # Both ends make a communicator when they first use it: now, from the first worker on, and not in any order.
    one = torch.zeros(1, device=device)
    if links.into is not None:
        dist.irecv(one, group=links.into, group_src=0).wait()
        one.cpu()
    if links.out is not None:
        dist.isend(one, group=links.out, group_dst=1).wait()
        one.cpu()
    return links


def fault(pipelines: list[list[int]], said: list[list[object]]) -> str | None:
    """What stands against NCCL where processes have said `[host, GPU, whether torch has NCCL]`, by rank."""
    for rank, (_, gpu, there) in enumerate(said):
        if gpu == "cpu":
            return f"needs CUDA devices, and process {rank} has {gpu!r}"
        if not there:
            return f"needs a torch with NCCL, and that of process {rank} has none"
    for ranks in pipelines:
        seen: dict[tuple[object, ...], int] = {}
        for rank in ranks:
            other = seen.setdefault(tuple(said[rank][:2]), rank)
            if other != rank:
                return f"needs a GPU for each worker, and processes {other} and {rank} have the same one"
    return None


class DeviceSender:
    """Sends the tensors of visits to the next worker's device, and all else by `host`; `name` says who that is."""

    def __init__(self, host: Sender, links: DeviceLinks, name: str, slots: int = SLOTS) -> None:
        self.host, self.links, self.name, self.slots = host, links, name, slots
        self.pending: deque[tuple[dist.Work, Tensor]] = deque()  # what is on its way, and must not be freed

    def put(self, packet: Packet) -> None:
        """See `Sender`. Tensors are copied, so that they may be written again at once."""
        if packet.kind not in IN_SLOTS:
            self.host.put(packet)
            self._wait(0 if packet.kind == "end" else self.slots)
            return
        shapes, size = layout(packet.tensors)
        whole = torch.empty(size, dtype=torch.uint8, device=self.links.device)
        for name, place in views(whole, shapes).items():
            place.copy_(packet.tensors[name].detach())
        # The head first: there is room for it when the receive of the oldest tensors has been asked for.
        self.host.put(packet._replace(about=packet.about | {"shapes": shapes, "bytes": size}, tensors={}))
        with watching(self.name):
            self.pending.append((dist.isend(whole, group=self.links.out, group_dst=1), whole))
        self._wait(self.slots)

    def _wait(self, most: int) -> None:
        """Until so many are on their way. A device waits in its own queue, and uses the memory again behind that."""
        with watching(self.name):
            while len(self.pending) > most:
                self.pending.popleft()[0].wait()


class DeviceReceiver:
    """Receives from a `DeviceSender`, up to `slots` packets before they are asked for, each into memory of its own."""

    def __init__(self, host: Receiver, links: DeviceLinks, name: str, slots: int = SLOTS) -> None:
        self.host, self.links, self.name, self.slots = host, links, name, slots
        self.there: deque[tuple[Packet, dist.Work | None, Tensor | None]] = deque()

    def get(self) -> Packet:
        """See `Receiver`."""
        # Before the computation that follows is in the device's queue: what is asked for behind it would wait for it.
        while not self.there or (len(self.there) < self.slots and self.there[-1][0].kind != "end" and self.host.ready()):
            self._ask()
        head, work, whole = self.there.popleft()
        if work is None:
            return head
        with watching(self.name):
            work.wait()
        about = dict(head.about)
        del about["bytes"]
        return head._replace(about=about, tensors=views(whole, about.pop("shapes")))

    def _ask(self) -> None:
        head, work, whole = self.host.get(), None, None
        if head.kind in IN_SLOTS:
            whole = torch.empty(head.about["bytes"], dtype=torch.uint8, device=self.links.device)
            with watching(self.name):
                work = dist.irecv(whole, group=self.links.into, group_src=0)
        self.there.append((head, work, whole))

    def ready(self) -> bool:
        """See `Receiver`."""
        return bool(self.there) or self.host.ready()

    def close(self) -> None:
        """See `Receiver`."""
        self.host.close()


class LaterSender:
    """Sends by `host` what a device has yet to compute, from a thread that waits for it. So the last worker's host goes on, and
    hears of a worker that is gone also while the device waits for that one's tensors."""

    def __init__(self, host: Sender, links: DeviceLinks) -> None:
        self.host, self.links = host, links
        self.error: RuntimeError | None = None
        # Without a limit, at which the host would wait for the device after all: worker 0 knows how many are on their way.
        self.queue: queue.SimpleQueue[tuple[Packet, torch.cuda.Event | None]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._send, name="f3triton-results", daemon=True)
        self.thread.start()

    def put(self, packet: Packet) -> None:
        """See `Sender`."""
        cuda = self.links.device.type == "cuda"
        pinned = cuda and packet.kind in IN_SLOTS  # which a device writes while the host goes on
        copies = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor.detach(), non_blocking=pinned)
            for name, tensor in packet.tensors.items()
        }
        event = torch.cuda.Event(blocking=True) if cuda else None
        if event is not None:
            event.record()
        self.queue.put((packet._replace(tensors=copies), event))
        if packet.kind == "end":
            self.thread.join()
        if self.error is not None:
            raise self.error

    def _send(self) -> None:
        kind = ""
        while kind != "end":
            packet, event = self.queue.get()
            kind = packet.kind
            with suppress(Gone):
                try:
                    if event is not None:
                        event.synchronize()
                    if self.error is None and not self.links.aborted:  # else it is not what the device was to compute
                        self.host.put(packet)
                except RuntimeError as error:  # the device's, of which worker 0 has to hear, or Gone
                    self.error = error
                    self.host.put(Packet("error", {"text": f"the last worker: {error}", "input": False}, {}))
