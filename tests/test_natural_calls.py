"""What people who know torch try first works, or is answered in one line that says what to pass."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_train_script import run
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import f3triton as f3
from f3triton.data import Preprocessing

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(5))
Y = X[:, :3].argmax(-1)


class Pairs(Dataset):
    def __init__(self, sample: Callable[[int], object]) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> object:
        return self.sample(index)


class Endless(IterableDataset):
    def __iter__(self) -> object:
        return iter([(X[0], 0)])


def fit(data: object, **settings: object) -> float:
    trainer = f3.Trainer(f3.models.MLP([6, 8, 3], seed=1), device="cpu", **settings)
    return trainer.fit(data, 1, data).history[-1]["test_loss"]


@pytest.mark.parametrize(
    "data",
    [
        [X, Y],
        (X.numpy(), Y.numpy()),
        (X.numpy().astype(np.float64), Y.numpy().astype(np.uint16)),
        (X.tolist(), Y.tolist()),
        (pd.DataFrame(X.numpy()), pd.Series(Y.numpy())),
        TensorDataset(X, Y),
        Pairs(lambda i: (X[i], int(Y[i]))),
        Pairs(lambda i: [X[i].numpy(), Y[i]]),
        Subset(TensorDataset(X, Y), range(60)),
    ],
    ids=["list", "arrays", "other types", "lists", "frames", "TensorDataset", "map-style", "arrays in it", "Subset"],
)
def test_data_that_are_taken(data: object) -> None:
    assert fit(data) == fit((X, Y))


def test_arrays_of_any_layout() -> None:
    backwards = X.numpy()[::-1], Y.numpy()[::-1]
    frozen = X.numpy().copy()
    frozen.flags.writeable = False
    assert fit(backwards) == fit((X.flip(0), Y.flip(0)))
    assert fit((frozen, Y)) == fit((X, Y))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (DataLoader(TensorDataset(X, Y)), "pass loader.dataset"),
        (Endless(), "f3triton.stream_dataset"),
        (X, "is a Tensor; needed: a pair"),
        ((X, Y, Y), "tuple of 3 parts; needed: a pair"),
        (TensorDataset(X), "of 1 parts; needed: a pair"),
        ("digits", "is a str; needed: .*f3triton.load_dataset"),
        (None, "is a NoneType"),
        ({"x": X}, "is a dict"),
        (pd.DataFrame(X.numpy()), "is a DataFrame"),
        (Pairs(lambda i: X[i]), "sample 0 of a Pairs is no pair"),
        (Pairs(lambda i: (X[i, : i + 1], 0)), "differ in shape"),
        (Pairs(lambda i: ("word", 0)), "inputs of a Pairs are a str"),
        ((X, ["a"] * 60), "targets are a list, and no tensor or array of numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_data_that_are_refused(data: object, told: str) -> None:
    with pytest.raises(f3.InputError, match=told):
        fit(data)


def test_a_test_set_may_lack_the_last_classes() -> None:
    trainer = f3.Trainer(f3.models.MLP([6, 8, 3], seed=1), device="cpu")
    few = X[:9], Y[:9].clamp(max=1)
    with pytest.raises(f3.InputError, match="the model gives 3 outputs, and the data to evaluate have 2"):
        trainer.evaluate(few)
    assert trainer.fit((X, Y), 1, few).history[-1]["test_error"] == trainer.evaluate(few)["test_error"]
    with pytest.raises(f3.InputError, match="class ids run from"):
        trainer.evaluate((X, Y + 1))
    with pytest.raises(f3.InputError, match="the model gives 3 outputs"):
        trainer.evaluate((X, X[:, :2]))


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD([nn.Parameter(X)], 0.1), f3.Adam])
def test_an_optimizer_of_torch_is_refused(optimizer: object) -> None:
    with pytest.raises(f3.InputError, match=r"or a rule such as f3triton\.Adam\(lr=5e-4\)$") as caught:
        fit((X, Y), optimizer=optimizer)
    assert "\n" not in str(caught.value)


NETWORKS = [
    (lambda: f3.models.MLP([6, 8, 3], "gelu-tanh"), X),
    (lambda: f3.models.ConvNet((1, 8, 8), 10, hidden=[5]), torch.randn(2, 64)),
    (lambda: f3.models.ViT(8, 1, 10, patch_size=4, depth=1, heads=2, dim=8, mlp_width=8), torch.randn(2, 64)),
    (lambda: f3.models.GPT(7, 8, depth=1, heads=2, dim=8, tied=True), torch.arange(16).reshape(2, 8) % 7),
    (lambda: f3.Sequential(f3.Block(nn.Sequential(nn.Linear(6, 5), nn.ReLU())), f3.Linear(5, 3)), X),
]


@pytest.mark.parametrize(("make", "x"), NETWORKS, ids=["mlp", "convnet", "vit", "gpt", "block"])
def test_networks_are_saved_by_torch_and_exported(make: Callable[[], nn.Module], x: torch.Tensor) -> None:
    network = make().eval()
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), network(x))
    assert torch.allclose(torch.export.export(network, (x,)).module()(x), network(x), atol=1e-6)


@pytest.mark.parametrize(("make", "x"), NETWORKS, ids=["mlp", "convnet", "vit", "gpt", "block"])
def test_networks_run_elsewhere_by_onnx(make: Callable[[], nn.Module], x: torch.Tensor, tmp_path: Path) -> None:
    """For any number of rows."""
    pytest.importorskip("onnxscript", reason="needs pip install onnx onnxscript")
    network = make().eval()
    rows = torch.export.Dim.DYNAMIC
    torch.onnx.export(network, (x,), tmp_path / "network.onnx", dynamo=True, dynamic_shapes=({0: rows},), verbose=False)
    more = torch.cat([x, x.flip(0), x[:1]])
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
        name = session.get_inputs()[0].name
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(str(tmp_path / "network.onnx"))
        name = session.input_names[0]
    found = torch.from_numpy(session.run(None, {name: more.numpy()})[0])
    assert torch.allclose(found, network(more), atol=1e-5)


def test_a_trained_network_is_pickled_and_goes_on() -> None:
    network = f3.models.MLP([6, 8, 3], seed=1)
    f3.Trainer(network, device="cpu").fit((X, Y), 1)
    again = pickle.loads(pickle.dumps(network))
    losses = [f3.Trainer(model, device="cpu").fit((X, Y), 1, (X, Y)).history[-1]["test_loss"] for model in (network, again)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))])
def test_a_trainer_that_has_been_fitted_is_copied_and_goes_on(again: Callable[[f3.Trainer], f3.Trainer]) -> None:
    trainer = f3.Trainer(f3.models.MLP([6, 8, 3], seed=1), method="f3", device="cpu")
    history = trainer.fit((X, Y), 1, (X, Y)).history
    twin = again(trainer)
    assert twin.result.history == history
    assert twin.evaluate((X, Y)) == trainer.evaluate((X, Y))
    losses = [one.fit((X, Y), 1, (X, Y)).history[-1]["test_loss"] for one in (trainer, twin)]
    assert losses[0] == losses[1]


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    network = f3.models.MLP([np.int64(6), np.int32(8), Y.numpy().max() + 1])
    json.dumps(network.config())
    trainer = f3.Trainer(
        network, device="cpu", seed=np.uint8(3), batch_size=np.int16(20), patience=np.int64(5), clip_norm=np.float32(1)
    )
    json.dumps(asdict(trainer.settings))
    result = trainer.fit((X, Y), np.int64(2), (X, Y), eval_every=np.int64(2))
    assert [record["epoch"] for record in result.history] == [2]
    assert f3.Trainer(network, device="cpu").check((X, Y), None, np.int64(2)).epochs == 2
    with pytest.raises(f3.InputError, match="epochs must be a whole number"):
        trainer.fit((X, Y), np.float64(2), (X, Y))


def test_float_targets_of_a_network_of_two_classes_are_explained() -> None:
    trainer = f3.Trainer(f3.models.MLP([6, 8, 2]), device="cpu")
    with pytest.raises(f3.InputError, match=r"needs \[1\]; float targets are numbers to predict: give class ids as integers"):
        trainer.fit((X, (Y > 0).float()), 1)


def test_the_network_of_a_predictor_is_exported(tmp_path: Path) -> None:
    assert run("--output-dir", tmp_path / "run", "--hidden", 8, "--epochs", 1, "--quiet") == 0
    predictor = f3.load(tmp_path / "run")
    rows = torch.randint(0, 255, (3, 64), dtype=torch.uint8)
    with pytest.raises(f3.InputError, match="export its network"):
        torch.export.export(predictor, (rows,))
    prepared: Preprocessing = predictor.preprocessing
    x = prepared.normalise(prepared.encode(rows))
    exported = torch.export.export(predictor.network, (x,)).module()
    scores = torch.sigmoid(exported(x))
    assert torch.allclose(scores / scores.sum(-1, keepdim=True), predictor(rows), atol=1e-6)
    assert torch.equal(pickle.loads(pickle.dumps(predictor))(rows), predictor(rows))


@pytest.mark.parametrize("number", [2.0, np.float64(2.0)])
def test_a_float_where_a_whole_number_is_needed_is_called_one(number: float) -> None:
    with pytest.raises(f3.InputError, match=r"epochs must be a whole number of at least 1, got .*2\.0\)? \(float(64)?\)"):
        f3.Trainer(f3.models.MLP([6, 8, 3])).fit((X, Y), number)
    for setting in ("batch_size", "window"):
        with pytest.raises(f3.InputError, match=r"must be a whole number of at least .*, got 50\.0 \(float\)"):
            f3.Trainer(f3.models.MLP([6, 8, 3]), **{setting: np.float64(50.0)})
