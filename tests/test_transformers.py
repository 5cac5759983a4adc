"""The example of docs/models.md: a model of the transformers library as stages, trained with no backward pass beyond each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from f3triton.base.data import Visit

pytest.importorskip("transformers", reason="needs pip install transformers")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.huggingface import example  # noqa: E402
from bench.memory_child import SavedTensors  # noqa: E402


@pytest.mark.parametrize("method", ["f3", "local", "bp"])
def test_it_learns_and_the_model_is_the_same_one(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = example(epochs=1, method=method, max_train_samples=400, max_test_samples=50)
    history, model, stages = names["trainer"].result.history, names["model"].eval(), names["stages"].eval()
    assert history[-1]["test_loss"] < 4.5  # of 256 bytes, before training 5.5
    x = names["test"].inputs[:2].long()
    torch.testing.assert_close(stages(x), model(x).logits)


def test_activations_are_those_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "context": 128, "batch_size": 16}
    names = example(epochs=1, max_train_samples=16, max_test_samples=2, **sizes)
    trainer, model, x = names["trainer"], names["model"].train(), names["train"].inputs[:16].long()
    everything = torch.arange(16)
    f3_saved, plain = SavedTensors(model), SavedTensors(model)
    with torch.autograd.graph.saved_tensors_hooks(f3_saved.pack, f3_saved.unpack):
        trainer.learner.visit(Visit(everything, everything), 1e-4)
    with torch.autograd.graph.saved_tensors_hooks(plain.pack, plain.unpack):
        model(input_ids=x, labels=x).loss.backward()
    print(f"{f3_saved.most / 2**20:.0f} MiB, plain {plain.most / 2**20:.0f} MiB")
    assert 0 < f3_saved.most < plain.most / 4
