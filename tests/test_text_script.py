"""`train.py` on text, as a user runs it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from test_train_script import fails, run

import f3triton as f3

SMALL = ["--dim", 8, "--depth", 1, "--heads", 2, "--mlp-width", 8, "--context", 8, "--epochs", 2, "--batch-size", 4]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 8, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "fox"
    assert run("--text", text, *SMALL, "--output-dir", folder, "--quiet") == 0
    return folder


def test_a_run_reports_bits(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in (summary, records[-1]):
        assert record["test_bits_per_character"] == pytest.approx(record["test_loss"] / math.log(2))
        assert record["test_perplexity"] == pytest.approx(math.exp(record["test_loss"]))
    assert summary["task"] == "language-modeling"
    assert summary["best_test_loss"] == min(record["test_loss"] for record in records)
    assert summary["error_store"]["bytes_per_sample"] == 8 * 28 * 4
    assert (folder / "curves.png").exists()


def test_it_can_be_loaded(folder: Path) -> None:
    model = f3.load(folder)
    probabilities = model(["the quic", "over the"])
    assert probabilities.shape == (2, 8, 28)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 8))
    assert all(isinstance(token, str) and len(token) == 1 for token in model.predict(["the", "fox"]))
    with pytest.raises(f3.InputError, match=r"same number of tokens, from 1 to the context 8, got \[3, 5\]"):
        model(["the", "quick"])
    with pytest.raises(f3.InputError, match=r"text 0 has the character 'T'"):
        model("The")


def test_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f3.load(folder)
    text = model.generate("the quick", 20, 1.0, 3)
    assert text.startswith("the quick")
    assert len(text) == 29
    assert model.generate("the quick", 20, 1.0, 3) == text != model.generate("the quick", 20, 1.0, 4)
    assert len(model.generate(None, 5)) == 5
    # the likeliest token after the last 8 of them
    greedy = model.generate("the quick brown", 1, 0)
    assert greedy[-1] == model.predict(["ck brown"])[0]
    capsys.readouterr()
    assert run("--sample", folder, "--prompt", "the quick", "--tokens", 20, "--temperature", 1, "--seed", 3) == 0
    assert capsys.readouterr().out == text + "\n"
    for arguments, message in (
        (["--tokens", 0], "tokens of a sample must be a whole number of at least 1, got 0"),
        (["--temperature", -1], "temperature must be a finite number of at least 0, got -1.0"),
        (["--prompt", ""], "prompt '' has no token"),
        (["--prompt", "7"], "prompt '7' has the character '7'"),
        (["--epochs", 3], "--sample goes with"),
    ):
        assert message in fails(capsys, "--sample", folder, *arguments)


def test_draws_follow_the_probabilities(folder: Path) -> None:
    model = f3.load(folder)
    draws = [model.generate("the quic", 1, 1.0, seed)[-1] for seed in range(300)]
    expected = dict(zip(model.preprocessing.target_names, model(["the quic"])[0, -1].tolist(), strict=True))
    top = max(expected, key=expected.get)
    deviation = math.sqrt(expected[top] * (1 - expected[top]) / 300)
    assert abs(draws.count(top) / 300 - expected[top]) < 4 * deviation


def test_evaluate_repeats_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--evaluate", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.endswith("(exactly as stored by the run)") for line in lines)


def test_a_sample_is_printed(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "run"
    assert run("--text", text, *SMALL, "--output-dir", where, "--tokens", 12, "--prompt", "fox", "--compare", "--tied") == 0
    out = capsys.readouterr().out
    assert "f3: " in out
    assert "bits per character" in out
    assert "a sample:\nfox" in out
    summary = json.loads((where / "summary.json").read_text())
    assert set(summary["comparison"][0]) >= {"method", "test_loss", "test_bits_per_character", "test_perplexity"}


@pytest.mark.parametrize("extra", [[], ["--granularity", "layer", "--feedback-shape", "full"], ["--tokenizer", "bytes"]])
def test_dry_run(text: Path, capsys: pytest.CaptureFixture[str], extra: list[str]) -> None:
    assert run("--text", text, *SMALL, "--dry-run", *extra) == 0
    out = capsys.readouterr().out
    width = 256 if "bytes" in extra else 28
    assert f"error store: memory, float32x8, 39 rows of {8 * width * 4:,} bytes ({width * 4:,} a token)" in out


def test_a_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"story": "abcabcabd"}) for _ in range(40)), encoding="utf-8")
    where = tmp_path / "run"
    assert run("--text", "story", "--dataset", file, *SMALL, "--output-dir", where, "--quiet") == 0
    assert run("--evaluate", where, "--quiet") == 0


def test_what_is_refused(text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    short = ["--text", text, "--context", 8]
    for arguments, message in (
        ([*short, "--heads", 3, "--dim", 8], "3 heads do not divide the dimension 8"),
        (["--text", text, "--context", 400], "use a smaller context (--context), or more text"),
        (["--text", text, "--context", 1], "context (--context) must be a whole number of at least 2, got 1"),
        (["--text", tmp_path / "none.txt"], "No such file"),
        ([*short, "--model", "mlp"], "model 'mlp' does not go with the task language-modeling"),
        (["--model", "gpt"], "model 'gpt' does not go with the task classification of 'digits'; allowed: mlp, vit, convnet"),
        (["--task", "language-modeling"], "task 'language-modeling' needs a text"),
        (["--text", text, "--task", "regression"], "--text is for the task 'language-modeling', got --task regression"),
        (["--text", text, "--target", "y"], "--target has no effect with --text"),
        ([*short, "--prompt", "7"], "prompt '7' has the character '7'"),
        ([*short, "--tokens", 0], "tokens of a sample must be a whole number"),
        ([*short, "--loss", "mse"], "loss 'mse' does not go with language-modeling"),
        (["--text", text, "--tokenizer", "words"], "tokenizer 'words' is no file"),
        (["--context", 8], "--context has no effect without --text"),
        ([*short, "--hidden", 9], "--hidden has no effect with --model gpt"),
        (["--tied", "--hidden", 9], "--tied has no effect with --model mlp; it belongs to gpt"),
    ):
        assert message in fails(capsys, *arguments, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_text_has_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--hidden", 4, "--epochs", 1, "--max-train-samples", 50, "--quiet", "--output-dir", tmp_path / "run") == 0
    assert "was trained on a data set of kind 'image'; only text has samples" in fails(capsys, "--sample", tmp_path / "run")
