"""Runs that are killed (SIGKILL) at random moments and at every labelled moment of a commit or a checkpoint, and go on.

A child process is forked from this one, which has imported everything, trains a small network with its errors in a file, and is
killed; the next child resumes; the last one ends. Weights, moments, errors and records must then have the SHA-256 of a run that
was never interrupted, and nothing half-written may be left. Some 40 kills by default, more than 200 more with `-m slow`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import f3triton as f3
from f3triton.base import faults
from f3triton.error_store.disk.file import STORE_LABELS, FileStore
from f3triton.error_store.disk.format import Generation, check_file, rows_file
from f3triton.run import start
from f3triton.run.checkpoint import CHECKPOINT_LABELS, Checkpoints, newest
from f3triton.run.state import Keeper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train as script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

LABELS = (*CHECKPOINT_LABELS, *STORE_LABELS)
Hook = Callable[[str], None] | None


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(60, 8, generator=generator)
    return x, (x @ torch.randn(8, 3, generator=generator)).argmax(-1)


def train(folder: Path, home: str = "file", data: str = "tensors", keep: int = 2, **choices: object) -> None:
    """A run in `folder` that goes on from its newest checkpoint, and leaves `digests.json` at its end."""
    torch.manual_seed(3)
    store = {"error_store": str(folder / "errors")} if home == "file" else {}
    if data == "stream":
        train_set, test_set = f3.stream_dataset("digits", max_train_samples=60, shuffle_buffer=40, statistics_rows=60)
    elif data == "text":
        letters = torch.randint(6, (800,), generator=torch.Generator().manual_seed(5))
        (folder / "text").write_text("".join("abcdef"[i] for i in letters.cummax(0).values - letters))
        train_set, test_set = f3.load_text(folder / "text", context=8, max_train_samples=60)
    else:
        train_set = test_set = f3.Dataset.from_tensors(*problem())
    if data == "text":
        model: f3.Sequential = f3.models.GPT(train_set.outputs, 8, depth=2, heads=2, dim=8, dropout=0.1)
    else:
        model = f3.models.MLP([train_set.in_features, 12, train_set.outputs])
    trainer = f3.Trainer(model, optimizer=f3.Adam(lr=0.01), batch_size=8, device="cpu", seed=2, **store, **choices)
    snapshot = newest(folder / "checkpoints", print)
    if snapshot is None and home == "file":
        shutil.rmtree(folder / "errors", ignore_errors=True)  # it had begun, and got to no checkpoint
    own = {}
    if trainer.windows is None:  # 10 rows carried
        orders = [torch.randperm(60, generator=torch.Generator().manual_seed(e))[:50].split(8) for e in range(8)]
        own = {"batches": lambda epoch: orders[epoch]}
    made = Checkpoints(folder / "checkpoints", 5, keep=keep)
    trainer.fit(train_set, 8, test_set, checkpoints=made, resume=snapshot, **own)
    parts = {"weights": model.state_dict(), "moments": trainer.learner.state(), "errors": {}}
    if home == "file":
        rows = max((folder / "errors").glob("errors-*.f3e")).read_bytes()
        parts["errors"] = {"": torch.frombuffer(bytearray(rows), dtype=torch.uint8)}
    elif trainer.learner.store is not None:
        parts["errors"] = trainer.learner.store.state()
    found = {
        name: hashlib.sha256(
            b"".join(bytes(t.detach().reshape(-1).view(torch.uint8).numpy()) for t in tensors.values())
        ).hexdigest()
        for name, tensors in parts.items()
    }
    found["records"] = [{k: v for k, v in r.items() if k != "learning_seconds"} for r in trainer.result.history]
    found["checkpoints"] = {path.name: sorted(f.name for f in path.iterdir()) for path in (folder / "checkpoints").iterdir()}
    if home == "file":
        found["generations"] = sorted(path.name for path in (folder / "errors").iterdir())
    (folder / "digests.json").write_text(json.dumps(found, sort_keys=True))


def run_script(folder: Path, *arguments: str) -> None:
    """`train.py`, as a job queue would start it again and again."""
    options = ["--max-train-samples", "100", "--max-test-samples", "50", "--hidden", "6", "--epochs", "5", "--quiet"]
    options += ["--checkpoint-every", "3", "--resume", "auto", "--output-dir", str(folder / "run"), *arguments]
    assert script.main([*options, "--error-store", str(folder / "store")]) == 0
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    found = {
        "model": hashlib.sha256((folder / "run" / "model.safetensors").read_bytes()).hexdigest(),
        "records": [{k: v for k, v in r.items() if k != "learning_seconds"} for r in records],
        "summary": [summary[name] for name in ("status", "epochs", "steps", "test_loss", "test_error", "best_test_error")],
        "files": sorted(path.name for path in (folder / "run").iterdir()),
    }
    (folder / "digests.json").write_text(json.dumps(found, sort_keys=True))


def run_by_minutes(folder: Path) -> None:
    """The same with a clock on which each step takes four minutes; time decides nothing else."""
    minutes = itertools.count(0, 4)
    start.Checkpoints = partial(Checkpoints, clock=lambda: 60.0 * next(minutes))
    run_script(folder, "--checkpoint-every", "10min", "--keep", "9")


def child(folder: Path, hook: Hook, after: float | None, work: Callable[..., None] = train, **choices: object) -> bool:
    """Run a child; kill it in `hook`, or after so many seconds. Says whether it was killed; any other end is an error."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            faults.hook = hook
            with (folder / "child.log").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                work(folder, **choices)
            code = 0
        except BaseException as error:  # nothing may get back into pytest
            (folder / "child.log").open("a").write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, (folder / "child.log").read_text()
    return False


