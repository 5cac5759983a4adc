"""The check that the kernels pass before they are used on a device: right ones pass it, and wrong ones are noticed."""

from __future__ import annotations

import os

import pytest
import torch
from f3triton.kernels import dispatch, selfcheck
from f3triton.kernels.gpu import ops as triton_ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [] if INTERPRETED else pytest.mark.gpu
TYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_passes(dtype: torch.dtype) -> None:
    assert selfcheck.fault(DEVICE, dtype, "ieee") is None


def test_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton_ops.linear_forward

    def one_wrong(*arguments: object, **named: object) -> object:
        h, delta = right(*arguments, **named)
        delta[3, 4] += 1
        return h, delta

    monkeypatch.setattr(triton_ops, "linear_forward", one_wrong)
    selfcheck.fault.cache_clear()
    assert selfcheck.fault(DEVICE, torch.float32, "ieee") == "wrong weight of SGD on 70 x 40 inputs and 20 outputs"
    selfcheck.fault.cache_clear()


def test_a_device_that_fails_gets_torch_and_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_fault", lambda device, precision: "gives wrong results on this device (wrong weight)")
    with pytest.warns(UserWarning, match=r"backend 'triton' gives wrong results .*; 'torch' is used instead"):
        assert dispatch.backend("auto", torch.device("cuda")).__name__.endswith("eager")
    with pytest.raises(ValueError, match=r"gives wrong results on this device \(wrong weight\); use backend 'torch'"):
        dispatch.backend("triton", torch.device("cuda"))
