"""Names that hold anything: terminal escapes, line breaks, markup, bytes that are no text, thousands of characters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import f3triton as f3
from f3triton.base.text import printable

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train import main  # noqa: E402

ESCAPES = "a\x1b[31mred\x1b[0m\x07\u202e\x9b"
SMALL = ["--epochs", "1", "--hidden", "4"]


def write(path: Path, columns: list[str], words: bool = False) -> Path:
    rows = [[f"w{i}" if words else str(i % 7)] * len(columns) + [("no", "yes")[i % 2]] for i in range(40)]
    path.write_text("\n".join(",".join(row) for row in [[*columns, "y"], *rows]) + "\n")
    return path


def shown(text: str) -> bool:
    return all(line.isprintable() and len(line) <= 1100 for line in text.split("\n"))


def test_printable() -> None:
    assert printable("plain Umlaut ü 数据 'a b'\t") == "plain Umlaut ü 数据 'a b'\t"
    assert printable("a\x1b[31m\nb\udcff") == "a\\x1b[31m\\nb\\udcff"
    assert len(printable("x" * 10_000)) == 1000
    assert shown(str(f3.InputError(ESCAPES * 1000)))


@pytest.mark.parametrize(
    "columns", [[ESCAPES, "b"], [f"{i}{'long' * 70}" for i in range(60)], ["$\\frac{$", "b"]], ids=["escapes", "long", "markup"]
)
@pytest.mark.parametrize("words", [False, True])
def test_columns_of_any_name(columns: list[str], words: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "data.csv", columns, words)
    for options in ([], ["--target", "nope"], ["--features", *columns, "--target", columns[0]], ["--lr", columns[0]]):
        try:
            code = main(["--dataset", str(path), *SMALL, "--output-dir", str(tmp_path / "run"), "--overwrite", *options])
        except SystemExit as end:
            code = end.code
        found = capsys.readouterr()
        assert code == (2 if options or words else 0)
        assert shown(found.out)
        assert shown(found.err)
        assert found.err.count("\n") == (code == 2)


@pytest.mark.parametrize("name", ["a$\\frac{$.csv", "数据.csv", os.fsdecode(b"b\xff.csv")])
def test_files_of_any_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        path = write(tmp_path / name, ["a", "b"])
    except OSError:
        pytest.skip("the file system knows no such name")
    assert main(["--dataset", str(path), *SMALL, "--output-dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "curves.png").exists()
    assert main(["--evaluate", str(tmp_path / "run")]) == 0
    found = capsys.readouterr()
    assert shown(found.out)
    assert found.err == ""


def test_a_reader_that_goes_away_ends_no_run(tmp_path: Path) -> None:
    """`python train.py | head -1`, with a name that the terminal has no letters for."""
    command = [
        sys.executable,
        ROOT / "train.py",
        "--dataset",
        write(tmp_path / "数.csv", ["a"]),
        "--output-dir",
        tmp_path / "run",
        *SMALL,
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline().startswith(b"\\u6570.csv: 32 training")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert (tmp_path / "run" / "summary.json").exists()
