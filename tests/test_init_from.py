"""`--init-from RUN`: a new run begins with another's weights; `--resume RUN --epochs MORE` where that goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train import main

FAST = ["--max-train-samples", "100", "--hidden", "12"]


def run(folder: Path, *options: str) -> int:
    return main([*FAST, "--epochs", "1", "--output-dir", str(folder), *options])


def test_a_run_begins_with_the_weights_of_another(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path / "a", "--quiet") == 0
    begin = ["--init-from", str(tmp_path / "a"), "--which", "last", "--lr", "0"]  # does not move from there
    assert run(tmp_path / "b", *begin, "--seed", "5", "--checkpoint-every", "1e") == 0
    assert f"begins with the last model of {tmp_path / 'a'}\n" in capsys.readouterr().out
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(tensor.equal(b[name]) for name, tensor in a.items())
    assert json.loads((tmp_path / "b" / "config.json").read_text())["options"]["init_from"] == str(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "gone")
    assert main(["--resume", str(tmp_path / "b"), "--quiet"]) == 0  # which has its own weights now
    assert main(["--resume", str(tmp_path / "b"), "--init-from", str(tmp_path / "gone")]) == 2
    assert "--init-from and --resume cannot go together" in capsys.readouterr().err


def test_a_last_layer_of_other_sizes_is_new(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path / "a", "--quiet") == 0
    rows = [f"{','.join(str((i * j) % 7) for j in range(64))},{'xyz'[i % 3]}" for i in range(60)]
    (tmp_path / "three.csv").write_text("\n".join([",".join([*(f"c{j}" for j in range(64)), "y"]), *rows]) + "\n")
    begin = ["--dataset", str(tmp_path / "three.csv"), "--init-from", str(tmp_path / "a"), "--lr", "0"]
    assert main([*FAST[2:], "--epochs", "1", "--output-dir", str(tmp_path / "b"), *begin]) == 0
    assert "its last layer is new: [3], there [10]" in capsys.readouterr().out
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a["stages.0.weight"].equal(b["stages.0.weight"])
    assert run(tmp_path / "c", *begin[2:4], "--hidden", "13") == 2
    error = capsys.readouterr().err
    assert "stages.0.bias is [12] there, and [13] here" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (["--hidden", "12", "9", "--activation", "relu", "--norm", "layer"], ["--hidden", "12", "9"]),
        (["--method", "local", "--hidden", "12"], []),  # with other defaults: relu, layer
        (["--model", "convnet", "--channels", "3", "--hidden", "5"], ["--model", "convnet"]),
        (["--model", "vit", "--patch-size", "4", "--dim", "8", "--depth", "1", "--position-embedding"], []),
        (["--text", "text.txt", "--context", "8", "--dim", "8", "--depth", "1", "--tied"], ["--text", "text.txt"]),
    ],
)
def test_the_network_is_that_of_the_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: list[str], said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("a bird sat on a branch. " * 40)
    few = ["--max-train-samples", "60", "--max-test-samples", "20", "--epochs", "1", "--quiet", "--which", "last"]
    assert main([*few[:-2], *network, "--output-dir", "a"]) == 0
    assert main([*few, *said, "--init-from", "a", "--method", "bp", "--lr", "0", "--output-dir", "b"]) == 0
    a, b = (json.loads(Path(name, "config.json").read_text())["network"] for name in "ab")
    assert {name: value for name, value in a.items() if name != "exits"} == b
    a, b = (load_file(Path(name, "model.safetensors")) for name in "ab")
    assert all(tensor.equal(b[name]) for name, tensor in a.items() if name.startswith("stages."))


def test_what_is_given_is_not_taken_from_the_other_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path / "a", "--quiet", "--activation", "relu") == 0
    begin = ["--quiet", "--epochs", "1", "--max-train-samples", "60", "--init-from", str(tmp_path / "a")]
    assert main([*begin, "--activation", "gelu", "--output-dir", str(tmp_path / "b")]) == 0
    assert json.loads((tmp_path / "b" / "config.json").read_text())["network"]["activation"] == "gelu"
    wrong = {
        ("--model", "convnet"): "stages.0",
        ("--hidden", "13"): "stages.0.bias is [12] there, and [13] here",
        ("--init-from", str(tmp_path / "none")): "does not exist",
    }
    for options, line in wrong.items():
        assert main([*begin, *options, "--output-dir", str(tmp_path / "c")]) == 2
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
        assert not (tmp_path / "c").exists()


def test_more_epochs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    constant = ["--lr-schedule", "constant", "--quiet"]
    assert run(tmp_path / "whole", *constant, "--epochs", "3") == 0
    assert run(tmp_path / "part", *constant, "--checkpoint-every", "1e") == 0
    assert main(["--resume", str(tmp_path / "part"), "--epochs", "3"]) == 0
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert models[0] == models[1]
    assert run(tmp_path / "cosine", "--quiet", "--checkpoint-every", "1e") == 0
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "cosine"), "--epochs", "3"]) == 2
    assert "epochs was 1 and is 3; its learning rate goes to zero with the last epoch" in capsys.readouterr().err
