"""`--config FILE`: options from a TOML file, or from another run's `config.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train import main

TOML = """
title = "small"
[data]
dataset = "digits"
[options]
hidden = [12, 12, 8]
lr = 3e-3
epochs = 2
max_train_samples = 100
quiet = true
keep_best = false
"""


def options_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["options"]


def test_a_file_gives_options_that_others_override(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(TOML)
    assert main(["--config", str(tmp_path / "small.toml"), "--lr", "0.01", "--output-dir", str(tmp_path / "one")]) == 0
    one = options_of(tmp_path / "one")
    assert (one["lr"], one["hidden"], one["epochs"], one["keep_best"]) == (0.01, [12, 12, 8], 2, False)
    again = ["--config", str(tmp_path / "one" / "config.json"), "--output-dir", str(tmp_path / "again")]
    assert main(again) == 0
    assert options_of(tmp_path / "again") == one | {"output_dir": str(tmp_path / "again")}
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again")]
    assert models[0] == models[1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lr = ", "holds no valid TOML"),
        ("[options]\nrate = 1", "[options] holds 'rate', which is no option; names are those of --help, with underscores"),
        ("[options]\nepochz = 1", "[options] holds 'epochz', which is no option; did you mean epochs?"),
        ("[options]\nweight-decay = 1", "did you mean weight_decay?"),
        ("lr = 1", "lr is not below [options], where all options belong; allowed: title, source, note, data, options"),
        ("[training]\nlr = 1", "[training] is not below [options]"),
        ("[data]\ntarget = 'a'", "[data] holds target; allowed: dataset; all other options belong below [options]"),
        ("options = 1", "options is 1; allowed: an object"),
        ("[options]\nlr = 'fast'", "options.lr is 'fast'; allowed: a finite number or null"),
        ("[options]\nresume = 'auto'", "resume is for the command line only"),
        ("[options]\npredict = ['runs/one', 'rows.csv']", "predict is for the command line only"),
        ("[options]\nhidden = ['many']", "options.hidden"),
        (None, "No such file"),
    ],
)
def test_what_is_refused(text: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if text is not None:
        (tmp_path / "wrong.toml").write_text(text)
    assert main(["--config", str(tmp_path / "wrong.toml"), "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        ("method = 'bp'\nfeedback = 'trinomial'", [], "--feedback has no effect with the method 'bp'"),
        ("hidden_scale = 1.0", ["--method", "bp"], "--hidden-scale has no effect with the method 'bp'"),
        ("drop_heads = true", [], "--drop-heads has no effect with the signal 'delayed-error'"),
        ("shuffle_buffer = 10", [], "--shuffle-buffer has no effect without --streaming"),
    ],
)
def test_options_without_effect_are_refused_as_typed_ones_are(
    text: str, options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "idle.toml").write_text(f"[options]\n{text}\n")
    assert main(["--config", str(tmp_path / "idle.toml"), *options, "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_another_method_for_a_run_s_options(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of a `config.json`, which says every option, those count that are not the default; `false` says nothing."""
    small = ["--hidden", "8", "--max-train-samples", "60", "--epochs", "1", "--quiet", "--output-dir"]
    assert main([*small, str(tmp_path / "plain")]) == 0
    assert main([*small, str(tmp_path / "own"), "--feedback", "kaiming"]) == 0
    assert (
        main(["--config", str(tmp_path / "plain" / "config.json"), "--method", "bp", "--output-dir", str(tmp_path / "bp")]) == 0
    )
    assert (
        main(["--config", str(tmp_path / "own" / "config.json"), "--method", "bp", "--output-dir", str(tmp_path / "no")]) == 2
    )
    assert "--feedback has no effect with the method 'bp'" in capsys.readouterr().err
    (tmp_path / "off.toml").write_text("[options]\nmethod = 'bp'\nmask_target = false\n")
    assert main(["--config", str(tmp_path / "off.toml"), *small, str(tmp_path / "off")]) == 0


def test_files_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--config", str(tmp_path / "a.toml"), "--recipe", "mnist"]) == 2
    assert "--config and --recipe cannot go together" in capsys.readouterr().err
