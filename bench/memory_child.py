"""One network, a few training steps, and what they held in memory: run in a process of its own by `bench.memory_scaling`.

The contestants are this library's F3 and DFA, and backpropagation in plain PyTorch in the forms that save memory: activation
checkpointing (segments of about the square root of the depth), the optimizer in backward (each parameter is updated and its
gradient freed as soon as it is there), both, and `torch.compile`.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import f3triton as f3
from f3triton.base.data import Visit

METHODS = ("f3", "dfa", "bp", "bp-checkpoint", "bp-in-backward", "bp-checkpoint-in-backward", "bp-compiled")
CLASSES = 10
LR = 1e-4


def reset_peak(device: torch.device) -> int:
    """Start measuring anew; returns the bytes in use."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark becomes the present size
    return peak(device)


def peak(device: torch.device) -> int:
    """The most bytes in use since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def build(kind: str, depth: int, width: int, sequence: int) -> tuple[f3.Sequential, tuple[int, ...]]:
    """(the network, the shape of one input) of `depth` hidden layers or transformer blocks."""
    if kind == "mlp":
        return f3.models.MLP([width, *[width] * depth, CLASSES]), (width,)
    side = math.isqrt(sequence)  # patches of 4 x 4 pixels
    heads = max(1, width // 64)
    model = f3.models.ViT(
        4 * side, 1, CLASSES, patch_size=4, depth=depth, heads=heads, dim=width, mlp_width=4 * width, activation="gelu",
        embedding="patch", positions=True, pool="mean", feedback_shape="shared",
    )  # fmt: skip
    return model, (1, 4 * side, 4 * side)


class SavedTensors:
    """Bytes that autograd keeps for the way back: the most at one time, every storage counted once, parameters not.

    Its `pack` and `unpack` go to `torch.autograd.graph.saved_tensors_hooks`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {_storage(p) for p in model.parameters()}
        self.holders: dict[int, int] = {}  # by storage
        self.live = self.most = 0

    def pack(self, tensor: Tensor) -> object:
        return tensor if _storage(tensor) in self.parameters else _Held(tensor, self)

    @staticmethod
    def unpack(kept: object) -> Tensor:
        return kept.tensor if isinstance(kept, _Held) else kept

    def change(self, tensor: Tensor, by: int) -> None:
        key = _storage(tensor)
        holders = self.holders.get(key, 0)
        if holders + by == (1 if by > 0 else 0):  # the first holder came, or the last one left
            self.live += by * tensor.untyped_storage().nbytes()
            self.most = max(self.most, self.live)
        self.holders[key] = holders + by


class _Held:
    def __init__(self, tensor: Tensor, count: SavedTensors) -> None:
        self.tensor, self.count = tensor, count
        count.change(tensor, 1)

    def __del__(self) -> None:
        self.count.change(self.tensor, -1)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Backprop:
    """A step of backpropagation in plain PyTorch, with torch's fused Adam."""

    def __init__(self, model: f3.Sequential, method: str) -> None:
        self.stages = list(model.stages)
        checkpointed, self.in_backward = "checkpoint" in method, "in-backward" in method
        segment = max(1, math.isqrt(len(self.stages)))
        parts = [nn.Sequential(*self.stages[start : start + segment]) for start in range(0, len(self.stages), segment)]

        def forward(x: Tensor) -> Tensor:
            for part in parts:
                x = checkpoint(part, x, use_reentrant=False) if checkpointed else part(x)
            return x

        self.forward = torch.compile(forward) if method == "bp-compiled" else forward
        parameters = list(model.parameters())
        if self.in_backward:
            own = {p: torch.optim.Adam([p], lr=LR, fused=True) for p in parameters}

            def update(p: nn.Parameter) -> None:
                own[p].step()
                own[p].zero_grad(set_to_none=True)

            for p in parameters:
                p.register_post_accumulate_grad_hook(update)
        else:
            self.optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)

    def step(self, x: Tensor, target: Tensor) -> None:
        functional.binary_cross_entropy_with_logits(self.forward(x), target).backward()
        if not self.in_backward:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def measure(kind: str, method: str, depth: int, width: int, batch: int, sequence: int, device: torch.device) -> dict[str, int]:
    """Bytes: `step` (peak of three steps over what lasts), `lasting` (parameters, moments, feedback), `total` (the peak over
    what was in use before the network), and `saved` (autograd's; -1 where checkpoints hide them).
    """
    torch.manual_seed(0)
    torch.mm(torch.ones(64, 64, device=device), torch.ones(64, 64, device=device))  # the libraries' own buffers
    before = reset_peak(device)
    model, shape = build(kind, depth, width, sequence)
    model.to(device)
    x, classes = torch.randn(batch, *shape, device=device), torch.randint(0, CLASSES, (batch,), device=device)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    if method in ("f3", "dfa"):
        trainer = f3.Trainer(model, "bce", method=method, device=device, batch_size=batch, cuda_graph="off")
        data = f3.Dataset.from_tensors(x, classes, classes=CLASSES)
        trainer.fit(data, 1, batches=lambda epoch: [torch.arange(2, device=device)])
        everything = torch.arange(batch, device=device)
        feedback = sum(s.feedback_matrix.nbytes for s in model.modules() if getattr(s, "feedback_matrix", None) is not None)
        step = lambda: trainer.learner.visit(Visit(everything, everything), LR)  # noqa: E731
    else:
        model.train()
        backprop, feedback = Backprop(model, method), 0
        target = functional.one_hot(classes, CLASSES).float()
        backprop.step(x[:2], target[:2])
        if method == "bp-compiled":
            backprop.step(x, target)  # compiles for the batch
        step = lambda: backprop.step(x, target)  # noqa: E731
    lasting = 3 * parameters + feedback
    start = reset_peak(device)
    for _ in range(3):
        step()
    highest = peak(device)
    saved = -1
    if "checkpoint" not in method and "compiled" not in method:
        count = SavedTensors(model)
        with torch.autograd.graph.saved_tensors_hooks(count.pack, count.unpack):
            step()
        saved = count.most
    total = highest - before
    return {"step": highest - start, "lasting": lasting, "feedback": feedback, "total": total, "saved": saved,
            "parameters": parameters}  # fmt: skip
