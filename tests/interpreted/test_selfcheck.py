"""The check that the kernels pass before they are used on a device: right ones pass it, and wrong ones are noticed."""

from __future__ import annotations

import functools
import itertools
import os

import pytest
import torch

from f3triton.kernels import dispatch, selfcheck
from f3triton.kernels.gpu import ops as triton_ops
from f3triton.kernels.gpu import tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [] if INTERPRETED else pytest.mark.gpu
TYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


def test_every_tile_of_the_tables_is_run() -> None:
    """By one of the rules, on a device of either kind, in one of the types."""
    wanted = [*tiles.FORWARD.values(), *tiles.UPDATE.values()]
    for multiprocessors in (108, 132, 148):
        kinds = itertools.product((False, True), (False, True))
        reached = {tile for kind in kinds for _, tile in selfcheck.sizes(*kind, multiprocessors)}
        assert {str(tile) for tile in wanted} <= reached, multiprocessors


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_passes(dtype: torch.dtype) -> None:
    selfcheck.fault.cache_clear()
    assert selfcheck.fault(DEVICE, dtype, "ieee") is None


# arguments that lead to every tile of float32, and to that of a weight read transposed
TRANSPOSED = 70, 300, False, False, False, 8, True
CHOICES = {
    "forward_tile": [(13, 20, False), (13, 300, False), (70, 300, False), (70, 300, False, False, True)],
    "update_tile": [(13, 20, 40, False), (13, 300, 300, False)],
}


@pytest.mark.parametrize("chooser", ["forward_tile", "update_tile"])
def test_a_fault_in_any_tile_is_found(chooser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile of float32 that it chooses, one after the other, gives a wrong number."""
    right, last = getattr(tiles, chooser), []

    def choose(*arguments: object, **named: object) -> object:
        last[:] = [str(right(*arguments, **named))]
        return right(*arguments, **named)

    monkeypatch.setattr(tiles, chooser, choose)
    operation = {"forward_tile": "linear_forward", "update_tile": "outer_product_update_"}[chooser]
    original = getattr(triton_ops, operation)
    seen = {str(right(*size, multiprocessors=8)) for size in CHOICES[chooser]}
    if chooser == "forward_tile":
        seen.add(str(right(*TRANSPOSED)))
    for tile in sorted(seen):

        @functools.wraps(original)
        def run(*arguments: object, tile: str = tile, **named: object) -> object:
            last.clear()
            out = original(*arguments, **named)
            if last == [tile]:
                wrong = arguments[0] if operation == "outer_product_update_" else out[0] if isinstance(out, tuple) else out
                wrong.view(-1)[0] += 1
            return out

        monkeypatch.setattr(triton_ops, operation, run)
        selfcheck.fault.cache_clear()
        assert selfcheck.fault(DEVICE, torch.float32, "ieee") is not None, tile
    selfcheck.fault.cache_clear()


def test_a_device_that_fails_gets_torch_and_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_fault", lambda device, precision: "gives wrong results on this device (wrong weight)")
    with pytest.warns(UserWarning, match=r"backend 'triton' gives wrong results .*; 'torch' is used instead"):
        assert dispatch.choose("auto", torch.device("cuda")).operations.__name__.endswith("eager")
    with pytest.raises(ValueError, match=r"gives wrong results on this device \(wrong weight\); use backend 'torch'"):
        dispatch.choose("triton", torch.device("cuda"))