def at(label: str, times: int) -> Hook:
    """Kills at the `times`-th moment of that label."""
    seen: Counter[str] = Counter()

    def hook(said: str) -> None:
        seen[said] += 1
        if said == label and seen[said] == times:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def digests(folder: Path) -> dict:
    return json.loads((folder / "digests.json").read_text())


def whole(folder: Path, **choices: object) -> dict:
    folder.mkdir()
    assert not child(folder, None, None, **choices)
    return digests(folder)


def resumed(folder: Path, plan: list[tuple[Hook, float | None]], **choices: object) -> tuple[dict, int]:
    """(digests, kills) of a run that is killed as planned, and then left alone."""
    folder.mkdir()
    kills = sum(child(folder, hook, after, **choices) for hook, after in plan)
    assert not child(folder, None, None, **choices)
    return digests(folder), kills


def test_a_run_that_is_killed_after_a_checkpoint_by_minutes(tmp_path: Path) -> None:
    wanted = whole(tmp_path / "whole", work=run_script)
    found, kills = resumed(tmp_path / "cut", [(at("checkpoint:complete", 1), None)] * 2, work=run_by_minutes)
    assert kills == 2
    assert found == wanted


def test_every_labelled_moment_exists(tmp_path: Path) -> None:
    passed: set[str] = set()
    before = faults.hook
    faults.hook = passed.add
    try:
        train(tmp_path)
    finally:
        faults.hook = before
    assert set(LABELS) == passed


def test_killed_at_every_labelled_moment(tmp_path: Path) -> None:
    """Three kills a run, each at its label's second moment in that process."""
    expected = whole(tmp_path / "whole")
    killed = 0
    for number in range(0, len(LABELS), 3):
        labels = LABELS[number : number + 3]
        found, kills = resumed(tmp_path / str(number), [(at(label, 2), None) for label in labels])
        assert found == expected, labels
        killed += kills
    assert killed == len(LABELS)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")
    began = time.perf_counter()
    whole(tmp_path / "timed")
    draw, seconds = random.Random(4), time.perf_counter() - began
    for number in range(2):
        found, _ = resumed(tmp_path / str(number), [(None, draw.uniform(0, seconds)) for _ in range(3)])
        assert found == expected


def test_the_script_is_killed_and_started_again(tmp_path: Path) -> None:
    """`metrics.jsonl` is cut back to the checkpoint's records; the model and the summary are the uninterrupted run's."""
    expected = whole(tmp_path / "whole", work=run_script)
    moments = [("checkpoint:begin", 1), ("store:begun", 2), ("checkpoint:complete", 2), ("store:manifest-renamed", 1)]
    found, kills = resumed(tmp_path / "killed", [(at(*moment), None) for moment in moments], work=run_script)
    assert kills == len(moments)
    assert found == expected


CHOICES = [
    {},
    {"error_dtype": "int8", "keep": 1},
    {"home": "memory", "keep": 3},
    {"home": "memory", "window": 20, "visits": 2},
    {"window": 20, "visits": 2, "first_visit": "stale"},
    {"signal": "delayed-loss", "precision": "bfloat16-weights"},
    {"home": "memory", "data": "stream", "window": 20, "visits": 2, "first_visit": "target"},
    {"home": "memory", "method": "bp"},
    {"data": "text"},
    {"data": "text", "window": 20, "visits": 2, "first_visit": "stale", "error_dtype": "top-2"},
    {"data": "text", "home": "memory", "window": 20, "visits": 2, "error_rank": 2},
    {"data": "text", "home": "memory", "method": "local"},
]


