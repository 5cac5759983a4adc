"""Runs whose steps are few launches: equal to those step by step, cut wherever something is asked for, the same bits again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

import f3triton as f3
from f3triton.kernels import selfcheck
from f3triton.kernels.gpu import steps
from f3triton.learn import epoch
from f3triton.run.checkpoint import Checkpoints, newest
from f3triton.run.tally import Diverged

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else pytest.mark.gpu


class Killed(BaseException):
    """As sudden as SIGKILL, as far as the library is concerned."""


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Three steps a launch at most; the list has those of each, but for a check of the device before the first."""
    launches, original, check = [], steps.network_steps_, selfcheck.network_fault

    def count(x: torch.Tensor, *others: object, **named: object) -> torch.Tensor:
        launches.append(len(x))
        return original(x, *others, **named)

    monkeypatch.setattr(steps, "network_steps_", count)
    monkeypatch.setattr(selfcheck, "network_fault", lambda *about: (check(*about), launches.clear())[0])
    monkeypatch.setattr(epoch, "BYTES", 3 * 4 * 10 * (9 + 12 + 7 + 5 * 4))
    return launches


def train(launch: str, folder: Path | None = None, until: int | None = None, **settings: object) -> f3.Trainer:
    """Three epochs of 45 samples; killed after so many steps, where that is said."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(45, 9, generator=generator)
    y = (x @ torch.randn(9, 4, generator=generator)).argmax(-1)
    torch.manual_seed(1)
    settings = {"batch_size": 10, "optimizer": f3.Adam(lr=0.01), **settings}
    model = f3.models.MLP([9, 12, 7, 4])
    trainer = f3.Trainer(model, device=DEVICE, backend="triton", epoch_launch=launch, **settings)
    done = 0

    def step(samples: int) -> None:
        nonlocal done
        done += 1
        if done == until:
            raise Killed

    made = {} if folder is None else {"checkpoints": Checkpoints(folder, 4), "resume": newest(folder, pytest.fail)}
    with contextlib.suppress(Killed):
        trainer.fit((x, y), 3, (x, y), on_step=step, **made)
    return trainer


def figures(trainer: f3.Trainer) -> list[dict]:
    return [{name: value for name, value in r.items() if name != "learning_seconds"} for r in trainer.result.history]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "drtp", "optimizer": f3.SGD(lr=0.01, momentum=0.9), "lr_schedule": "constant"},
        {"loss": "cross-entropy", "mask_target": True, "error_dtype": "int8", "optimizer": f3.AdamW(lr=0.01)},
        {"error_rank": 2, "hidden_scale": "mean"},
    ],
    ids=str,
)
def test_equals_the_run_step_by_step(settings: dict, few_at_once: list[int]) -> None:
    ours, theirs = train("on", **settings), train("off", **settings)
    assert few_at_once == [3, 1] * 3  # and a short batch, which is a step of its own
    assert str(ours.choice).endswith("hundreds of steps in one launch")
    for got, wanted in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    for one, other in zip(figures(ours), figures(theirs), strict=True):
        assert {name: one[name] for name in ("epoch", "step", "lr")} == {name: other[name] for name in ("epoch", "step", "lr")}
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, few_at_once: list[int]) -> None:
    whole = train("on")
    few_at_once.clear()
    train("on", tmp_path, until=7)  # after the checkpoint of step 4, in the second epoch
    assert few_at_once == [3, 1, 3]
    resumed = train("on", tmp_path)
    assert resumed.result.status == "completed"
    assert figures(resumed) == figures(whole)
    states = [{**t.model.state_dict(), **t.learner.state(), **t.learner.store.state()} for t in (resumed, whole)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_a_loss_that_is_not_finite_is_told_by_its_step() -> None:
    with pytest.raises(Diverged, match="at step 2;"):
        train("on", optimizer=f3.SGD(lr=1e30), loss="mse")


def test_a_wait_in_vain_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = steps._sent
    monkeypatch.setattr(steps, "PATIENCE", 5)
    monkeypatch.setattr(steps, "_sent", lambda values, device: sent([*values[:-2], values[-2] + 1, values[-1]], device))
    monkeypatch.setattr(selfcheck, "network_fault", lambda *about: (None, None))
    with pytest.raises(f3.InputError, match="waited in vain for each other; use --epoch-launch off"):
        train("on")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"method": "dfa"}, "must be known before a step"),
        ({"signal": "delayed-loss"}, "must be known before a step"),
        ({"method": "bp"}, "must be known before a step"),
        ({"batch_size": 70}, "batches of 70 are more than the 64"),
        ({"moments": "int8"}, "moments float32 are needed"),
        ({"window": 20, "visits": 3}, "every sample must be visited once an epoch"),
        ({"sampling": "error"}, "every sample must be visited once an epoch"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(settings: dict, why: str) -> None:
    with pytest.raises(f3.InputError, match=f"epoch launch 'on' cannot be: .*{why}.*; use 'auto'"):
        train("on", **settings)


def test_what_is_wrong_on_the_device_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "network_fault", lambda *about: (None, "gives a wrong weight 0"))
    with pytest.warns(UserWarning, match="many steps gives a wrong weight 0 on this device"), pytest.raises(f3.InputError):
        train("on")
