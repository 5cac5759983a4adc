"""Links between processes of one host: packets lie in memory that both have mapped, and a socket says where.

The kernel copies nothing but these few bytes. A visit's packet is in one of a few slots, which are used in turn and written
again when the receiver has said that it is done; what is rare and large (weights) gets memory of its own, which goes with it.
Memory comes as files without a name, so that nothing is left of a process that is killed, and a socket that is closed says at
once that it was.
"""

from __future__ import annotations

import mmap
import os
import select
import shutil
import socket
import struct
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .links import SLOTS, Clock, Gone, Packet, pack, unpack
from .mesh import Place, exchange

IN_SLOTS = ("visit", "forward")
HEADER = struct.Struct("<qq")  # bytes of the packet, and its slot (-1: none)


def connect(place: Place) -> tuple[socket.socket | None, socket.socket | None]:
    """`(out, back)`: connections to the next worker of a pipeline and from the one before; None where that is on another host,
    or the system has not what it takes. Every process calls this."""
    folder = Path(tempfile.mkdtemp(prefix="f3triton-"))
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            address, out, back = str(folder / "link"), None, None
            try:
                listener.bind(address)
                listener.listen(1)
            except OSError:  # a name that is too long
                address = ""
            addresses = exchange(place, address)
            try:
                out = socket.socket(socket.AF_UNIX)
                out.connect(addresses[place.peer((place.worker + 1) % place.workers)])
            except OSError:  # it is not here
                out = None
            if exchange(place, out is not None)[place.peer((place.worker - 1) % place.workers)]:
                back = listener.accept()[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return out, back


def available() -> bool:
    """Whether the system has what it takes."""
    return hasattr(os, "memfd_create") and hasattr(socket, "send_fds")


def mapped(file: int, size: int) -> Tensor:
    """So many bytes of an open file, for all who have it."""
    return torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)


class SharedSender:
    """Sends to the process at the other end of a connection, with so many slots; `name` says who that is."""

    def __init__(self, connection: socket.socket, clock: Clock, name: str, slots: int = SLOTS) -> None:
        self.connection, self.clock, self.name = connection, clock, name
        self.slots = [torch.empty(0, dtype=torch.uint8)] * slots
        self.next, self.used = 0, 0

    def put(self, packet: Packet) -> None:
        """See `Sender`."""
        slot, files = -1, []
        if packet.kind in IN_SLOTS:
            slot, self.next = self.next, (self.next + 1) % len(self.slots)
            self._wait()
            self.used += 1

        def memory(size: int) -> Tensor:
            if slot >= 0 and len(self.slots[slot]) >= size:
                return self.slots[slot][:size]
            files.append(os.memfd_create("f3triton"))
            os.ftruncate(files[0], size)
            whole = mapped(files[0], size)
            if slot >= 0:
                self.slots[slot] = whole
            return whole

        try:
            header = HEADER.pack(len(pack(packet, memory)), slot)
            socket.send_fds(self.connection, [header], files)
        except OSError as error:
            raise Gone(f"{self.name} is gone ({error.strerror})") from None
        finally:
            for file in files:
                os.close(file)

    def _wait(self) -> None:
        """Until a slot is free: a byte comes back for each one that is."""
        began = time.perf_counter()
        while self.used == len(self.slots):
            try:
                freed = len(self.connection.recv(self.used))
            except OSError:
                freed = 0
            if not freed:
                raise Gone(f"{self.name} is gone (connection closed)")
            self.used -= freed
        self.clock.waited += time.perf_counter() - began


class SharedReceiver:
    """Receives from the process at the other end. Tensors on the host are the slot's own until the next packet is asked for,
    unless `copies`."""

    def __init__(self, connection: socket.socket, clock: Clock, name: str, device: torch.device, copies: bool) -> None:
        self.connection, self.clock, self.name, self.device, self.copies = connection, clock, name, device, copies
        self.slots: dict[int, Tensor] = {}
        self.holds = False  # whether a slot is in use

    def get(self) -> Packet:
        """See `Receiver`."""
        self._release()
        began = time.perf_counter()
        try:
            header, files, _, _ = socket.recv_fds(self.connection, HEADER.size, 1)
        except OSError:
            header = b""
        self.clock.waited += time.perf_counter() - began
        if len(header) < HEADER.size:
            raise Gone(f"{self.name} is gone (connection closed)")
        size, slot = HEADER.unpack(header)
        if files:
            whole = self.slots[slot] = mapped(files[0], size)
            os.close(files[0])
        else:
            whole = self.slots[slot][:size]
        self.holds = slot >= 0
        if not self.holds:
            return unpack(self.slots.pop(slot), self.device)
        if not self.copies:
            return unpack(whole, self.device)
        packet = unpack(whole.clone(), self.device)
        self._release()
        return packet

    def _release(self) -> None:
        if self.holds:
            self.holds = False
            with suppress(OSError):  # the sender has ended; what it sent is there
                self.connection.send(b".")

    def ready(self) -> bool:
        """See `Receiver`."""
        return bool(select.select([self.connection], [], [], 0)[0])

    def close(self) -> None:
        """See `Receiver`."""
        self.connection.close()
