"""What a run's folder goes through: runs that are written over or killed, files that others delete, two runs at once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import f3triton as f3
from f3triton.run.checkpoint import Checkpoints
from f3triton.run.folder import RunFolder
from f3triton.run.lock import FolderLock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train as script  # noqa: E402

FAST = ["--hidden", "16", "--epochs", "2", "--max-train-samples", "100", "--quiet"]


def run(folder: Path, *options: object) -> int:
    return script.main([*FAST, "--output-dir", str(folder), *map(str, options)])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A finished run, with a checkpoint."""
    assert run(tmp_path / "run", "--checkpoint-every", "1e", "--seed", 3) == 0
    return tmp_path / "run"


def during(monkeypatch: pytest.MonkeyPatch, do: Callable[[int], object], after: int = 1) -> None:
    """Let something happen after a record was written, the `after`-th (with the records so far)."""
    keep, seen = RunFolder.keep, []

    def kept(self: RunFolder, record: dict, model: torch.nn.Module, best: bool) -> None:
        keep(self, record, model, best)
        seen.append(record)
        if len(seen) == after:
            do(len(seen))

    monkeypatch.setattr(RunFolder, "keep", kept)


# --- a run that is written over ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        ["--diagnose", "0"],
        ["--checkpoint-every", "2", "--keep", "0"],
        ["--eval-every", "0"],
        ["--lr", "1e38", "--optimizer", "sgd", "--loss", "mse", "--activation", "relu"],  # diverges in its first epoch
    ],
    ids=lambda wrong: wrong[0],
)
def test_a_run_stays_until_there_is_something_in_its_place(
    wrong: list[str], there: Path, capsys: pytest.CaptureFixture
) -> None:
    before = content(there)
    assert run(there, "--overwrite", *wrong) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert content(there) == before


