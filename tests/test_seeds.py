"""`--seed 0 1 2`: a run with each seed, and one table."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train import main  # noqa: E402

FAST = ["--max-train-samples", "100", "--hidden", "12", "--epochs", "1"]


def test_the_script_itself_takes_several_seeds(tmp_path: Path) -> None:
    """It looks over its options before it calls `main`."""
    command = [sys.executable, str(ROOT / "train.py"), *FAST, "--seed", "3", "4", "--output-dir", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "seeds 3 4:" in done.stdout


def test_each_seed_has_a_run_and_all_have_one_summary(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*FAST, "--seed", "3", "4", "--output-dir", str(tmp_path / "runs"), "--compare"]) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "runs" / "summary.json").read_text())
    runs = [json.loads((tmp_path / "runs" / f"seed-{seed}" / "summary.json").read_text()) for seed in (3, 4)]
    assert summary["seeds"] == [run["seed"] for run in runs] == [3, 4]
    assert set(summary["figures"]) == {"f3", "bp"}
    found = summary["figures"]["f3"]["test_error"]
    assert found["values"] == [run["test_error"] for run in runs]
    assert found["mean"] == statistics.fmean(found["values"])
    assert found["standard_deviation"] == statistics.stdev(found["values"])
    assert f"f3, test error: mean {found['mean']:.4g}, standard deviation" in out
    assert main([*FAST, "--seed", "4", "--quiet", "--output-dir", str(tmp_path / "four")]) == 0
    models = [path / "model.safetensors" for path in (tmp_path / "runs" / "seed-4", tmp_path / "four")]
    assert models[0].read_bytes() == models[1].read_bytes()
    assert main([*FAST, "--seed", "3", "4", "--output-dir", str(tmp_path / "runs")]) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--seed", "1", "2", "01"], "seeds 1 2 01: one comes twice"),
        (["--seed", "1", "2", "--dry-run"], "--dry-run takes one seed, got 1 2"),
        (["--seed", "1", "2", "--resume", "auto"], "--resume takes one seed"),
    ],
)
def test_what_is_refused(
    options: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_sweep_in_the_docs_runs(capsys: pytest.CaptureFixture) -> None:
    code = re.search(r"```python\n(import f3triton.*?)```", (ROOT / "docs" / "runs.md").read_text(), re.DOTALL)[1]
    exec(code, {})
    assert capsys.readouterr().out.startswith("{0.0003: ")
