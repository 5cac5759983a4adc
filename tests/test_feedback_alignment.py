"""Feedback alignment against autograd with the transposed weights replaced, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import f3triton as f3


class Aligned(torch.autograd.Function):
    """A linear layer whose input gradient goes through another matrix."""

    @staticmethod
    def forward(ctx, x, weight, bias, back):
        ctx.save_for_backward(x, back)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, back = ctx.saved_tensors
        return gradient @ back, gradient.T @ x, gradient.sum(0), None


def test_equals_autograd_with_other_backward_weights() -> None:
    torch.manual_seed(0)
    model = f3.models.MLP([6, 16, 12, 3], activation="gelu").double()
    data = torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 3
    weights = [(nn.Parameter(s.weight.detach().clone()), nn.Parameter(s.bias.detach().clone())) for s in model.stages]
    batches = [torch.arange(i, i + 10) for i in range(0, 40, 10)]
    trainer = f3.Trainer(
        model, "cross-entropy", f3.Adam(lr=0.01), method="fa", precision="float64", lr_schedule="constant", device="cpu"
    )
    trainer.fit(data, 3, batches=lambda epoch: batches)
    back = trainer.learner.backward_weights
    optimizer = torch.optim.Adam([p for pair in weights for p in pair], lr=0.01)
    for _ in range(3):
        for index in batches:
            h = data[0][index]
            for number, (weight, bias) in enumerate(weights):
                h = Aligned.apply(h, weight, bias, back[number])
                h = functional.gelu(h) if number < 2 else h
            optimizer.zero_grad()
            functional.cross_entropy(h, data[1][index]).backward()
            optimizer.step()
    for stage, (weight, bias) in zip(model.stages, weights, strict=True):
        assert torch.allclose(stage.weight, weight, rtol=1e-9)
        assert torch.allclose(stage.bias, bias, rtol=1e-9)


def test_refusals() -> None:
    model = f3.Sequential(f3.Block(nn.Linear(6, 6)), f3.Linear(6, 3))
    with pytest.raises(f3.InputError, match="needs a sequence of Linear stages, stage 0 is a Block"):
        f3.Trainer(model, method="fa", device="cpu").fit((torch.randn(9, 6), torch.arange(9) % 3), 1)
    with pytest.raises(f3.InputError, match="has no signal"):
        f3.Trainer(model, method="fa", signal="target", device="cpu")
