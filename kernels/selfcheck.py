"""A short check of the Triton kernels on the device they are about to run on, before anything is trusted to them.

Compilers have miscompiled matrix products on particular devices (reused a register that the tensor core was still reading, for
one), and the weights would be silently wrong. So: whole-number operands, whose products and sums are exact in every precision,
must come out exact through every tile that the tables have for this type; Adam and the last layer must agree with torch's.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from . import eager
from .rules import SGD, Adam, new_moments

# (rows of x, inputs, outputs): one launch, then two with small, medium and large tiles
_SIZES = ((16, 70, 33), (50, 130, 70), (70, 40, 20), (130, 200, 90), (260, 200, 300))


def _whole(generator: torch.Generator, *shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-4, 5, shape, generator=generator).to(device, dtype)


def _step(ops: ModuleType | SimpleNamespace, rule: SGD | Adam, operands: tuple[Tensor, ...], half: bool) -> tuple[Tensor, ...]:
    x, weight, bias, error, feedback = (tensor.clone() for tensor in operands)
    shadow = weight.to(x.dtype) if half else None
    moments = new_moments(weight, rule), new_moments(bias, rule)
    step = torch.ones((), device=x.device)
    h = ops.linear_step_(x, weight, bias, error, feedback, rule, *moments, rule.lr, step, "relu", shadow=shadow)
    return h, weight, bias, *moments[0], *moments[1]


@cache
def fault(device: torch.device, dtype: torch.dtype, precision: str) -> str | None:
    """What is wrong with the kernels on this device, with products in this type; None if nothing is. Once a process."""
    from .gpu import ops as triton_ops

    ops = triton_ops.with_precision(precision)
    generator = torch.Generator().manual_seed(0)
    half = dtype != torch.float32
    for rows, inputs, outputs in _SIZES:
        x = _whole(generator, rows, inputs, device=device, dtype=dtype)
        operands = (
            x,
            *(_whole(generator, *shape, device=device) for shape in ((outputs, inputs), (outputs,), (rows, 5), (5, outputs))),
        )
        for rule in (SGD(lr=0.5), Adam(lr=0.01)):
            wide = operands[0].double(), *(tensor.double() for tensor in operands[1:])
            wanted = _step(eager, rule, wide, half=False)
            got = _step(ops, rule, operands, half)
            names = ("output", "weight", "bias", "moment", "moment", "moment", "moment")
            for name, ours, theirs in zip(names, got, wanted, strict=False):
                exact = name in ("output", "weight", "bias") and (isinstance(rule, SGD) or name == "output")
                same = torch.equal(ours, theirs.to(ours.dtype)) if exact else torch.allclose(ours.double(), theirs, 1e-4, 1e-6)
                if not same:
                    return f"wrong {name} of {type(rule).__name__} on {rows} x {inputs} inputs and {outputs} outputs"
    a = _whole(generator, 30, 7, device=device)
    target = torch.eye(7, device=device)[torch.arange(30, device=device) % 7]
    for loss in ("bce", "cross-entropy", "mse"):
        pairs = zip(
            ops.output_error(a, target, loss, "delayed-error"),
            eager.output_error(a, target, loss, "delayed-error"),
            strict=True,
        )
        if not all(torch.allclose(ours, theirs, 1e-4, 1e-6) for ours, theirs in pairs):
            return f"wrong gradient or error of the loss {loss}"
    return None
