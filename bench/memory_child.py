"""One network, a few training steps, and what they held in memory: run in a process of its own by `bench.memory_scaling`.

The contestants are this library's F3 (with moments in int8, and with weights in bfloat16 too) and DFA, and backpropagation in
plain PyTorch in the forms that save memory: activation checkpointing (segments of about the square root of the depth), the
optimizer in backward (each parameter is updated and its gradient freed as soon as it is there), 8-bit Adam (torchao's, where
that is installed), weights and products in bfloat16, several of these, and `torch.compile`. And inference, the floor of all.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import f3triton as f3
from f3triton.base.data import Visit
from f3triton.models.build import build as from_config
from f3triton.run.dry_run import budget_of

OURS = ("f3", "f3-int8", "f3-bf16-int8", "dfa")
PLAIN = ("bp", "bp-checkpoint", "bp-in-backward", "bp-checkpoint-in-backward", "bp-compiled")
EIGHT_BIT = ("bp-8bit", "bp-checkpoint-8bit", "bp-checkpoint-in-backward-8bit", "bp-checkpoint-in-backward-8bit-bf16")
INFERENCE = ("inference", "inference-bf16")
METHODS = OURS + PLAIN + EIGHT_BIT  # that train
CLASSES = 10
LR = 1e-4
HAS_8BIT = importlib.util.find_spec("torchao") is not None


def figures_of(*arguments: str) -> dict[str, int]:
    """The line of JSON that `python -m` with these arguments prints last, in a process of its own with one thread.

    Freed blocks go back to the system at once there, so that resident memory is memory in use. Raises RuntimeError with its
    last word where it fails.
    """
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    root, command = Path(__file__).resolve().parents[1], [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


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
    """A step of backpropagation in plain PyTorch, with torch's fused Adam or torchao's in 8 bits."""

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
            own = {p: adam([p], method) for p in parameters}
            self.optimizers = list(own.values())

            def update(p: nn.Parameter) -> None:
                own[p].step()
                own[p].zero_grad(set_to_none=True)

            for p in parameters:
                p.register_post_accumulate_grad_hook(update)
        else:
            self.optimizers = [adam(parameters, method)]

    def step(self, x: Tensor, target: Tensor) -> None:
        functional.binary_cross_entropy_with_logits(self.forward(x).float(), target).backward()
        if not self.in_backward:
            self.optimizers[0].step()
            self.optimizers[0].zero_grad(set_to_none=True)

    def moments(self) -> Iterable[Tensor]:
        """Everything that the optimizers keep; of an 8-bit state its codes, scales and map."""
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                for kept in state.values():
                    names = getattr(kept, "tensor_attrs", None)
                    yield from [kept] if names is None else [getattr(kept, name) for name in names]


def adam(parameters: list[nn.Parameter], method: str) -> torch.optim.Optimizer:
    """Adam of a method; with weights in bfloat16 rounded stochastically, as ours are."""
    if "8bit" not in method:
        return torch.optim.Adam(parameters, lr=LR, fused=True)
    from torchao.optim import Adam8bit

    return Adam8bit(parameters, lr=LR, bf16_stochastic_round="bf16" in method)


def precision_of(method: str) -> dict[str, str]:
    """The settings of ours that a method's name says."""
    own = {"precision": "bfloat16-weights"} if "bf16" in method else {}
    return own | ({"moments": "int8"} if "int8" in method else {})