@pytest.mark.slow
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_killed_many_times(choices: dict, tmp_path: Path) -> None:
    """At least 30 kills for each choice, 360 in all."""
    importlib.import_module("torch._dynamo")  # takes seconds, and torch's own optimizers would import it in every child
    began = time.perf_counter()
    expected = whole(tmp_path / "whole", **choices)
    seconds = time.perf_counter() - began
    draw, kills, run = random.Random(7), 0, 0
    labels = CHECKPOINT_LABELS if choices.get("home") == "memory" else LABELS
    while kills < 30:
        plan = [(at(draw.choice(labels), draw.randint(1, 4)), None) for _ in range(5)]
        plan += [(None, draw.uniform(0, seconds)) for _ in range(5)]
        draw.shuffle(plan)
        found, killed = resumed(tmp_path / str(run), plan, **choices)
        assert found == expected, (choices, run)
        kills, run = kills + killed, run + 1


def test_a_damaged_checkpoint_after_a_resumption(tmp_path: Path) -> None:
    """The store still keeps what the checkpoint before needs, though the run has been resumed from a later one since."""
    expected = whole(tmp_path / "whole")
    folder = tmp_path / "killed"
    folder.mkdir()
    assert child(folder, at("checkpoint:removed", 5), None)  # checkpoints of steps 20 (epoch 2), 25 (epoch 3)
    assert child(folder, at("checkpoint:begin", 1), None)  # went on from 25, and ended epoch 3 before the next one
    there = sorted((folder / "checkpoints").iterdir())
    (there[-1] / "state.json").write_text("{}")
    assert not child(folder, None, None)
    assert "taking the one before" in (folder / "child.log").read_text()
    assert digests(folder) == expected


# --- the harness itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["errors", "moments", "step", "place"])
def test_the_harness_notices_a_broken_resumption(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a part of the run deliberately not restored, what comes out is another run: the comparison can fail."""
    expected = whole(tmp_path / "whole", home="memory")
    original = Keeper.restore

    def restore(self: Keeper, snapshot: object) -> None:
        original(self, snapshot)
        learner, tally = self.parts["moments"].learners[0], self.parts["tally"]
        if broken == "errors":
            learner.store.encoded.zero_()
        elif broken == "moments":
            next(iter(learner.updater.states.values())).moments[0].zero_()
        elif broken == "step":
            learner.updater.step.add_(1)
        else:
            tally.batches -= 1  # a batch is learnt from twice

    monkeypatch.setattr(Keeper, "restore", restore)
    found, kills = resumed(tmp_path / "killed", [(at("checkpoint:complete", 2), None)], home="memory")
    assert kills == 1
    assert found != expected


def test_the_harness_notices_rows_that_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint within an epoch, without the rows that the epoch has written so far."""
    expected = whole(tmp_path / "whole")

    def state(self: FileStore) -> dict[str, torch.Tensor]:
        nothing = torch.empty(0, self.codec.columns, dtype=self.codec.storage)
        return {"rows": nothing, "visited": torch.zeros(self.samples, dtype=torch.bool)}

    monkeypatch.setattr(FileStore, "state", state)
    found, kills = resumed(tmp_path / "killed", [(at("checkpoint:complete", 2), None)])
    assert kills == 1
    assert found != expected


def test_the_harness_notices_a_manifest_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit of the store that names the generation first, and then carries the rows which had no visit."""
    original = FileStore.commit

    def commit(self: FileStore) -> int:
        self._drain()
        self._written()
        name, carried = rows_file(self.epoch), int((~self.visited).sum())
        early = check_file(self.folder / name, self.kind, self.epoch)
        generation = Generation(self.epoch, name, self.kind.file_bytes, early, carried)
        self._write_manifest({**self.manifest.generations, self.epoch: generation})
        self._write_manifest = lambda generations: None
        try:
            return original(self)
        finally:
            del self._write_manifest

    monkeypatch.setattr(FileStore, "commit", commit)
    with pytest.raises(AssertionError, match="is damaged: its checksum"):
        resumed(tmp_path / "killed", [(at("checkpoint:complete", 3), None)])


def test_the_harness_notices_generations_that_are_dropped_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that keeps what the next epoch reads, and not what a checkpoint would."""
    monkeypatch.setattr(Keeper, "release", lambda self: self.store and self.store.release(self.store.epoch))
    with pytest.raises(AssertionError, match="cannot go to epoch 1; it keeps the rows of epochs: 1"):
        resumed(tmp_path / "killed", [(at("store:released", 1), None)])
