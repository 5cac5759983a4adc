"""Every command and every piece of Python in README and docs runs: small, on bundled or made-up data, in this process."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image
from test_own_data import write_photos, write_sales
from test_train_script import run, write_csv

import f3triton as f3
from f3triton.run.options import make_settings, parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
# What cannot run here, by how it begins, and why.
NOT_RUN = {
    "pip ": "an installation: tests/test_install.py",
    "pytest": "the tests themselves",
    "torchrun ": "needs several processes: tests/test_torchrun.py; here only whether the options go together",
    "python -m bench": "benchmarks take hours: tests/test_bench_gpu.py and `python -m bench all --quick`",
    "python -m f3triton.error_store": "tests/test_error_format.py",
}
ELSEWHERE = {"ylecun/mnist": "digits", "5000": "1", "../shared/data/tiny-shakespeare/input.txt": "input.txt"}
SMALL = ["--max-train-samples", "60", "--max-test-samples", "20", "--quiet"]


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for page, text in PAGES.items():
        for found in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            yield page, found


def commands() -> Iterator[tuple[str, str]]:
    """Page and command, of those on one line with `&&` each by itself; a line that ends in a backslash goes on."""
    for page, block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in shlex.join(shlex.split(line, comments=True)).split(" '&&' "):
                if command:
                    yield page, command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder of a reader: the files and runs that the pages name."""
    where, before = tmp_path_factory.mktemp("reader"), Path.cwd()
    os.chdir(where)
    for name in ("big.csv", "data.csv", "mine.csv"):
        write_csv(where / name, 200)
    write_csv(where / "wine.csv", 60, "alcohol,acidity,quality", "{0}.5,{1}.25,{0}")
    for name in ("shakespeare.txt", "input.txt"):
        (where / name).write_text("To be, or not to be, that is the question. ROMEO: aye.\n" * 120)
    write_sales(where / "sales.csv")
    write_sales(where / "new-sales.csv", 5)
    write_photos(where / "photos", 12)
    for name in ("cat.jpg", "dog.png"):
        Image.new("RGB", (50, 40)).save(where / name)
    write_csv(where / "new.csv", 5, "alcohol,acidity", "{0}.5,{1}.25")
    plain = [*SMALL, "--epochs", "1", "--hidden", "16x2"]
    assert run(*plain, "--output-dir", "runs/digits-f3-...") == 0
    assert run(*plain, "--output-dir", "runs/my-run", "--method", "local") == 0
    assert run(*SMALL, "--epochs", "1", "--output-dir", "runs/theirs", "--dataset", "mine.csv") == 0
    assert run(*plain, "--output-dir", "runs/wine-f3-...", "--dataset", "wine.csv", "--target", "quality") == 0
    assert run(*plain, "--output-dir", "runs/sales-f3-...", "--dataset", "sales.csv", "--target", "sold") == 0
    assert run(*plain, "--output-dir", "runs/photos-f3-...", "--dataset", "photos", "--image-size", "8") == 0
    for name in ("shakespeare", "input"):
        text = ["--text", f"{name}.txt", "--dim", "16", "--depth", "1"]
        assert run(*SMALL, *text, "--epochs", "1", "--output-dir", f"runs/{name}-f3-...") == 0
    yield where
    os.chdir(before)


def epochs_of(text: str) -> int:
    """The fewest that its windows allow."""
    visits = re.search(r"visits[ =](\d+)", text)
    return int(visits[1]) if visits else 5 if re.search(r"window[ =]|streaming", text) else 1


@pytest.mark.parametrize(("page", "command"), list(dict.fromkeys(commands())), ids=str)
def test_commands_run(page: str, command: str, folder: Path) -> None:
    words = [ELSEWHERE.get(word, word) for word in shlex.split(command)]
    while "=" in words[0]:  # a variable of the environment
        del words[0]
    if words[:2] != ["python", "train.py"]:
        assert any(" ".join(words).startswith(start) for start in NOT_RUN), f"{page}: {command}: why is it not run?"
        if words[0] == "torchrun":
            make_settings(parse(words[words.index("train.py") + 1 :]))
        return
    words = words[2:]
    if not {"--evaluate", "--predict", "--sample", "--resume", "--help"} & {*words} or words[-1:] == ["auto"]:
        words += [*SMALL, "--epochs", str(epochs_of(command))]
        words += ["--patch-size", "4"] if "vit" in command else []  # the digits are 8x8
        words += ["--dim", "16", "--depth", "1"] if "--text" in words else []
        words += ["--dataset", "digits"] if "--recipe" in words else []
    assert run(*words) == 0, f"{page}: {command}"


@pytest.mark.parametrize("page", list(dict.fromkeys(page for page, _ in blocks("python"))))
def test_python_runs(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces of a page one after another, in one namespace; a GPU's operations are those of torch here."""
    for name in ("wandb", "mlflow"):  # not needed but here
        monkeypatch.setitem(sys.modules, name, MagicMock())
    if importlib.util.find_spec("onnxscript") is None:
        monkeypatch.setattr("torch.onnx.export", MagicMock())  # tests/test_natural_calls.py
    names: dict[str, object] = {"f3": f3, "torch": torch}
    for found, block in blocks("python"):
        if found == page:
            code = re.sub(r"epochs=\d+", f"epochs={epochs_of(block)}", block)
            code = re.sub(r"from f3triton.kernels.gpu import ops\b", "from f3triton.kernels import eager as ops", code)
            exec(compile(code.replace('device="cuda"', 'device="cpu"'), page, "exec"), names)
