"""What the training of any network will need: FLOPs and activations counted on tensors that have a shape but no memory."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..base.precision import FLOAT32, Precision
from ..kernels.rules import Rule
from ..learn.signal import Signal
from ..network.layers import Layers
from ..network.linear import Linear
from ..network.norm import LayerNorm
from ..network.sequential import Sequential
from ..network.stage import Stage
from .budget import Budget


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


def network_budget(
    model: Sequential,
    shape: tuple[int, ...],
    classes: int,
    batch: int,
    rule: Rule,
    signal: Signal | None,
    types: Precision = FLOAT32,
    data_bytes: int = 0,
    error_bytes: int = 0,
    positions: int = 1,
    tokens: bool = False,
) -> Budget:
    """The budget of a network on the meta device for inputs of `shape` a sample (token ids, if `tokens`), by `signal`
    (None: backpropagation).

    Activations: what autograd keeps of a stage for its own backward pass, and the stage's input and output: of the largest
    stage in F3, of all stages in backpropagation and DFA. Gradients: of everything in backpropagation, else the largest
    parameter that is not a fused `Linear`'s. `classes`: entries of an error; `positions`: errors of a sample.
    """
    model = copy.deepcopy(model).train()
    x = torch.zeros(batch, *shape, device="meta", dtype=torch.int64 if tokens else torch.float32)
    taught_hidden = signal is None or signal.source != "none"
    flops, feedback, sizes, table = 0, 0, [], ["stage                        output        parameters"]
    for number, stage in enumerate(model.stages):
        last = number == len(model.stages) - 1
        learns = last or taught_hidden
        saved = SavedTensors(stage)
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
                h = stage(x)
            forward = counter.get_total_flops()
            parameters = [p for p in stage.parameters() if p.requires_grad]
            if learns and parameters and not isinstance(stage, Layers):
                h.sum().backward()
                model.zero_grad(set_to_none=True)
            flops += counter.get_total_flops()
        if isinstance(stage, Layers) and learns:
            flops += forward  # a weight gradient costs what the forward product does
        if not last and signal is not None and signal.source != "none":
            units = feedback_units(stage, h)
            feedback += 0 if stored_nowhere(stage) else classes * units
            flops += 2 * batch * positions * classes * units
        sizes.append(saved.most + x.nbytes + h.nbytes)
        count = sum(p.numel() for p in stage.parameters())
        output = " x ".join(map(str, h.shape[1:]))
        table.append(f"{number + 1:3d} {type(stage).__name__:12s} {output:>20s} {count:16,d}")
        x = h.detach().requires_grad_(signal is None)  # a block's input gets no gradient in F3
    everything = [p for p in model.parameters() if p.requires_grad]
    taught = everything if taught_hidden else [p for p in model.stages[-1].parameters() if p.requires_grad]
    fused = {id(p) for layer in model.modules() if isinstance(layer, Linear) for p in layer.parameters()}
    state, product = types.working.itemsize, (types.products or types.working).itemsize
    gradients = (
        sum(p.numel() for p in everything)
        if signal is None
        else max((p.numel() for p in taught if id(p) not in fused), default=0)
    )
    activations = sum(sizes) if signal is None or signal.current else max(sizes)
    parameters = sum(p.numel() for p in model.parameters())
    return Budget(
        table,
        parameters,
        flops,
        {
            "weights": parameters * types.parameters.itemsize,
            "moments": rule.moments * sum(p.numel() for p in taught) * state,
            "gradients": gradients * state,
            "feedback": feedback * types.parameters.itemsize,
            "errors": error_bytes,
            "activations": activations * product // torch.float32.itemsize,
            "data": data_bytes,
        },
    )


def feedback_units(stage: Stage, h: Tensor) -> int:
    """Columns of all feedback matrices of a stage with the output `h`."""
    if isinstance(stage, Layers):
        tokens = h.shape[1] if h.dim() == 3 else 1
        inside = [layer for layer in stage.modules() if isinstance(layer, Linear | LayerNorm)]
        return sum(layer.weight.shape[0] * (1 if layer.feedback_shape.startswith("shared") else tokens) for layer in inside)
    return h.shape[1 if h.dim() == 4 else -1] if stage.feedback_shape.startswith("shared") else h.shape[1:].numel()


def stored_nowhere(stage: Stage) -> bool:
    """Whether the stage's feedback is generated."""
    inside = [s for s in stage.modules() if isinstance(s, Stage) and s is not stage] if isinstance(stage, Layers) else [stage]
    return all(s.feedback_shape.endswith("generated") for s in inside)