def measure(
    kind: str, method: str, depth: int, width: int, batch: int, sequence: int, device: torch.device, steps: int = 3
) -> dict[str, int]:
    """Bytes: `step` (peak of the steps over what lasts), `weights`, `moments`, `feedback`, `total` (the peak over what was in
    use before the network), and `saved` (autograd's; -1 where checkpoints hide them). With one step only `total` counts.
    """
    torch.manual_seed(0)
    small, shape = build(kind, 2, width, sequence)  # loads and compiles what the libraries have
    first, second = torch.randn(2, *shape, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    prepared(small, "bp" if method == "bp-compiled" else method, device, first, second)[0]()
    del small
    gc.collect()
    before = reset_peak(device)
    model, shape = build(kind, depth, width, sequence)
    x, classes = torch.randn(batch, *shape, device=device), torch.randint(0, CLASSES, (batch,), device=device)
    step, moments = prepared(model, method, device, x, classes, steps > 1)
    parts = {
        "weights": list(model.parameters()),
        "moments": moments,
        "feedback": [s.feedback_matrix for s in model.modules() if getattr(s, "feedback_matrix", None) is not None],
    }
    found = {name: sum(t.nbytes for t in tensors) for name, tensors in parts.items()}
    start = reset_peak(device)
    for _ in range(steps):
        step()
    highest = peak(device)
    saved = -1
    if steps > 1 and "checkpoint" not in method and "compiled" not in method:
        count = SavedTensors(model)
        with torch.autograd.graph.saved_tensors_hooks(count.pack, count.unpack):
            step()
        saved = count.most
    count = sum(p.numel() for p in model.parameters())
    return {"step": highest - start, "total": highest - before, "saved": saved, "parameters": count, **found}


SMALL_VIT = {"image_size": 32, "patch_size": 4, "channels": 3, "classes": CLASSES, "depth": 3, "heads": 4, "dim": 256}
SMALL_VIT |= {"mlp_width": 1024, "embedding": "patch", "pool": "mean", "feedback_shape": "shared"}
RUNS = {  # networks, and samples of a batch, of training and of test
    "MLP": ({"model": "mlp", "sizes": [784, 2048, 2048, 2048, CLASSES]}, 1000, 4000, 1000),
    "ViT": ({"model": "vit", **SMALL_VIT}, 64, 192, 128),
    "GPT": ({"model": "gpt", "context": 128, "depth": 3, "heads": 4, "dim": 256}, 32, 96, 16),
}


def run_of(kind: str, method: str, batch: int, samples: int, tested: int) -> tuple[int, Callable[[], object]]:
    """(bytes by the budget, the run) of an epoch of one of `RUNS`, of which the data are there already."""
    network = dict(RUNS[kind][0])
    if kind == "GPT":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "text")
            path.write_text("".join(chr(48 + i * i % 61) for i in range(128 * (samples + tested) + 2)))
            train, test = f3.load_text(str(path), context=128, max_train_samples=samples, max_test_samples=tested)
        network["vocabulary"] = train.outputs
    else:
        shape = [784] if kind == "MLP" else [3, 32, 32]
        train, test = (
            f3.Dataset.from_tensors(torch.randn(n, *shape), torch.arange(n) % CLASSES, classes=CLASSES)
            for n in (samples, tested)
        )
    word = "f3" if method in OURS else "bp"
    settings = f3.Settings(method=word, optimizer=f3.Adam(), batch_size=batch, device="cpu", **precision_of(method))
    errors = 4 * samples * train.positions * train.outputs if settings.keeps_errors else 0
    budget = budget_of(settings, network, (train, test), errors, rehearsed=True)
    trained = lambda: f3.Trainer(from_config(network), settings=settings).fit(train, 1, test)  # noqa: E731
    return budget.total_bytes - budget.memory["data"], trained


def measure_run(kind: str, method: str) -> dict[str, int]:
    """Bytes: the `budget` of a run beside its data, and the `peak` over what was in use before."""
    _, batch, samples, tested = RUNS[kind]
    with ThreadPoolExecutor(1) as other:  # whose buffers go with it
        other.submit(run_of(kind, method, 8, 16, 8)[1]).result()  # loads what the libraries have
    budget, run = run_of(kind, method, batch, samples, tested)
    gc.collect()
    before = reset_peak(torch.device("cpu"))
    run()
    return {"budget": budget, "peak": peak(torch.device("cpu")) - before}


def prepared(
    model: f3.Sequential, method: str, device: torch.device, x: Tensor, classes: Tensor, first_step: bool = True
) -> tuple[Callable[[], None], list[Tensor]]:
    """(a step on `x [batch, ...]` and its `classes [batch]`, the optimizer's state), after a first small step that has made
    all that lasts. F3 makes it before a step, and can go without: its step is then a run of one."""
    if method in OURS:
        settings = precision_of(method)
        word = "dfa" if method == "dfa" else "f3"
        trainer = f3.Trainer(model, "bce", method=word, device=device, batch_size=len(x), cuda_graph="off", **settings)
        data = f3.Dataset.from_tensors(x, classes, classes=CLASSES)
        everything = torch.arange(len(x), device=device)
        if not first_step:
            return lambda: trainer.fit(data, 1, batches=lambda epoch: [everything]), []
        trainer.fit(data, 1, batches=lambda epoch: [everything[:2]])
        states = trainer.learner.updater.states.values()
        moments = [t for state in states for t in (*state.moments, *state.scales)]
        return lambda: trainer.learner.visit(Visit(everything, everything), LR), moments
    model.to(device)
    if "bf16" in method:
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    if method in INFERENCE:
        run = torch.inference_mode()(model.eval())
        run(x[:2])
        return lambda: run(x), []
    model.train()
    backprop = Backprop(model, method)
    target = functional.one_hot(classes, CLASSES).float()
    backprop.step(x[:2], target[:2])
    if method == "bp-compiled":
        backprop.step(x, target)  # compiles for the batch
    return lambda: backprop.step(x, target), list(backprop.moments())
