"""The best model of a run, and when a run stops early."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import f3triton as f3
from f3triton.run.folder import RunFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train import main

# The fifth evaluation of eight is the best.
UNSTEADY = [
    "--hidden",
    "16",
    "--max-train-samples",
    "100",
    "--lr",
    "0.02",
    "--lr-schedule",
    "constant",
    "--seed",
    "1",
    "--quiet",
]


def run(folder: Path, *options: str) -> Path:
    assert main([*UNSTEADY, "--epochs", "8", "--output-dir", str(folder), *options]) == 0
    return folder


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_best_model_is_kept_and_taken(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run(tmp_path / "run")
    errors = [record["test_error"] for record in records(folder)]
    summary = json.loads((folder / "summary.json").read_text())
    assert min(errors) == summary["best"]["test_error"] == summary["best_test_error"] < errors[-1] == summary["test_error"]
    assert "which='best'" in repr(f3.load(folder))
    assert "which='last'" in repr(f3.load(folder, which="last"))
    for options, which, error in ([], "best", min(errors)), (["--which", "last"], "last", errors[-1]):
        capsys.readouterr()
        assert main(["--evaluate", str(folder), *options]) == 0
        told = f"test error {error} of the {which} model (exactly as stored by the run)"
        assert told in capsys.readouterr().out.splitlines()


def test_without_a_best_model_the_last_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run(tmp_path / "run", "--no-keep-best")
    assert not (folder / "best.safetensors").exists()
    assert f3.load(folder).which == "last"
    with pytest.raises(f3.InputError, match=r"has no best.safetensors; take the last model"):
        f3.load(folder, which="best")
    assert main(["--which", "last", "--quiet"]) == 2
    assert "--which has no effect without --evaluate" in capsys.readouterr().err


@pytest.mark.parametrize("killed_after", [1, 2, 4, 7])
def test_a_resumed_run_has_the_same_best_model(killed_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the killed run had a better one after its last checkpoint."""
    whole, folder = run(tmp_path / "whole"), tmp_path / "run"
    keep = RunFolder.keep

    def killed(self: RunFolder, record: dict, model: torch.nn.Module, best: bool = False) -> None:
        keep(self, record, model, best)
        if record["epoch"] == killed_after:
            keep(self, record, torch.nn.Linear(2, 2), best=True)
            raise MemoryError

    monkeypatch.setattr(RunFolder, "keep", killed)
    options = [*UNSTEADY, "--epochs", "8", "--output-dir", str(folder), "--checkpoint-every", "1e"]
    assert main(options) == 2
    monkeypatch.undo()
    assert main([*options, "--resume", "auto"]) == 0
    same = [(path / "best.safetensors").read_bytes() for path in (whole, folder)]
    assert same[0] == same[1]
    last = max((folder / "checkpoints").iterdir()) / "best.safetensors"
    assert last.read_bytes() == same[0]
    last.write_bytes(same[0][:-1] + b"?")
    assert main(["--resume", str(folder), "--quiet"]) == 0  # from the checkpoint before the damaged one
    assert (folder / "best.safetensors").read_bytes() == same[0]


@pytest.mark.parametrize("pipeline", ["off", "threads:2"])
def test_patience_stops_a_run_and_a_resumed_one_at_the_same_place(pipeline: str, tmp_path: Path) -> None:
    options = ["--patience", "2", "--checkpoint-every", "3", "--pipeline", pipeline]
    folder = run(tmp_path / "run", *options)
    errors = [record["test_error"] for record in records(folder)]
    best = errors.index(min(errors))
    assert len(errors) == best + 3 < 8
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    before = load_file(folder / "model.safetensors")
    assert main(["--resume", str(folder), "--quiet"]) == 0
    assert [record["test_error"] for record in records(folder)] == errors
    assert all(tensor.equal(before[name]) for name, tensor in load_file(folder / "model.safetensors").items())


def test_patience_that_makes_no_sense() -> None:
    with pytest.raises(f3.InputError, match="patience must be a whole number of at least 1, got 0"):
        f3.Settings(patience=0)
    with pytest.raises(f3.InputError, match="patience 2 needs test data"):
        f3.Trainer(f3.models.MLP([4, 3, 2]), patience=2).fit((torch.randn(9, 4), torch.arange(9) % 2), 1)
