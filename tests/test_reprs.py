"""What a trainer and its result say and show of themselves."""

from __future__ import annotations

import torch

import f3triton as f3


def test_a_trainer_and_its_result_say_what_they_are() -> None:
    x, y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    trainer = f3.Trainer(f3.models.MLP([4, 5, 3]), device="cpu")
    assert repr(trainer).startswith("Trainer(MLP of 2 stages, 43 parameters; method f3, signal delayed-error, Adam lr 0.003")
    assert repr(trainer.result) == "FitResult(running, 0 epochs, 0 steps, 0.0 s)"
    assert trainer.result._repr_png_() is None
    result = trainer.fit((x, y), 2, (x, y))
    said = repr(result)
    assert said.startswith("FitResult(completed, 2 epochs, 4 steps, ")
    assert f"test error {result.history[-1]['test_error']:.4g}" in said
    assert f"best {result.best['test_error']:.4g} in epoch {result.best['epoch']}" in said
    assert said.count("\n") == 0
    assert result._repr_png_().startswith(b"\x89PNG")
    untested = trainer.fit((x, y), 1)
    assert "best" not in repr(untested)
    assert untested._repr_png_().startswith(b"\x89PNG")
