"""Update rules at work: by name, and on the parameters of a network. The only caller of the kernels' updates.

An `Updater` keeps what belongs to each parameter between steps; the `Step` that it begins is handed to the stages, which ask it
for products, updates and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..base.seeds import derived_seed
from ..base.words import OPTIMIZERS
from ..kernels.eager import FUSED_DEVICES
from ..kernels.generated import GeneratedFeedback
from ..kernels.rules import SGD, Adam, AdamW, Rule, State, Update, new_state
from .clip import Clipped

RULES = dict(zip(OPTIMIZERS, (SGD, Adam, AdamW), strict=True))

Layer = nn.Module  # with `weight [out, in]` and `bias [out]` or None: a Linear of ours, or torch's


def make_rule(name: str | Rule, **settings: object) -> Rule:
    """A rule from its word (`sgd`, `adam`, `adamw`) and settings; those that are None take their defaults.

    Raises InputError for an unknown rule, a setting that it does not have, or a value out of range.
    """
    if not isinstance(name, str):
        return name
    name = check_word("optimizer", name, RULES)
    given = {key: value for key, value in settings.items() if value is not None}
    for key in given:
        if key not in RULES[name].__dataclass_fields__:
            raise InputError(f"optimizer {name!r} has no {key!r}; it has: {', '.join(RULES[name].__dataclass_fields__)}")
    try:
        return RULES[name](**given)
    except ValueError as error:
        raise InputError(str(error)) from None


def torch_optimizer(rule: Rule, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's own optimizer with the same settings, fused where the device has it: what backpropagation is compared with."""
    fused = parameters[0].device.type in FUSED_DEVICES or None
    if isinstance(rule, SGD):
        return torch.optim.SGD(
            parameters,
            lr=rule.lr,
            momentum=rule.momentum,
            nesterov=rule.nesterov,
            weight_decay=rule.weight_decay,
            fused=fused,
        )
    optimizer = torch.optim.AdamW if rule.decoupled else torch.optim.Adam
    return optimizer(parameters, lr=rule.lr, betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay, fused=fused)


class Replicas(Protocol):
    """What learns from other rows of the same batch, and in the end has the same weights; it is replica `number`."""

    number: int

    def divide(self, rows: int) -> bool:
        """Whether so many samples can be divided among the replicas; else each of them does the same."""

    def own(self, rows: Tensor) -> Tensor:
        """This replica's rows of a whole batch's."""

    def gather(self, own: Tensor) -> Tensor:
        """A whole batch's rows `[R M, ...]`, of which every replica has its `own [M, ...]`."""

    def total(self, part: Tensor) -> Tensor:
        """The sum over all replicas."""

    def average_gradients(self, model: nn.Module) -> nn.Module:
        """The model, for autograd: its gradients are then the mean over all replicas."""

    def watching(self) -> AbstractContextManager[None]:
        """Inside, an error of autograd's that comes of a lost replica is told as that."""

    def by_factors(self, shape: torch.Size, rows: int) -> bool:
        """Whether a weight of that shape `[N, K]` is updated from gathered factors, for so many rows of each replica."""


