"""Settings: one frozen object that the trainer, its checkpoints and the command line share."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

import f3triton as f3
from f3triton.distributed.mesh import Place
from f3triton.run.identity import settings_of

FIELDS = dataclasses.fields(f3.Settings)
# Another value for every setting, and what it needs beside it. Those of a GPU have no other one here.
OTHERS = {
    "method": {"method": "dfa"},
    "signal": {"signal": "delayed-loss"},
    "link": {"link": "softmax"},
    "mask_target": {"mask_target": True},
    "error_rank": {"error_rank": 2},
    "hidden_scale": {"hidden_scale": "mean"},
    "local_head": {"local_head": "own", "method": "local"},
    "local_head_depth": {"local_head_depth": 1, "method": "local"},
    "local_feedback": {"local_feedback": "random", "method": "local"},
    "reach": {"reach": 2, "method": "local"},
    "local_positions": {"local_positions": 0.5, "method": "local"},
    "local_candidates": {"local_candidates": 4, "method": "local"},
    "augment": {"augment": "shift"},
    "loss": {"loss": "cross-entropy"},
    "optimizer": {"optimizer": "adamw"},
    "lr": {"lr": 0.5},
    "momentum": {"momentum": 0.5, "optimizer": "sgd"},
    "nesterov": {"nesterov": True, "momentum": 0.5, "optimizer": "sgd"},
    "weight_decay": {"weight_decay": 0.5},
    "moments": {"moments": "int8"},
    "clip_norm": {"clip_norm": 0.5},
    "lr_schedule": {"lr_schedule": "linear"},
    "warmup_steps": {"warmup_steps": 3},
    "batch_size": {"batch_size": 7},
    "eval_batch_size": {"eval_batch_size": 7},
    "error_store": {"error_store": "memory"},
    "error_dtype": {"error_dtype": "int8"},
    "window": {"window": 100},
    "visits": {"visits": 3, "window": 100},
    "first_visit": {"first_visit": "target", "window": 100},
    "window_order": {"window_order": "turns", "window": 100},
    "patience": {"patience": 3},
    "sampling": {"sampling": "error"},
    "seed": {"seed": 7},
    "device": {"device": "cpu"},
    "backend": {"backend": "torch"},
    "cuda_graph": {"cuda_graph": "off"},
    "epoch_launch": {"epoch_launch": "off"},
    "precision": {"precision": "float64"},
    "pipeline": {"pipeline": "threads:2"},
    "pipeline_split": {"pipeline_split": "1,1", "pipeline": "threads:2"},
    "pipeline_link": {"pipeline_link": "nccl", "pipeline": 2},
    "data_parallel": {"data_parallel": 2},
    "data_parallel_by": {"data_parallel_by": "factors", "data_parallel": 2},
}


def trainer(*arguments: object, **keywords: object) -> f3.Trainer:
    return f3.Trainer(f3.models.MLP([6, 5, 3]), *arguments, **keywords)


@pytest.mark.parametrize("name", [field.name for field in FIELDS])
def test_a_setting_is_a_keyword_and_decides_whether_a_run_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("f3triton.run.trainer.join", lambda *_: Place())  # whatever processes there are
    other = OTHERS[name]
    without = {key: value for key, value in other.items() if key != name}
    changed, plain = trainer(**other), trainer(**without)
    assert changed.settings == f3.Settings(**other) != plain.settings
    fixed = [settings_of(made, {}, 3, 1) for made in (changed, plain)]
    free = {"eval_batch_size", "error_store", "device", "backend", "cuda_graph", "epoch_launch", "patience"}
    free |= {"pipeline", "pipeline_split", "pipeline_link", "data_parallel", "data_parallel_by"}
    assert (fixed[0] == fixed[1]) == (name in free)


def test_what_a_checkpoint_says_of_settings_is_what_it_said_before_there_were_any() -> None:
    made = trainer("bce", f3.SGD(lr=0.1), link="softmax", window=100, visits=3, lr_schedule="constant")
    found = settings_of(made, {"name": "digits"}, 3, 1)
    assert found.pop("network").startswith("MLP(")
    assert found.pop("network_config")["sizes"] == [6, 5, 3]
    assert found.pop("feedback") == [str(f3.Feedback("trinomial"))] * 2  # of each stage
    assert found == {
        "method": "f3",
        "signal": {"source": "delayed-error", "link": "softmax", "mask": False},
        "loss": "bce",
        "rule": "SGD(lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0)",
        "hidden_scale": 1.0,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "batch_size": 50,
        "seed": 0,
        "precision": "float32",
        "error_dtype": "auto",
        "error_rank": None,
        "windows": {"size": 100, "visits": 3, "first_visit": "skip"},
        "eval_every": 1,
        "data": {"name": "digits"},
    }


def test_ways_to_say_the_same() -> None:
    rule = f3.Adam(lr=0.01)
    wanted = f3.Settings(loss="bce", optimizer=rule, method="dfa")
    ways = [
        trainer("bce", rule, method="dfa"),
        trainer(loss="bce", optimizer=rule, method="dfa"),
        trainer(settings=wanted),
        trainer("bce", settings=f3.Settings(optimizer=rule), method="dfa"),
    ]
    assert all(made.settings == wanted for made in ways)
    assert trainer(optimizer="sgd", lr=0.5, momentum=0.5).rule == f3.SGD(lr=0.5, momentum=0.5)
    assert trainer(method="last_layer", lr_schedule="constant").settings == f3.Settings(
        method="last-layer", lr_schedule="constant"
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'"):
        trainer(rate=0.1)


def test_they_do_not_change_and_are_resolved_once() -> None:
    settings = f3.Settings(device="cpu", window="auto", batch_size=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 3
    assert settings.windows.size == 70
    assert settings.windows is settings.windows
    assert settings.rule is settings.rule
    assert (settings.resolved_device, settings.types.products) == (torch.device("cpu"), None)
    assert dataclasses.replace(settings, method="bp", window="off").resolved_signal is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": f3.Adam(), "lr": 0.1}, r"lr 0.1 has no effect with the optimizer Adam\(lr=0.001"),
        ({"optimizer": f3.SGD(), "nesterov": True}, "nesterov True has no effect with the optimizer SGD"),
        ({"optimizer": torch.optim.Adam}, "is unknown; allowed: sgd, adam, adamw"),
        ({"method": "dfa", "error_dtype": "int8"}, "error dtype 'int8' has no effect where no error is kept"),
        ({"method": "bp", "error_rank": 2}, "error rank 2 has no effect with the method 'bp'"),
        ({"sampling": "error", "window": 100}, "sampling 'error' does not go with windows"),
        ({"sampling": "error", "data_parallel": 2}, "sampling 'error' does not go with data parallel"),
        ({"clip_norm": 0.0}, "clip norm must be a finite number above 0, got 0.0"),
        ({"clip_norm": 1.0, "data_parallel": 2}, "clip norm 1.0 with data parallel needs whole errors"),
        ({"visits": 3}, "visits 3 has no effect without windows"),
        ({"window": 100, "first_visit": "never"}, "first visit 'never' is unknown; allowed: skip, target, stale"),
    ],
)
def test_what_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(f3.InputError, match=message):
        f3.Settings(**settings)


def test_signature_and_help_of_the_trainer_show_every_setting() -> None:
    parameters = inspect.signature(f3.Trainer).parameters
    assert list(parameters)[:4] == ["model", "loss", "optimizer", "settings"]
    assert {field.name for field in FIELDS} <= set(parameters)
    assert parameters["batch_size"].default == 50
    for field in FIELDS:
        assert f"- `{field.name}`: {field.metadata['help']}" in f3.Trainer.__doc__


@pytest.mark.parametrize(("method", "rate"), [("f3", 3e-3), ("local", 1e-3), ("dfa", 1e-3), ("bp", 1e-3), ("drtp", 5e-4)])
def test_default_learning_rates_are_those_of_the_method(method: str, rate: float) -> None:
    assert f3.Settings(method=method).rule == f3.Adam(lr=rate)
    assert f3.Settings(method=method, optimizer="adamw").rule.lr == rate
    assert f3.Settings(method=method, optimizer="sgd").rule.lr == 1e-2
    assert f3.Settings(method=method, lr=0.5).rule.lr == 0.5
