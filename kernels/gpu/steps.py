"""The launch of many steps of a whole network: what `network` is told, and how rows are shared among programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import triton
from torch import Tensor

from ..rules import Layer, Update
from . import network as kernels
from . import tiles
from .math import ACTIVATION
from .ops import _INTERPRETED, _check, _check_state, _constants, _entry, _moments, _multiprocessors, _numbers, unit
from .output import LOSS

PATIENCE = 1 << 22  # looks at a counter, half a microsecond each


def shares(sizes: Sequence[tuple[int, int]], programs: int, block: int) -> list[list[tuple[int, int]]]:
    """For each layer of `sizes` (inputs, outputs), the rows `(first, end)` of each of its programs, `programs` in all.

    Rows are given in blocks. Whichever layer's programs have most to do gets the next program.
    """
    blocks = [math.ceil(outputs / block) for _, outputs in sizes]
    each = [1] * len(sizes)

    def cost(layer: int) -> int:
        return math.ceil(blocks[layer] / each[layer]) * sizes[layer][0]

    for _ in range(programs - len(sizes)):
        slowest = max(range(len(sizes)), key=cost)
        if each[slowest] == blocks[slowest]:
            break
        each[slowest] += 1
    rows = [math.ceil(have / programs) * block for have, programs in zip(blocks, each, strict=True)]
    return [
        [(first, min(first + own, outputs)) for first in range(0, outputs, own)]
        for own, (_, outputs) in zip(rows, sizes, strict=True)
    ]


def refusal(layers: Sequence[Layer], batch: int, device: torch.device) -> str | None:
    """Why the network's steps cannot be one launch on the device; None where they can."""
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    states = [s for layer in layers for s in (layer.weight_state, layer.bias_state) if s is not None]
    tensors = [*parameters, *(t for s in states for t in s.moments)]
    if torch.version.hip is not None:
        return "ROCm promises no progress of one program while another waits"
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in tensors) or any(s.shadow is not None for s in states):
        return "weights, moments and products must be float32"
    if len({layer.bias is None for layer in layers}) > 1:
        return "all layers need a bias, or none"
    if any(not isinstance(layer.feedback, Tensor) or layer.feedback.dtype != torch.float32 for layer in layers[:-1]):
        return "feedback must be a float32 matrix"
    if batch > tiles.NETWORK_ROWS:
        return f"batches of {batch} are more than the {tiles.NETWORK_ROWS} that a program holds"
    if len(layers[-1].weight) > tiles.NETWORK_CLASSES:
        return f"{len(layers[-1].weight)} outputs are more than the {tiles.NETWORK_CLASSES} that a program holds"
    if len(layers) < 2 or (device.type == "cuda" and len(layers) > _multiprocessors(device)):
        return "there must be a hidden layer, and a multiprocessor for each layer"
    return None


