"""Runs that are killed (SIGKILL) at random moments and at every labelled moment of a commit or a checkpoint, and go on.

A child process is forked from this one, which has imported everything, trains a small network with its errors in a file, and is
killed; the next child resumes; the last one ends. Weights, moments, errors and records must then have the SHA-256 of a run that
was never interrupted. 15 kills by default, at least 200 with `-m slow`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import f3triton as f3
from f3triton.checkpoint import Checkpoints, moment_tensors, newest
from f3triton.errors import faults
from f3triton.resume import RunState

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

LABELS = [
    "checkpoint:folder", "checkpoint:tensors", "checkpoint:state", "checkpoint:synced", "checkpoint:manifest",
    "checkpoint:renamed", "checkpoint:complete", "checkpoint:removing", "checkpoint:removed", "store:begin", "store:begun",
    "store:wrote", "store:commit", "store:carried", "store:data-synced", "store:committed", "store:release", "store:released",
]  # fmt: skip


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(60, 8, generator=generator)
    return x, (x @ torch.randn(8, 3, generator=generator)).argmax(-1)


def train(folder: Path, home: str = "file", **choices: object) -> None:
    """A run in `folder` that goes on from its newest checkpoint, and leaves `digests.json` at its end."""
    torch.manual_seed(3)
    store = {"error_store": str(folder / "errors")} if home == "file" else {}
    model = f3.models.MLP([8, 12, 3])
    trainer = f3.Trainer(model, optimizer=f3.Adam(lr=0.01), batch_size=8, device="cpu", seed=2, **store, **choices)
    snapshot = newest(folder / "checkpoints", print)
    if snapshot is None and home == "file":
        shutil.rmtree(folder / "errors", ignore_errors=True)  # it had begun, and got to no checkpoint
    batches = [
        torch.randperm(60, generator=torch.Generator().manual_seed(e))[:50].split(8) for e in range(8)
    ]  # 10 rows carried
    own = {} if "window" in choices else {"batches": lambda epoch: batches[epoch]}
    trainer.fit(problem(), 8, problem(), checkpoints=Checkpoints(folder / "checkpoints", 5), resume=snapshot, **own)
    parts = {"weights": model.state_dict(), "moments": moment_tensors(trainer.learner, model)}
    if home == "file":
        rows = max((folder / "errors").glob("errors-*.f3e")).read_bytes()
        parts["errors"] = {"": torch.frombuffer(bytearray(rows), dtype=torch.uint8)}
    else:
        parts["errors"] = trainer.learner.store.state()
    found = {name: hashlib.sha256(b"".join(bytes(t.detach().reshape(-1).view(torch.uint8).numpy()) for t in tensors.values()))
             .hexdigest() for name, tensors in parts.items()}  # fmt: skip
    found["records"] = [{k: v for k, v in r.items() if k != "learning_seconds"} for r in trainer.result.history]
    (folder / "digests.json").write_text(json.dumps(found))


def child(folder: Path, hook: Callable[[str], None] | None, after: float | None, **choices: object) -> bool:
    """Run a child; kill it in `hook`, or after so many seconds. Says whether it was killed; any other end is an error."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            faults.hook = hook
            with contextlib.redirect_stdout((folder / "child.log").open("a")):
                train(folder, **choices)
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


def at(label: str, times: int) -> Callable[[str], None]:
    """Kills at the `times`-th moment of that label."""
    seen: Counter[str] = Counter()

    def hook(said: str) -> None:
        seen[said] += 1
        if said == label and seen[said] == times:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def whole(folder: Path, **choices: object) -> dict:
    folder.mkdir()
    assert not child(folder, None, None, **choices)
    return json.loads((folder / "digests.json").read_text())


def resumed(folder: Path, plan: list[tuple[Callable[[str], None] | None, float | None]], **choices: object) -> tuple[dict, int]:
    """(digests, kills) of a run that is killed as planned, and then left alone."""
    folder.mkdir()
    kills = sum(child(folder, hook, after, **choices) for hook, after in plan)
    assert not child(folder, None, None, **choices)
    return json.loads((folder / "digests.json").read_text()), kills


def test_every_labelled_moment_exists(tmp_path: Path) -> None:
    """The labels of this file are those that a run passes."""
    passed: set[str] = set()
    before = faults.hook
    faults.hook = passed.add
    try:
        train(tmp_path)
    finally:
        faults.hook = before
    assert set(LABELS) <= passed


def test_killed_at_labelled_moments(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")
    for number in range(0, len(LABELS), 3):  # three kills a run, each further on than the one before, or at its second moment
        labels = LABELS[number : number + 3]
        found, kills = resumed(tmp_path / str(number), [(at(label, 2), None) for label in labels])
        assert kills >= 2, labels
        assert found == expected, labels


def test_killed_at_random_moments(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")
    began = time.perf_counter()
    whole(tmp_path / "timed")
    draw, seconds = random.Random(4), time.perf_counter() - began
    for number in range(2):
        found, _ = resumed(tmp_path / str(number), [(None, draw.uniform(0, seconds)) for _ in range(3)])
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"error_dtype": "int8"},
        {"home": "memory"},
        {"home": "memory", "window": 20, "visits": 2},
        {"signal": "delayed-loss"},
    ],
    ids=str,
)
def test_killed_many_times(choices: dict, tmp_path: Path) -> None:
    """At least 40 kills for each choice, 200 in all."""
    began = time.perf_counter()
    expected = whole(tmp_path / "whole", **choices)
    seconds = time.perf_counter() - began
    draw, kills, run = random.Random(7), 0, 0
    while kills < 40:
        labels = [label for label in LABELS if choices.get("home") != "memory" or label.startswith("checkpoint")]
        plan = [(at(draw.choice(labels), draw.randint(1, 4)), None) for _ in range(5)]
        plan += [(None, draw.uniform(0, seconds)) for _ in range(5)]
        found, killed = resumed(tmp_path / str(run), plan, **choices)
        assert found == expected, choices
        kills, run = kills + killed, run + 1


@pytest.mark.parametrize("broken", ["errors", "moments", "step"])
def test_the_harness_notices_a_broken_checkpoint(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a part of the run deliberately not restored, what comes out is another run: the comparison can fail."""
    expected = whole(tmp_path / "whole", home="memory")
    original = RunState.restore

    def restore(self: RunState, snapshot: object) -> object:
        result = original(self, snapshot)
        learner = self.trainer.learner
        if broken == "errors":
            learner.store.encoded.zero_()
        elif broken == "moments":
            next(iter(learner.updater._moments.values()))[0].zero_()
        else:
            learner.updater.step.add_(1)
        return result

    monkeypatch.setattr(RunState, "restore", restore)
    found, kills = resumed(tmp_path / "killed", [(at("checkpoint:complete", 2), None)], home="memory")
    assert kills == 1
    assert found != expected
