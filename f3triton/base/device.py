"""Devices by name."""

from __future__ import annotations

import torch

from .exceptions import InputError


def pick_device(name: str | torch.device) -> torch.device:
    """The named torch device, with its number (`cuda:0`, as tensors have it); `auto` is CUDA (or ROCm), or else the CPU.

    Raises InputError where it is not there or cannot compute.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(name)!r} cannot be used ({reason}); try 'auto' or 'cpu'") from None
