"""Whole training runs through the Triton backend equal those of the torch backend, to rounding."""

from __future__ import annotations

import os

import pytest
import torch

import f3triton as f3

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else pytest.mark.gpu


def train(backend: str, **settings: object) -> f3.Trainer:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(45, 9, generator=generator)
    y = (x @ torch.randn(9, 4, generator=generator)).argmax(-1)
    torch.manual_seed(1)
    model = f3.models.MLP([9, 20, 17, 4], settings.pop("activation", "tanh"))
    options = {"optimizer": f3.Adam(lr=0.01), "batch_size": 10, **settings}  # the last batch has five samples
    trainer = f3.Trainer(model, device=DEVICE, backend=backend, **options)
    trainer.fit((x, y), 4, (x, y))
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "drtp", "optimizer": f3.SGD(lr=0.01, momentum=0.9)},
        {"method": "dfa", "activation": "gelu"},
        {"method": "last-layer"},
        {"loss": "cross-entropy", "mask_target": True, "optimizer": f3.AdamW(lr=0.01)},
        {"signal": "delayed-loss", "link": "softmax", "activation": "silu"},
        {"batch_size": 45, "optimizer": f3.SGD(lr=0.003)},
    ],
    ids=str,
)
def test_equals_the_torch_backend(settings: dict) -> None:
    ours, theirs = (train(backend, **settings) for backend in ("triton", "torch"))
    for got, wanted in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-4)
    one, other = ours.result.history[-1], theirs.result.history[-1]
    assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
    assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-3)


def test_float64_is_refused() -> None:
    with pytest.raises(f3.InputError, match="backend 'triton' has no precision 'float64'"):
        train("triton", precision="float64")


def test_tf32_takes_the_same_way() -> None:
    if INTERPRETED:
        from f3triton.kernels.gpu import ops as triton_ops

        x, weight = torch.randn(5, 6), torch.randn(7, 6)
        assert torch.equal(triton_ops.with_precision("tf32").linear_forward(x, weight), triton_ops.linear_forward(x, weight))
    else:
        assert train("triton", precision="tf32").result.history[-1]["train_loss"] < 1