class Step:
    """One step's updates, of the parameters that the updater has a state for.

    `compute_dtype` is the type in which products are formed, None for the parameters' own; `scale` is a factor on the error
    signals of hidden stages; `number` counts steps from 1.
    """

    __slots__ = ("_shadows", "_states", "compute_dtype", "number", "ops", "replicas", "scale", "update")

    def __init__(self, updater: Updater, lr: float | Tensor, scale: float, replicas: Replicas | None = None) -> None:
        self.replicas = replicas
        self._states, self._shadows = updater.states, updater.shadows
        self.ops, self.compute_dtype, self.number, self.scale = updater.ops, updater.compute_dtype, updater.number, scale
        self.update = Update(updater.rule, lr, updater.step, updater.seed)

    def alone(self) -> Step:
        """The same step, for what all replicas do alike."""
        twin = copy.copy(self)
        twin.replicas = None
        return twin

    def _state(self, parameter: nn.Parameter | None) -> State | None:
        return None if parameter is None else self._states[parameter]

    def _weight(self, weight: nn.Parameter) -> State:
        """The state of a linear layer's weight, with its copy in half precision where the operations read one.

        The copy is made when it is first asked for, so after any change of the weight from outside.
        """
        state = self._states[weight]
        if self._shadows and state.shadow is None and weight.dtype not in (self.compute_dtype, torch.bfloat16):
            state.shadow = weight.detach().to(self.compute_dtype)
        return state

    def forward(self, layer: Layer, x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        """`(h [rows, N], kept [rows, N])` for `x [rows, K]`: the layer's output, and what `times_slope` needs of it."""
        state = self._states.get(layer.weight)
        weight = layer.weight if state is None or self._weight(layer.weight).shadow is None else state.shadow
        return self.ops.linear_keep(x, weight, layer.bias, activation)

    def learn(self, layer: Layer, x: Tensor, row: Tensor, feedback: Tensor | GeneratedFeedback, activation: str) -> Tensor:
        """The output for `x [rows, K]` from before the update by `scale (e B) * phi'(a)`, with `row` the `e [rows, R]`."""
        states = self._weight(layer.weight), self._state(layer.bias)
        if self.replicas is not None:
            source = layer.weight if states[0].shadow is None else states[0].shadow
            h, delta = self.ops.linear_forward(x, source, layer.bias, activation, row, feedback, self.scale)
            self._teach_together(layer, delta, x, states)
            return h
        return self.ops.linear_step_(x, layer.weight, layer.bias, row, feedback, *states, self.update, activation, self.scale)

    def teach(self, layer: Layer, delta: Tensor, x: Tensor, wants_input: bool = False) -> Tensor | None:
        """Update from `delta^T x` (`delta [rows, N]`, `x [rows, K]`).

        With `wants_input` returns the input's gradient `delta W  [rows, K]`, taken from the old weight.
        """
        operation = self.ops.linear_backward_update_ if wants_input else self.ops.outer_product_update_
        states = self._weight(layer.weight), self._state(layer.bias)
        if self.replicas is not None:
            dx = self.input_gradient(layer, delta) if wants_input else None
            self._teach_together(layer, delta, x, states)
            return dx
        return operation(layer.weight, layer.bias, delta, x, *states, self.update)

    def read(self, layer: Layer, h: Tensor, target: Tensor, loss: str, norm: bool) -> Tensor:
        """The gradient at `h [rows, N]` of a head's reading of it, and the head's update; see `reference.head_step_`."""
        states = self._weight(layer.weight), self._state(layer.bias)
        h = h if self.compute_dtype is None else h.to(self.compute_dtype)
        return self.ops.head_step_(h, layer.weight, layer.bias, target, loss, *states, self.update, norm)

    def _teach_together(self, layer: Layer, delta: Tensor, x: Tensor, states: tuple[State, State | None]) -> None:
        """Update from the rows of all replicas, by their factors or by the sum of their gradients."""
        if self.replicas.by_factors(layer.weight.shape, len(x)):
            delta, x = self.replicas.gather(delta.to(x.dtype)), self.replicas.gather(x)
            self.ops.outer_product_update_(layer.weight, layer.bias, delta, x, *states, self.update)
            return
        gradients = self.ops.outer_product(delta.to(x.dtype), x)
        for parameter, gradient, state in zip((layer.weight, layer.bias), gradients, states, strict=True):
            if parameter is not None:
                whole = self.replicas.total(gradient.to(torch.promote_types(parameter.dtype, torch.float32)))
                self.ops.update_(parameter, whole.to(parameter.dtype), state, self.update)

    def input_gradient(self, layer: Layer, delta: Tensor) -> Tensor:
        """`delta W  [rows, K]`, and no update."""
        weight = layer.weight if layer.weight not in self._states else self._weight(layer.weight).shadow
        return delta @ (layer.weight if weight is None else weight).to(delta.dtype)

    @torch.no_grad()
    def apply(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """One parameter's update from its gradient, in place."""
        if self.replicas is not None:
            gradient = self.replicas.total(gradient)
        self.ops.update_(parameter, gradient, self._states[parameter], self.update)


@dataclass(frozen=True)
class Arithmetic:
    """How updates are computed: the rule, the operations (a backend) and their device, the type of products (None: the
    parameters' own), the seed of the bits by which bfloat16 parameters and narrow moments
    are rounded, the type of the moments, one of `kernels.moments.MOMENTS`, and what the norm of each layer's gradient is
    limited to (None: it is not; see `clip`)."""

    rule: Rule
    ops: ModuleType
    device: torch.device
    compute_dtype: torch.dtype | None = None
    seed: int = 0
    moments: str = "float32"
    clip_norm: float | None = None


class Updater:
    """A rule at work on a network: the state of every parameter, and the count of steps.

    `taught` are the parameters that learn, all of the model's by default. A parameter's random bits are keyed by the seed and
    by its place among all parameters of `model`. The count of steps is an int64 scalar on the device: counting costs no
    synchronisation.
    """

    def __init__(self, model: nn.Module, how: Arithmetic, taught: Iterable[nn.Parameter] | None = None) -> None:
        self.rule, self.compute_dtype = how.rule, how.compute_dtype
        self.ops = how.ops if how.clip_norm is None else Clipped(how.ops, how.clip_norm)
        self.seed = derived_seed(how.seed, "rounding") & 0x7FFFFFFF
        self.shadows = how.compute_dtype is not None and how.ops.READS_SHADOWS
        self.step, self.number = torch.zeros((), dtype=torch.int64, device=how.device), 0
        self._one = torch.ones((), dtype=torch.int64, device=how.device)  # adding a tensor is faster than adding a number
        learns = {id(p) for p in (model.parameters() if taught is None else taught) if p.requires_grad}
        self.states: dict[nn.Parameter, State] = {}
        self._names: list[str] = []  # of the states' parameters
        for place, (name, p) in enumerate(model.named_parameters()):
            if id(p) in learns:
                self.states[p] = new_state(p, how.rule, place, moments=how.moments)
                self._names.append(name)

    def begin(self, lr: float | Tensor, scale: float = 1.0, replicas: Replicas | None = None) -> Step:
        """Count a step, and begin it with a learning rate (a number, or a scalar on the device)."""
        self.number += 1
        self.step.add_(self._one)
        return Step(self, lr, scale, replicas)

    def state(self) -> dict[str, Tensor]:
        """Moments and their scales by the parameters' names, the count of steps by the empty name: the very tensors in use."""
        kept = {}
        for name, state in zip(self._names, self.states.values(), strict=True):
            kept |= {f"{name}.{i}": moment for i, moment in enumerate(state.moments)}
            kept |= {f"{name}.{i}.scale": scale for i, scale in enumerate(state.scales)}
        return kept | {"": self.step}

    def resumed(self, steps: int) -> None:
        """Tell the host, after the tensors of `state` were filled, how many steps were done; the weights may have changed."""
        self.number = steps
        for state in self.states.values():
            state.shadow = None