def test_a_run_is_gone_once_there_is_an_evaluation(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(there)
    during(monkeypatch, lambda _: before.update(now=content(there)))
    (there / "notes.txt").write_text("the user's own")
    assert run(there, "--overwrite") == 0
    assert set(before["now"]) == {"config.json", "metrics.jsonl", "model.safetensors", "best.safetensors", "notes.txt"}
    assert {path.name for path in there.iterdir()} == {*before["now"], "summary.json", "curves.png"}
    assert json.loads((there / "config.json").read_text())["options"]["seed"] == 0


@pytest.mark.parametrize("pipeline", ["off", "threads:2"])
def test_a_checkpoint_before_the_first_evaluation_is_something(
    pipeline: str, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise f3.InputError("no evaluation")

    monkeypatch.setattr(RunFolder, "keep", fail)
    assert run(there, "--overwrite", "--checkpoint-every", "1", "--eval-every", "2", "--pipeline", pipeline) == 2
    assert {path.name for path in there.iterdir()} == {"config.json", "model.safetensors", "checkpoints"}
    monkeypatch.undo()
    assert script.main(["--resume", str(there)]) == 0
    assert json.loads((there / "summary.json").read_text())["steps"] == 4


def test_killed_before_the_first_evaluation(there: Path) -> None:
    """The old run is whole; what the killed one has left goes with the next."""
    before = content(there)
    if os.fork() == 0:
        RunFolder.keep = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        run(there, "--overwrite")
        os._exit(1)
    assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
    assert {name: text for name, text in content(there).items() if not name.startswith(".new/")} == before
    assert f3.load(there).predict(torch.zeros(1, 64, dtype=torch.uint8))
    assert run(there, "--overwrite") == 0
    assert not (there / ".new").exists()


def test_half_written_files_of_a_killed_run_go(there: Path) -> None:
    for name in (".curves.png.4711.tmp", ".model.safetensors.4711.tmp", ".mine.tmp"):
        (there / name).touch()
    assert script.main(["--resume", str(there), "--quiet"]) == 0
    assert [path.name for path in there.iterdir() if path.name.startswith(".")] == [".mine.tmp"]


def test_all_files_have_the_mode_that_the_user_gives_files(there: Path) -> None:
    (there / "mine").touch()
    assert len({path.stat().st_mode for path in there.rglob("*") if path.is_file()}) == 1


# --- files that others delete -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["folder", "config.json", "metrics.jsonl", "a line", "model.safetensors"])
@pytest.mark.parametrize("after", [1, 2])
def test_what_others_delete_is_written_again(
    lost: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(tmp_path / "whole") == 0
    capsys.readouterr()

    def lose(_: int) -> None:
        path = tmp_path / "run" / lost
        if lost == "folder":
            shutil.rmtree(path.parent)
        elif lost == "a line":
            (path.parent / "metrics.jsonl").write_text("")
        else:
            path.unlink()

    during(monkeypatch, lose, after)
    assert run(tmp_path / "run") == 0
    error = capsys.readouterr().err
    if (lost, after) != ("model.safetensors", 1):  # the next evaluation writes another
        assert error.startswith("train.py: warning: ")
        assert error.count("\n") == 1
        assert "while the run went on; written again" in error
    found, whole = content(tmp_path / "run"), content(tmp_path / "whole")
    assert set(found) | {"best.safetensors"} == set(whole)  # earlier weights are gone
    assert found["model.safetensors"] == whole["model.safetensors"]
    records = [
        [{k: v for k, v in json.loads(line).items() if k != "learning_seconds"} for line in files["metrics.jsonl"].splitlines()]
        for files in (found, whole)
    ]
    assert records[0] == records[1]
    assert script.main(["--evaluate", str(tmp_path / "run"), "--quiet"]) == 0


# --- two runs at once -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def another_process(folder: Path) -> Iterator[int]:
    """A process that has a folder locked."""
    code = "import sys, time; from pathlib import Path; from f3triton.run.lock import FolderLock; "
    code += "lock = FolderLock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process.pid
        process.kill()


@pytest.mark.parametrize("how", ["new", "overwrite", "resume", "auto"])
def test_the_second_run_in_a_folder_is_refused(how: str, there: Path, capsys: pytest.CaptureFixture) -> None:
    if how == "new":  # the first has not written anything yet
        shutil.rmtree(there)
    capsys.readouterr()
    with another_process(there) as first:
        before = content(there)
        options = {"overwrite": ["--overwrite"], "auto": ["--resume", "auto", "--checkpoint-every", "1e", "--seed", "3"]}
        code = script.main(["--resume", str(there)]) if how == "resume" else run(there, *options.get(how, []))
        assert code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        if Path("/proc/locks").exists():
            assert f"is in use by another run (process {first})" in error
        assert content(there) == before
    if how == "resume":  # and when that one has died, nothing is in the way
        assert script.main(["--resume", str(there), "--quiet"]) == 0


def test_two_fits_cannot_share_checkpoints(tmp_path: Path) -> None:
    def fit(on_step: Callable[[int], object] | None = None) -> None:
        trainer = f3.Trainer(f3.models.MLP([4, 8, 3]), device="cpu", batch_size=5)
        trainer.fit((torch.randn(20, 4), torch.arange(20) % 3), 1, checkpoints=Checkpoints(tmp_path / "c", 1), on_step=on_step)

    with pytest.raises(f3.InputError, match="is in use by another run"):
        fit(lambda _: fit())
    fit()
    FolderLock(tmp_path / "c").release()


def test_an_error_store_has_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path / "run", "--error-store", f"{tmp_path}/run/") == 2
    assert "give the store a folder of its own" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- the comparison ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["diverged", "interrupted"])
def test_a_comparison_that_fails_costs_nothing_else(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = f3.Trainer.fit

    def failing(self: f3.Trainer, *arguments: object, **keywords: object) -> object:
        if self.method == "bp":
            if end == "diverged":
                raise script.Diverged(3, float("nan"))
            self.result.status = "interrupted"
            return self.result
        return fit(self, *arguments, **keywords)

    monkeypatch.setattr(f3.Trainer, "fit", failing)
    assert run(tmp_path / "run", "--compare") == (0 if end == "diverged" else 130)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert "comparison" not in summary


def test_names_by_the_second_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    for _ in range(3):
        assert script.main(FAST) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 3


# --- a full disk, and figures that are none ---------------------------------------------------------------------------


def test_no_half_line_is_left_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    model = torch.nn.Linear(2, 2)
    folder.keep({"epoch": 1}, model)
    before = content(folder.path)
    opened = Path.open

    def full(self: Path, *how: object, **more: object) -> object:
        if self.name == "metrics.jsonl":
            with opened(self, "a") as file:
                file.write('{"epo')
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, *how, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(f3.InputError, match="the disk is full"):
        folder.keep({"epoch": 2}, model)
    monkeypatch.undo()
    assert content(folder.path) == before
    folder.lock.release()


def test_a_test_on_the_training_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for options in (["--train-split", "test", "--test-split", "test"], ["--test-split", "train"]):
        assert run(tmp_path / "run", *options) == 2
        assert "train split" in capsys.readouterr().err


def test_diagnostics_write_what_json_has_no_word_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = f3.Diagnostics.__call__

    def broken(self: f3.Diagnostics, record: dict) -> None:
        call(self, record)
        self.records[-1]["stages"][0]["rank"] = float("nan")

    monkeypatch.setattr(f3.Diagnostics, "__call__", broken)
    assert run(tmp_path / "run", "--diagnose", 8) == 0
    assert json.loads((tmp_path / "run" / "diagnostics.json").read_text())["records"][0]["stages"][0]["rank"] is None
