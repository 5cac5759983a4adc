"""Update rules: settings by name, and the moments of a model's parameters. The arithmetic is in the kernels."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..base.seeds import derived_seed
from ..kernels.eager import FUSED_DEVICES
from ..kernels.rules import SGD, Adam, AdamW, Moments, Rule, new_moments

RULES = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
DEFAULT_LR = {"sgd": 1e-2, "adam": 5e-4, "adamw": 5e-4}


def make_rule(name: str | Rule, **settings: object) -> Rule:
    """A rule from its word (`sgd`, `adam`, `adamw`) and settings; those that are None take their defaults.

    Raises InputError for an unknown rule, a setting that it does not have, or a value out of range.
    """
    if not isinstance(name, str):
        return name
    name = check_word("optimizer", name, RULES)
    given = {"lr": DEFAULT_LR[name], **{key: value for key, value in settings.items() if value is not None}}
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


class Updater:
    """A rule at work: the moments of every parameter, the step count, and the operations that do the arithmetic.

    `lr` is the learning rate of the coming step, a number or a scalar on the device; `step` counts steps from 1 and lives
    on the device (float32 scalar), so that counting costs no synchronisation. `compute_dtype` is the type in which products
    are formed, None for the parameters' own; `rounding_seed` is where the bits come from by which parameters in bfloat16 are
    rounded.
    """

    def __init__(
        self,
        rule: Rule,
        parameters: list[nn.Parameter],
        ops: ModuleType,
        device: torch.device,
        compute_dtype: torch.dtype | None = None,
        rounding_seed: int = 0,
    ) -> None:
        self.rule, self.ops, self.compute_dtype = rule, ops, compute_dtype
        self.lr: float | Tensor = rule.lr
        self.step = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)  # adding a tensor is faster than adding a number
        self._moments: dict[nn.Parameter, Moments] = {p: new_moments(p, rule) for p in parameters if p.requires_grad}
        self._halves: dict[nn.Parameter, dict[str, int | Tensor]] = {}
        for position, p in enumerate(self._moments):
            seed = derived_seed(rounding_seed, position) & 0x7FFFFFFF
            self._halves[p] = {"seed": seed} if p.dtype == torch.bfloat16 else {}
        self._shadows = compute_dtype is not None and getattr(ops, "READS_SHADOWS", False)

    def next_step(self, lr: float | Tensor) -> None:
        """Begin a step: its learning rate, and one more on the counter."""
        self.lr = lr
        self.step.add_(self._one)

    def moments(self, parameter: nn.Parameter | None) -> Moments:
        """The buffers of one parameter, in the rule's order; none for a missing bias."""
        return () if parameter is None else self._moments[parameter]

    def halves(self, weight: nn.Parameter) -> dict[str, int | Tensor]:
        """What half precision adds to an operation on a linear layer's weight: the seed of its rounding, or its shadow.

        The shadow is made when it is first asked for, so after any change of the weight from outside.
        """
        found = self._halves[weight]
        if self._shadows and not found and weight.dtype != self.compute_dtype:
            found["shadow"] = weight.detach().to(self.compute_dtype)
        return found

    @torch.no_grad()
    def apply(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """One parameter's update from its gradient, in place."""
        halves = self._halves[parameter]
        self.ops.update_(parameter, gradient, self._moments[parameter], self.rule, self.lr, self.step, halves.get("seed"))
        if "shadow" in halves:
            halves["shadow"].copy_(parameter)
