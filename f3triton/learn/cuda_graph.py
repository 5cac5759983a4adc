"""A step as one CUDA graph: what a small network costs is launches, and a graph has one.

The batch's sample indices, the learning rate and the step count lie in device memory, where the captured kernels read them;
a replay changes weights, moments and error rows in place and leaves output and target in a ring, to be looked at later. The
first steps run as usual, on a stream of their own, which compiles the kernels and fills the caches that a capture must not
grow; a batch of another size, such as an epoch's short last one, runs as usual too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 2  # steps before the capture

Learn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class GraphedStep:
    """`learn(index [batch], lr [])` as a graph; its two results `[batch, C]` are kept for `slots` further calls.

    `learn` must do all its work on the device, in place, and may not depend on anything that changes from step to step but
    its arguments. On a CPU there are no graphs, and it is called every time: the same tensors, for tests.
    """

    def __init__(self, learn: Learn, batch: int, slots: int, device: torch.device) -> None:
        self.learn, self.batch, self.slots, self.device = learn, batch, slots, device
        self.index = torch.zeros(batch, dtype=torch.int64, device=device)
        self.lr = torch.zeros((), device=device)
        self.lr_there: float | None = None
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)  # where the coming step leaves its results
        self.rings: tuple[Tensor, ...] = ()  # [slots, batch, C] each
        self.graph: torch.cuda.CUDAGraph | None = None
        self.steps = 0

    def _run(self) -> None:
        results = self.learn(self.index, self.lr)
        if not self.rings:
            self.rings = tuple(result.new_zeros(self.slots, *result.shape) for result in results)
        for ring, result in zip(self.rings, results, strict=True):
            ring.index_copy_(0, self.slot, result.unsqueeze(0))
        self.slot.add_(1).remainder_(self.slots)

    def __call__(self, index: Tensor, lr: float) -> tuple[Tensor, ...]:
        """One step on the samples `index [batch]`; the results' memory is used again `slots` calls later."""
        self.index.copy_(index, non_blocking=True)
        if lr != self.lr_there:
            self.lr.fill_(lr)
            self.lr_there = lr
        if self.device.type != "cuda":
            self._run()
        elif self.graph is not None:
            self.graph.replay()
        elif self.steps < WARM_UP:
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                self._run()
            torch.cuda.current_stream(self.device).wait_stream(stream)
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # a capture runs nothing
                self._run()
            self.graph = graph
            graph.replay()
        place = self.steps % self.slots
        self.steps += 1
        return tuple(ring[place] for ring in self.rings)
