"""A step as one CUDA graph: what a small network costs is launches, and a graph has one.

What changes from step to step (a batch's sample indices, or in a pipeline its activations, targets and rows; the learning rate;
the step count) lies in device memory, where the captured kernels read it; a replay changes weights, moments and error rows in
place and leaves its results in a ring, to be looked at later. The first steps run as usual, on a stream of their own, which
compiles the kernels and fills the caches that a capture must not grow; a batch of another size, such as an epoch's short last
one, runs as usual too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 2  # steps before the capture

Learn = Callable[..., Sequence[Tensor | None]]


class GraphedStep:
    """`learn(lr [], *inputs)` as a graph, for inputs that are `like` these (None: there is none); its results `[M, ...]`, or
    None, are kept until `slots` further calls.

    `learn` must do all its work on the device, in place, and may not depend on anything that changes from step to step but
    its arguments. On a CPU there are no graphs, and it is called every time: the same tensors, for tests.
    """

    def __init__(self, learn: Learn, like: Sequence[Tensor | None], slots: int, device: torch.device) -> None:
        self.learn, self.slots, self.device = learn, slots, device
        self.inputs = [None if one is None else torch.zeros_like(one, device=device) for one in like]
        self.lr = torch.zeros((), device=device)
        self.lr_there: float | None = None
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)  # where the coming step leaves its results
        self.rings: tuple[Tensor | None, ...] = ()  # [slots, M, ...] each
        self.graph: torch.cuda.CUDAGraph | None = None
        self.steps = 0

    def _run(self) -> None:
        results = self.learn(self.lr, *self.inputs)
        if not self.rings:
            self.rings = tuple(r if r is None else r.new_zeros(self.slots, *r.shape) for r in results)
        for ring, result in zip(self.rings, results, strict=True):
            if result is not None:
                ring.index_copy_(0, self.slot, result.unsqueeze(0))
        self.slot.add_(1).remainder_(self.slots)

    def __call__(self, lr: float, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """One step; the results' memory is used again `slots` calls later."""
        for own, given in zip(self.inputs, inputs, strict=True):
            if own is not None:
                own.copy_(given, non_blocking=True)
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
            # A capture runs nothing; the threads of links may go on meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
            self.graph = graph
            graph.replay()
        place = self.steps % self.slots
        self.steps += 1
        return tuple(ring if ring is None else ring[place] for ring in self.rings)
