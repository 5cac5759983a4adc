"""What a run will need, of any network: shapes, parameters, FLOPs a step, and memory by what it is for.

Counted on tensors that have a shape but no memory, so before anything is allocated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..base.precision import FLOAT32, Precision
from ..base.text import readable_bytes
from ..kernels.eager import NARROW_SCRATCH, SCRATCH
from ..kernels.moments import moment_bytes
from ..kernels.rules import Rule
from ..learn.signal import Signal
from ..network.feedback import error_projection
from ..network.layers import Layers
from ..network.linear import Linear
from ..network.sequential import Sequential
from ..network.stage import Stage


@dataclass(frozen=True)
class Budget:
    """The needs of a network's training. `flops` are those of one step's products, `memory` bytes by purpose."""

    stages: list[str]  # a table for people, a line a stage
    parameters: int
    flops: int
    memory: dict[str, int]
    alive: tuple[int, ...] = ()  # bytes of activations while each stage learns; one, of all, where all wait for the output

    @property
    def total_bytes(self) -> int:
        """All of the memory that is listed."""
        return sum(self.memory.values())


def estimate(
    network: Sequential,
    x: Tensor,
    rule: Rule,
    signal: Signal | None,
    types: Precision = FLOAT32,
    rank: int | None = None,
    error_bytes: int = 0,
    data_bytes: int = 0,
    moments: str = "float32",
    clipped: bool = False,
) -> Budget:
    """The budget of a network on the meta device for batches like `x [M, ...]`, on it as well, by `signal` (None:
    backpropagation). Errors have `rank` entries where that is given, else one for each of the C outputs; `error_bytes` and
    `data_bytes` are those of the error store and of the data set in memory, `moments` the type of
    the rule's moments, `clipped` says whether norms are limited. Raises InputError for a rank that C does not have.

    Of a Linear stage with K inputs and N outputs, at M rows: forward 2MKN; weight gradient 2MKN; feedback 2MCN in F3; input
    gradient 2MKN in backpropagation, but for the first stage. Of any other, what torch counts. Activations are the stage's
    input and output, what its own gradients need in between, and the signal at the output: of the stage that needs most in F3,
    of all stages in backpropagation and DFA. Gradients: of everything in backpropagation, else of the largest parameter, or of
    as many rows of it as a fused update takes at a time; where norms are limited all of its rows, which may be formed for it.
    """
    from torch.utils.flop_counter import FlopCounterMode  # half a second

    network = copy.deepcopy(network).train()
    teaches = signal is None or signal.source != "none"  # the hidden stages
    waits = signal is None or signal.current  # for the output, and keeps everything until then
    known = _storages(network.parameters())
    alive: dict[int, torch.UntypedStorage] = {}
    activations, largest, h = [], 0, x
    table = [_line("stage", "", "inputs", "outputs", "parameters")]
    with FlopCounterMode(display=False) as counter:
        for number, stage in enumerate(network.stages, 1):
            learns = teaches or number == len(network)
            if not waits:
                alive, largest = {}, 0
            inputs = h.detach().requires_grad_(signal is None and number > 1)  # a stage's input gets no gradient in F3
            h, kept = _pass(stage, inputs, learns, learns and (signal is None or not isinstance(stage, Layers)))
            alive.update(_storages([inputs, *kept, h]))
            largest = max(largest, h.nbytes if learns else 0)  # of the signals
            if not waits or number == len(network):
                held = sum(storage.nbytes() for key, storage in alive.items() if key not in known)
                activations.append(held + largest)
            count = sum(p.numel() for p in stage.parameters())
            table.append(_line(f"{number:3d}", type(stage).__name__, _sizes(inputs), _sizes(h), f"{count:,}"))
    flops = counter.get_total_flops()
    rows, outputs = h.shape[:-1].numel(), h.shape[-1]
    width, projection, feedback = outputs, 0, 0
    if rank is not None:
        width, projection = rank, error_projection(outputs, rank, seed=0).numel()
        flops += 2 * rows * projection
    if signal is not None and signal.through_feedback:
        network.prepare(x[:1], outputs, seed=None, positions=rows // len(x))  # says the shapes inside of Layers
        feedback, products = _feedback(network, len(x), rows, width)
        flops += products
    every = [p for p in network.parameters() if p.requires_grad]
    taught = every if teaches else [p for p in network[-1].parameters() if p.requires_grad]
    scratch = SCRATCH if moments == "float32" else NARROW_SCRATCH
    scratch = max((p.numel() for p in taught), default=0) if clipped else scratch
    gradients = sum(p.numel() for p in every) if signal is None else max(_gradients(network, taught, scratch), default=0)
    parameters = sum(p.numel() for p in network.parameters())
    working, product = types.working.itemsize, (types.products or types.working).itemsize
    alive_bytes = tuple(count * product // torch.float32.itemsize for count in activations)
    return Budget(
        table,
        parameters,
        flops,
        {
            "weights": parameters * types.parameters.itemsize,
            "moments": sum(moment_bytes(p.shape, rule.moments, moments, working) for p in taught),
            "gradients": gradients * working,
            "feedback": feedback * types.parameters.itemsize + projection * working,
            "errors": error_bytes,
            "activations": max(alive_bytes),
            "data": data_bytes,
        },
        alive_bytes,
    )


def with_local(
    budget: Budget, network: Sequential, x: Tensor, reach: int, share: float = 1.0, candidates: int | None = None
) -> Budget:
    """The budget of local errors for batches like `x [M, ...]`, on the meta device: with the readings of hidden stages, and the
    gradients that go back through `reach` stages.

    A reading costs its products forward and back, and a head of a stage's own its weight gradient too; where it looks at a
    `share` of the positions, that share, and of the last linear layer's products with `candidates` their share of the classes.
    Every further stage of the reach costs the products of its input's gradient, and has its activations alive, as have stages
    in front of the readings.
    """
    from torch.utils.flop_counter import FlopCounterMode

    flops, h, reads = budget.flops, x, 0
    for place, stage in enumerate(network.stages[:-1]):
        with FlopCounterMode(display=False) as own, torch.no_grad():
            h = stage(h)
        back = reach - 1 + (place <= network.unread)  # an unread stage hears what the one behind it hears
        flops += min(back, len(network) - 1 - place) * own.get_total_flops() if place else 0
        if network.unread <= place < network.read:
            with FlopCounterMode(display=False) as reading, torch.no_grad():
                network.answer(place, h)
            reads += 1
            flops += 2 * reading.get_total_flops() if network.reading else round(3 * share * reading.get_total_flops())
    with FlopCounterMode(display=False) as own, torch.no_grad():
        a = network[-1](h)
    if network.reading:
        narrow = share * (1 if candidates is None else (candidates + 1) / a.shape[-1])
        flops -= round(2 * reads * (1 - narrow) * own.get_total_flops())
    flops += own.get_total_flops()  # the output's gradient goes back too
    reached = max(sum(budget.alive[place : place + reach]) for place in range(len(budget.alive)))
    memory = budget.memory | {"activations": reached + network.reading_depth * max(budget.alive)}
    return replace(budget, flops=flops, memory=memory)


def with_rest(budget: Budget, most: int) -> Budget:
    """The budget with the `rest`: of the `most` bytes that a run holds beside data and errors, those that have no other name.
    Such are the batch and its targets, outputs that wait for their loss, an evaluation, and what operations need on the way.

    Where activations go before all gradients are there, only those that are alive with them count.
    """
    memory = dict(budget.memory)
    left = most - sum(memory[name] for name in ("weights", "moments", "feedback"))
    for name in ("activations", "gradients"):
        memory[name] = min(memory[name], left)
        left -= memory[name]
    return replace(budget, memory=memory | {"rest": left})


def describe(budget: Budget) -> list[str]:
    """The budget as lines for people."""
    lines = [*budget.stages, f"parameters {budget.parameters:,}", f"FLOPs a step {budget.flops:,}", "memory"]
    lines += [f"  {name:12s} {readable_bytes(count):>12s}" for name, count in budget.memory.items()]
    return [*lines, f"  {'total':12s} {readable_bytes(budget.total_bytes):>12s}"]


def _pass(stage: Stage, x: Tensor, learns: bool, backward: bool) -> tuple[Tensor, list[Tensor]]:
    """The output for `x [M, ...]`, and what is kept for gradients where the stage `learns`; with `backward` they are taken."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.set_grad_enabled(learns), saved_tensors_hooks(keep, lambda tensor: tensor):
        h = stage(x)
    if backward and h.requires_grad:
        h.sum().backward()
    return h, kept


