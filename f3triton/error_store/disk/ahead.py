"""Reading before the step needs it and writing after it, in a thread each: the order of samples is known beforehand.

Both queues are bounded. A batch with a sample whose last write is still on its way is not read ahead, but when its turn has
come and the writes before it are done; so the rows are those that reading and writing in turn would give. What goes wrong
in a thread is raised where the step next reads or writes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

ASKED = 16  # batches that the disk is asked for before they are read
AHEAD = 8  # batches that are read before their turn, at most
BEHIND = 8  # batches that are written after it

Fetched = tuple[Tensor | None, Tensor | None]  # see `FileStore._stored`


@dataclass
class Batch:
    """A batch on its way: the samples `[M]` on the host and, the same, on the learner's device."""

    number: int  # over the life of the store
    there: Tensor
    index: Tensor
    rows: Future[Fetched | None] | None = None  # of None: a sample of it was still to be written
    written: bool = False


class Ahead:
    """`fetch(there) -> rows` in one thread and `put(there, rows)` in another, for batches in an order that is known.

    `ask(there)`, if any, is called in the first thread, some time before the rows are fetched.
    """

    def __init__(
        self,
        samples: int,
        ask: Callable[[Tensor], None] | None,
        fetch: Callable[[Tensor], Fetched],
        put: Callable[[Tensor, Tensor], None],
    ) -> None:
        self.ask, self.fetch, self.put = ask, fetch, put
        self.last = torch.full((samples,), -1, dtype=torch.int32)  # the last batch that each sample is in; the reader's
        self.numbers = self.done = 0  # batches that were planned, and whose writes are done
        self.now: Batch | None = None  # whose step is running
        self.behind: deque[Future[None]] = deque()
        self.waited = 0.0  # seconds that steps have waited for either thread
        self.reader = ThreadPoolExecutor(1, "error-reader")
        self.writer = ThreadPoolExecutor(1, "error-writer")

    def plan(self, batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
        """The batches in their order, on `device`; each is `now` until the next is asked for."""
        asked: deque[tuple[Tensor, Tensor]] = deque()  # (on the host, as given)
        queue: deque[Batch] = deque()
        source = iter(batches)
        try:
            while True:
                while len(asked) + len(queue) < ASKED + AHEAD and (index := next(source, None)) is not None:
                    there = index.cpu()
                    asked.append((there, index))
                    if self.ask is not None:
                        self.reader.submit(self.ask, there)
                while asked and len(queue) < AHEAD:
                    queue.append(self._begin(*asked.popleft(), device))
                if not queue:
                    return
                self.now = queue.popleft()
                yield self.now.index
                if not self.now.written:
                    self._behind(self.now.number, lambda: None)
        finally:
            self.now = None
            for batch in queue:
                if not batch.rows.cancel():
                    batch.rows.exception()  # waits for the one that is being read

    def _begin(self, there: Tensor, index: Tensor, device: torch.device) -> Batch:
        if device.type == "cuda" and index.device.type == "cpu":
            index = there.pin_memory()
        number, self.numbers = self.numbers, self.numbers + 1
        rows = self.reader.submit(self._read, there, number, device.type == "cuda")
        return Batch(number, there, index.to(device, non_blocking=True), rows)

    def _read(self, there: Tensor, number: int, pinned: bool) -> Fetched | None:
        late = bool((self.last.index_select(0, there) >= self.done).any())
        self.last.index_fill_(0, there, number)
        if late:
            return None
        rows, unvisited = self.fetch(there)
        return rows if rows is None or not pinned else rows.pin_memory(), unvisited

    def read(self) -> Fetched:
        """The rows of the batch that is `now`."""
        began = time.perf_counter()
        fetched = self._result(self.now.rows, "read")
        if fetched is None:
            self.drain()
            fetched = self.fetch(self.now.there)
        self.waited += time.perf_counter() - began
        return fetched

    def write(self, rows: Tensor) -> None:
        """Write the rows `[M, columns]` of the batch that is `now`; they must not change any more."""
        there, ready = self.now.there, None
        if rows.device.type == "cuda":
            on_device, rows = rows, torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            rows.copy_(on_device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(on_device.device))

        def work() -> None:
            if ready is not None:
                ready.synchronize()
            self.put(there, rows.cpu())

        self.now.written = True
        self._behind(self.now.number, work)

    def _behind(self, number: int, work: Callable[[], None]) -> None:
        def run() -> None:
            work()
            self.done = number + 1

        began = time.perf_counter()
        while len(self.behind) >= BEHIND or (self.behind and self.behind[0].done()):
            self._result(self.behind.popleft(), "write")
        self.waited += time.perf_counter() - began
        self.behind.append(self.writer.submit(run))

    def drain(self) -> None:
        """Return when everything is written."""
        while self.behind:
            self._result(self.behind.popleft(), "write")

    def close(self) -> None:
        """End both threads; what is still to be written is written first."""
        self.reader.shutdown(cancel_futures=True)
        self.writer.shutdown()

    @staticmethod
    def _result(future: Future, action: str) -> object:
        try:
            return future.result()
        except (OSError, RuntimeError, IndexError, MemoryError) as error:
            raise RuntimeError(f"the thread that {action}s error rows failed: {error}") from error
