"""`--evaluate` prepares the data as the run did, and tells when they are other data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import f3triton as f3

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train import main  # noqa: E402

ROWS = [(i % 7, (i * 3) % 5, ("no", "yes")[i % 7 > 3]) for i in range(60)]
Rows = list[tuple[object, ...]]


def write(path: Path, rows: Rows = ROWS, header: str = "a,b,y") -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    data = write(tmp_path / "data.csv")
    assert (
        main(["--dataset", str(data), "--hidden", "8", "--epochs", "3", "--output-dir", str(tmp_path / "run"), "--quiet"]) == 0
    )
    return tmp_path


def evaluate(run: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert main(["--evaluate", str(run)]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("change", "header"),
    [
        (lambda rows: [(a * 100, b, y) for a, b, y in rows], "a,b,y"),
        (lambda rows: rows, "b,a,y"),
        (lambda rows: rows[:50], "a,b,y"),
    ],
    ids=["scaled", "names swapped", "fewer rows"],
)
def test_other_values_give_another_figure(
    change: Callable[[Rows], Rows], header: str, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all(line.endswith("(exactly as stored by the run)") for line in evaluate(ran / "run", capsys))
    write(ran / "data.csv", change(ROWS), header)
    told, *lines = evaluate(ran / "run", capsys)
    assert told.startswith("the test data are not those of the run")
    assert lines
    assert all("(stored by the run: " in line for line in lines)


@pytest.mark.parametrize(
    ("rows", "header", "told"),
    [
        ([(a, b, {"yes": "aye"}.get(y, y)) for a, b, y in ROWS], "a,b,y", "the classes: no, yes; now: aye, no"),
        ([(a, b, y if i else "maybe") for i, (a, b, y) in enumerate(ROWS)], "a,b,y", "now: maybe, no, yes"),
        ([(a, b, 1, y) for a, b, y in ROWS], "a,b,c,y", "column 'c' is new"),
        ([(a, y) for a, b, y in ROWS], "a,y", "column 'b' is gone"),
        ([(f"w{a}", b, y) for a, b, y in ROWS], "a,b,y", "column 'a': number; now: category, w0"),
        (ROWS, "a,b,label", "the target: y; now: label"),
        ([(a, b, a * 1.5) for a, b, _ in ROWS], "a,b,y", "the task: classification; now: regression"),
    ],
    ids=["class renamed", "class gained", "column gained", "column lost", "type", "target", "task"],
)
def test_data_of_another_form_are_refused(
    rows: Rows, header: str, told: str, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(ran / "data.csv", rows, header)
    assert main(["--evaluate", str(ran / "run")]) == 2
    error = capsys.readouterr().err
    assert "is not as it was when the model was trained" in error
    assert told in error
    assert error.count("\n") == 1


def test_a_text_is_cut_into_the_tokens_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcd efgh\n" * 40)
    options = ["--context", "8", "--depth", "1", "--dim", "8", "--heads", "2", "--epochs", "1", "--quiet"]
    assert main(["--text", str(text), *options, "--output-dir", str(tmp_path / "run")]) == 0
    text.write_text("abcd efgg\n" * 40)  # one token fewer, which made all others other ones
    assert evaluate(tmp_path / "run", capsys)[0].startswith("the test data are not those of the run")
    text.write_text("abcd efgh\n" * 40 + "z")
    assert main(["--evaluate", str(tmp_path / "run")]) == 2
    assert "'z'" in capsys.readouterr().err


def test_load_dataset_with_the_preprocessing_of_a_run(ran: Path) -> None:
    prepared = f3.load(ran / "run").preprocessing
    train, test = f3.load_dataset(str(ran / "data.csv"))
    same = f3.load_dataset(str(ran / "data.csv"), preprocessing=prepared)
    assert torch.equal(same[0].inputs, train.inputs)
    assert torch.equal(same[1].inputs, test.inputs)
    other = f3.load_dataset(str(write(ran / "other.csv", [(100 * a, b, y) for a, b, y in ROWS])), preprocessing=prepared)
    assert other[0].preprocessing is prepared
    assert torch.equal(other[1].inputs[:, 1], test.inputs[:, 1])
    assert float((other[1].inputs[:, 0] - test.inputs[:, 0]).abs().max()) > 50
