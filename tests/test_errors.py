"""Error rows: codecs against NumPy, and the stores that are tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train_script import run
from test_trainer import mlp, problem, train, weights

import f3triton as f3
from f3triton.error_store import ERROR_DTYPES, MemoryStore, Rows, make_codec, pick_home


def errors(rows: int = 40, width: int = 11, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors `[rows, width]` of all sizes, a row of zeros among them, and their one-hot targets."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.nn.functional.one_hot(torch.randint(0, width, (rows,), generator=generator), width).float()
    e = target - torch.rand(rows, width, generator=generator) ** 4
    e *= torch.logspace(-9, 2, rows)[:, None]
    e[3] = 0
    return e, target


def round_trip(word: str, e: torch.Tensor, target: torch.Tensor) -> np.ndarray:
    codec = make_codec(word, e.shape[1], e.dtype)
    rows = codec.encode(e, target)
    assert (rows.dtype, rows.shape, rows.nbytes) == (codec.storage, (len(e), codec.columns), len(e) * codec.row_bytes)
    return codec.decode(rows).numpy()


def test_floats_against_numpy() -> None:
    e, target = errors()
    assert (round_trip("float32", e, target) == e.numpy()).all()
    assert (round_trip("float64", e.double(), target) == e.double().numpy()).all()
    assert (round_trip("float16", e, target) == e.numpy().astype(np.float16).astype(np.float32)).all()
    bits = e.numpy().view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32)  # round half to even, on the bits
    assert (round_trip("bfloat16", e, target) == nearest.view(np.float32)).all()


def test_float16_ends_at_its_largest_number() -> None:
    e = torch.tensor([[1e6, -1e6, 1.0]])
    assert round_trip("float16", e, e).tolist() == [[65504, -65504, 1]]
    assert round_trip("top-2", e, torch.zeros(1, 3)).tolist() == [[65504, -65504, 0]]


@pytest.mark.parametrize("width", [1, 2, 11, 256])
def test_int8_against_numpy(width: int) -> None:
    e, target = errors(width=width)
    scale = np.abs(e.numpy()).max(1, keepdims=True)
    parts = np.rint(np.divide(e.numpy() * np.float32(127), scale, where=scale > 0, out=np.zeros_like(e.numpy())))
    got = round_trip("int8", e, target)
    # A quotient just at a half may fall to either side, by the order of the two operations.
    assert (np.abs(got - parts * scale / 127) <= scale * (1.001 / 127 * (np.abs(parts) > 0) + 1e-6)).all()
    assert (np.abs(got - e.numpy()) <= scale * (0.5001 / 127)).all()


@pytest.mark.parametrize("width", [1, 3, 4, 11])
def test_ternary_against_numpy(width: int) -> None:
    e, target = errors(width=width)
    expected = np.zeros_like(e.numpy())
    for row, out in zip(e.numpy(), expected, strict=True):
        kept = (np.abs(row) >= np.abs(row).max() / 2) & (row != 0)
        if kept.any():
            out[kept] = np.sign(row[kept]) * np.abs(row[kept]).mean()
    np.testing.assert_allclose(round_trip("ternary", e, target), expected, rtol=1e-6)


def test_ternary_bytes_one_by_one() -> None:
    row = make_codec("ternary", 6, torch.float32).encode(torch.tensor([[2.0, -2.0, 0.1, 2.0, 0.0, -2.0]]))[0]
    assert row.tolist() == [0, 0, 0, 64, 0b01_00_10_01, 0b1000]  # 2.0 in little-endian float32; entries from the lowest bits


@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_k_against_numpy(k: int) -> None:
    e, target = errors()
    e[5] = -e[5].abs()
    e[5, target[5].argmax()] = 0.0  # the target's entry is kept even where it is the smallest
    expected = np.zeros_like(e.numpy())
    for row, hot, out in zip(e.numpy(), target.numpy(), expected, strict=True):
        keep = sorted(range(len(row)), key=lambda i: (-hot[i], -abs(row[i])))[:k]
        out[keep] = row[keep].astype(np.float16)
    got = round_trip(f"top-{k}", e, target)
    assert (np.sort(np.abs(got), 1) == np.sort(np.abs(expected), 1)).all()  # equal magnitudes may be kept in either order
    hot = target.numpy() > 0
    assert (got[hot] == expected[hot]).all()
    assert ((got == expected).all(1)).sum() >= len(e) - 1


def test_top_k_of_a_wide_row() -> None:
    e = torch.zeros(2, 50_000)
    e[:, 40_000], e[:, 7] = 1.0, -0.5
    codec = make_codec("top-2", 50_000, torch.float32)
    assert codec.row_bytes == 2 * (4 + 2)
    assert torch.equal(codec.decode(codec.encode(e, e)), e)


@pytest.mark.parametrize("word", ["auto", *ERROR_DTYPES, "top-3"])
def test_a_target_survives_every_codec(word: str) -> None:
    _, target = errors()
    assert (round_trip(word, target, target) == target.numpy()).all()
    assert (round_trip(word, target.double(), target.double()) == target.numpy()).all()
    for part in (target[:1, :9], target[:0, :9]):  # the last batch of an epoch may have one row
        assert (round_trip(word, part, part) == part.numpy()).all()


@pytest.mark.parametrize("word", ERROR_DTYPES)
def test_nan_stays_nan(word: str) -> None:
    e, target = errors()
    e[2, 1] = torch.nan
    assert np.isnan(round_trip(word, e, target)[2]).any()


@pytest.mark.parametrize("word", ["float8", "top-0", "top-", "top-11", "top--3", "top-99999999", "", None, 3])
def test_unknown_error_dtypes_are_refused(word: object) -> None:
    with pytest.raises(f3.InputError, match="error dtype"):
        make_codec(word, 11, torch.float32)


def test_top_k_needs_classes() -> None:
    with pytest.raises(f3.InputError, match="these rows have no classes"):
        make_codec("top-2", 11, torch.float32, classification=False)


def store_of(word: str = "auto", samples: int = 12, width: int = 5) -> tuple[MemoryStore, torch.Tensor]:
    target = torch.eye(width)[torch.arange(samples) % width]
    rows = Rows(samples, make_codec(word, width, torch.float32), torch.device("cpu"), lambda index: target[index])
    return MemoryStore(rows), target


@pytest.mark.parametrize("word", ["auto", "int8", "top-2"])
def test_a_store_in_memory(word: str) -> None:
    store, target = store_of(word)
    assert torch.equal(store.rows, target)
    e, index = torch.linspace(-1, 1, 15).view(3, 5), torch.tensor([7, 0, 3])
    store.write(index, e)
    expected = make_codec(word, 5, torch.float32)
    expected = expected.decode(expected.encode(e, target[index]))
    assert torch.equal(store.read(index), expected)
    assert torch.equal(store.read(torch.tensor([1, 2])), target[1:3])
    assert store.commit() == 9  # carried forward
    assert torch.equal(store.read(torch.tensor([1, 7])), torch.stack([target[1], expected[0]]))
    store.write(torch.arange(12), torch.zeros(12, 5))
    assert store.commit() == 0
    assert store.epoch == 2


def test_state_and_restore() -> None:
    store, _ = store_of("int8")
    store.write(torch.tensor([4, 5]), torch.rand(2, 5))
    kept = {name: tensor.clone() for name, tensor in store.state().items()}
    before = store.rows
    store.write(torch.tensor([4, 6]), torch.rand(2, 5))
    store.restore(kept, 3)
    assert torch.equal(store.rows, before)
    assert store.epoch == 3
    assert store.commit() == 10


@pytest.mark.parametrize("word", [*ERROR_DTYPES, "top-2"])
def test_training_with_every_codec(word: str) -> None:
    exact, again, coded = train(mlp(), 6), train(mlp(), 6, error_dtype="float32"), train(mlp(), 6, error_dtype=word)
    assert torch.equal(weights(exact.model), weights(again.model))
    assert coded.result.history[-1]["test_loss"] < coded.result.history[0]["test_loss"]
    assert torch.equal(weights(exact.model), weights(coded.model)) == (word in ("float32", "float64"))
    first = train(mlp(), 1, error_dtype=word)
    assert torch.equal(weights(first.model), weights(train(mlp(), 1).model))  # the first visit is of exact targets


def test_rows_without_a_visit_are_counted() -> None:
    trainer = f3.Trainer(mlp(), device="cpu")
    half = [torch.arange(0, 20), torch.arange(10, 30)]
    result = trainer.fit(problem(), 2, batches=lambda epoch: half if epoch else [torch.arange(60)])
    assert ["carried_rows" in record for record in result.history] == [False, True]
    assert result.history[1]["carried_rows"] == 30


@pytest.mark.parametrize("settings", [{"error_store": "memory"}, {"error_dtype": "int8"}])
@pytest.mark.parametrize("method", ["bp", "drtp", "dfa", "last-layer"])
def test_settings_without_effect_are_refused(settings: dict, method: str) -> None:
    with pytest.raises(f3.InputError, match="has no effect"):
        f3.Trainer(mlp(), device="cpu", method=method, **settings)


def test_auto_takes_memory_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert pick_home("auto", 1000, cpu) == pick_home("device", 1000, cpu) == "memory"
    monkeypatch.setattr("f3triton.error_store.homes.available_memory", lambda: 1999)
    with pytest.raises(f3.InputError, match=r"needs 1000 B.* 2\.0 KiB"):
        pick_home("auto", 1000, cpu)


def test_the_summary_names_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--hidden", 8, "--epochs", 1, "--error-dtype", "top-3")
    assert run(*options, "--output-dir", tmp_path / "run") == 0
    assert "error store: memory, top-3, 1,438 rows of 12 bytes, 16.9 KiB" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["error_store"] == {"home": "memory", "error_dtype": "top-3", "bytes": 17256, "bytes_per_sample": 12}
    assert run(*options, "--dry-run") == 0
    assert "error store: memory, top-3, 1,438 rows of 12 bytes, 16.9 KiB" in capsys.readouterr().out
