"""Records for TensorBoard."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from f3triton.run.log import figures
from train import main

QUICK = ["--hidden", "8", "--max-train-samples", "100", "--lr-schedule", "constant", "--quiet", "--log", "tensorboard"]


class Writer:
    """Stands for a SummaryWriter; keeps what it is given, in a file as the real one."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, folder: str) -> None:
        self.found, self.closed = [], False
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / f"events.out.tfevents.{len(Writer.made)}").touch()
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.found.append((name, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, with a `Writer` for its SummaryWriter."""
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr("torch.utils.tensorboard", fake, raising=False)
    monkeypatch.setattr(Writer, "made", [])


def test_records_go_to_tensorboard_those_before_a_resumption_too(tmp_path: Path, tensorboard: None) -> None:
    folder = tmp_path / "run"
    run = [*QUICK, "--output-dir", str(folder), "--checkpoint-every", "1e"]
    assert main([*run, "--epochs", "2"]) == 0
    assert main(["--resume", str(folder), "--epochs", "3", "--quiet"]) == 0
    assert main([*run, "--epochs", "1", "--overwrite"]) == 0
    errors = [[(step, value) for name, value, step in one.found if name == "test_error"] for one in Writer.made]
    assert [len(one) for one in errors] == [2, 3, 1]
    assert errors[0] == errors[1][:2]
    record = json.loads((folder / "metrics.jsonl").read_text())
    assert errors[2] == [(record["step"], record["test_error"])]
    assert [path.name for path in (folder / "tensorboard").iterdir()] == ["events.out.tfevents.2"]
    assert all(one.closed for one in Writer.made)


def test_those_of_a_comparison_have_folders_of_their_own(tmp_path: Path, tensorboard: None) -> None:
    folder = tmp_path / "run"
    assert main([*QUICK, "--output-dir", str(folder), "--epochs", "2", "--compare"]) == 0
    others = {path.name for path in (folder / "tensorboard").iterdir() if path.is_dir()}
    assert others == {"bp"}
    errors = [[step for name, _, step in one.found if name == "test_error"] for one in Writer.made]
    assert len(errors) == 2
    assert all(one == errors[0] and len(one) == 2 for one in errors)
    assert all(one.closed for one in Writer.made)


def test_a_missing_package_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main([*QUICK, "--output-dir", str(tmp_path / "run")]) == 2
    told = "train.py: error: --log tensorboard needs the package tensorboard, which is not installed: pip install tensorboard\n"
    assert capsys.readouterr().err == told
    assert not (tmp_path / "run").exists()


def test_figures_by_target_have_names_of_their_own() -> None:
    record = {"step": 3, "test_mse": 0.5, "test_mse_in_units": {"width": 2.0}}
    assert list(figures(record)) == [("test_mse", 0.5), ("test_mse_in_units/width", 2.0)]