@cache
def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers that a kernel reads; asked for with the same ones, no copy is made that the host would wait for."""
    return torch.tensor(values, dtype=torch.int64, device=device)


def _sent(values: list[int], device: torch.device) -> Tensor:
    """Numbers that a kernel reads once; the host does not wait."""
    here = torch.tensor(values, dtype=torch.int64)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


@_entry
def network_steps_(
    x: Tensor,
    row: Tensor,
    target: Tensor,
    layers: Sequence[Layer],
    loss: str,
    update: Update,
    activation: str = "identity",
    scale: float = 1.0,
    *,
    failed: Tensor | None = None,
    tile: tiles.NetworkTile | None = None,
    programs: int | None = None,
) -> Tensor:
    """Here: in one launch. `failed`, int32 `[1]`, becomes 1 where programs waited in vain for each other: then all is lost.

    `programs`: how many there may be at once, a multiprocessor each by default. Raises ValueError for what `refusal` names.
    """
    steps, batch, inputs = x.shape
    why = refusal(layers, batch, x.device)
    _check(why is None, f"these steps cannot be one launch: {why}")
    classes, width, tile = len(layers[-1].weight), row.shape[2], tile or tiles.NetworkTile()
    shapes = {"x": x.shape, "row": (steps, batch, width), "target": (steps, batch, classes), "lr": (steps,)}
    for name, tensor in (("x", x), ("row", row), ("target", target), ("lr", update.lr)):
        fits = tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.shape == shapes[name]
        _check(fits, f"{name} must be contiguous, float32, of shape {list(shapes[name])}, got {list(tensor.shape)}")
    sizes = []  # of the layers: (inputs, outputs)
    for number, layer in enumerate(layers):
        outputs, last = len(layer.weight), number == len(layers) - 1
        _check_state(f"weight {number}", layer.weight, layer.weight_state, update)
        _check_state(f"bias {number}", layer.bias, layer.bias_state, update)
        fits = layer.weight.shape[1] == inputs and (last or layer.feedback.shape == (width, outputs))
        _check(
            fits, f"weight {number} has shape {list(layer.weight.shape)}; it gets {inputs} inputs, and errors of width {width}"
        )
        sizes.append((inputs, outputs))
        inputs = outputs
    programs = programs or max(_multiprocessors(x.device), len(layers))
    own = shares(sizes, programs, tile.outputs)
    if loss == "cross-entropy" and _INTERPRETED:
        own[-1] = [(0, classes)]  # else they wait for each other within a step
    all_own = [(number, first, end) for number, ranges in enumerate(own) for first, end in ranges]
    common, classes_block = unit(*(k for k, _ in sizes)), triton.next_power_of_2(classes)
    most = max(end - first for _, first, end in all_own)
    delta_row = triton.cdiv(most, tile.outputs) * tile.outputs
    out = [torch.empty(steps, batch, n, device=x.device) for _, n in sizes]
    about, needed = [], 0
    for (weight, bias, *states, feedback), below, above, size, ranges in zip(layers, [x, *out], out, sizes, own, strict=False):
        used = (weight, weight if bias is None else bias)
        moments = (m for parameter, state in zip(used, states, strict=True) for m in _moments(parameter, state))
        tensors = (*used, *moments, weight if feedback is None else feedback, below, above)
        about += [*(tensor.data_ptr() for tensor in tensors), size[0] // common, size[1], needed, len(ranges)]
        needed = len(ranges)
    counters = torch.zeros(len(layers), steps, dtype=torch.int32, device=x.device)
    number = update.step if isinstance(update.step, Tensor) else torch.tensor(update.step, device=x.device)
    constants = _constants(update, layers[0].weight_state)
    kernels.network[(len(all_own),)](
        _sent(about, x.device), _table(tuple(sum(all_own, ())), x.device), row, target,
        torch.empty(len(all_own), batch, delta_row, device=x.device), counters,
        counters.new_zeros(1) if failed is None else failed, update.lr, number, *_numbers(update)[2:], float(scale),
        steps, len(layers) - 1, width, classes, delta_row, PATIENCE,
        ACTIVATION=ACTIVATION[activation], LOSS=LOSS[loss], HAS_BIAS=layers[0].bias is not None,
        **{name: constants[name] for name in ("KIND", "MOMENTUM", "NESTEROV")}, FIELDS=len(kernels.FIELDS), UNIT=common,
        BATCH=batch, ROWS=triton.next_power_of_2(batch), OUTPUTS=tile.outputs, CLASSES=classes_block, INPUTS=tile.inputs,
        WIDTH=min(triton.next_power_of_2(width), 16), TAUGHT=min(tile.taught, triton.next_power_of_2(max(k for k, _ in sizes))),
        UNROLL=tile.unroll, STAGES=tile.stages, UNROLL_ROWS=tile.unroll_rows,
        num_warps=tile.warps, num_stages=1, enable_fp_fusion=True, **_alone(x.device),
    )  # fmt: skip
    return out[-1]


def _alone(device: torch.device) -> dict[str, bool]:
    """All programs at once, or an error: see `network`."""
    return {"launch_cooperative_grid": True} if device.type == "cuda" else {}