def _feedback(network: Sequential, batch: int, rows: int, width: int) -> tuple[int, int]:
    """Stored entries of all feedback matrices of a prepared network, and FLOPs of their products with errors `[rows, width]`.

    With these go the weight gradients inside of `Layers`, where each layer is taught at its own output.
    """
    entries = flops = 0
    for stage in network.stages[:-1]:
        layers = isinstance(stage, Layers)
        for own in [s for s in stage.modules() if isinstance(s, Stage) and s is not stage] if layers else [stage]:
            shape = own.output_shape
            units = shape.numel()
            if own.feedback_shape.startswith("shared"):  # by pixels, of which the channels are left, or by tokens
                units = shape[0] if len(shape) == 3 else shape[-1]
            entries += 0 if own.feedback_shape.endswith("generated") else width * units
            flops += 2 * width * min(rows * units, batch * shape.numel())
            if layers and isinstance(own, Linear):
                flops += 2 * batch * shape[:-1].numel() * own.weight.numel()
    return entries, flops


def _gradients(network: nn.Module, taught: list[nn.Parameter], scratch: int) -> Iterable[int]:
    """Elements of each taught parameter's gradient that are alive at once; `scratch`: of a fused update."""
    fused = {}
    for layer in network.modules():
        if isinstance(layer, Linear) or type(layer) is nn.Linear:
            fused |= {layer.weight: min(layer.weight.numel(), max(layer.weight.shape[1], scratch)), layer.bias: 0}
    return [fused.get(p, p.numel()) for p in taught]


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Each once; who holds them holds their numbers too, which are those of nothing else as long as they live."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage for storage in storages}


def _sizes(x: Tensor) -> str:
    return " x ".join(f"{size:,}" for size in x.shape[1:])


def _line(number: str, kind: str, inputs: str, outputs: str, parameters: str) -> str:
    return f"{number:5s} {kind:14s} {inputs:>16s} {outputs:>16s} {parameters:>14s}"
