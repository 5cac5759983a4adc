"""A resumed run is the uninterrupted one, bit for bit; a damaged checkpoint is named; another run's is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import f3triton as f3
from f3triton.error_store.disk.file import FileStore
from f3triton.run import checkpoint
from f3triton.run.checkpoint import Checkpoints, newest, parse_every, read
from f3triton.run.state import fill


class Killed(BaseException):
    """As sudden as SIGKILL, as far as the library is concerned."""


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(60, 16, generator=generator)
    return x, (x @ torch.randn(16, 3, generator=generator)).argmax(-1)


def text() -> tuple[f3.Dataset, f3.Dataset]:
    """Sixty windows of this file."""
    return f3.load_text(__file__, tokenizer="bytes", context=4, max_train_samples=60, max_test_samples=4)


def make(**choices: object) -> f3.Trainer:
    torch.manual_seed(3)
    kind = choices.pop("kind", "mlp")
    if kind == "vit":
        model = f3.models.ViT(4, 1, 3, 2, depth=2, heads=2, dim=8, mlp_width=8, dropout=0.2)
    elif kind == "gpt":
        model = f3.models.GPT(256, 4, depth=1, heads=2, dim=8, mlp_width=8, dropout=0.2)
    elif kind == "batchnorm":
        block = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.BatchNorm1d(12), torch.nn.ReLU())
        model = f3.Sequential(f3.Block(block), f3.Linear(12, 3))
    elif kind == "tied":
        block = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16))
        block[2].weight = block[0].weight
        model = f3.Sequential(f3.Block(block), f3.Linear(16, 3))
    elif "feedback" in choices:
        feedback = choices.pop("feedback")
        model = f3.Sequential(f3.Linear(16, 12, "tanh", feedback), f3.Linear(12, 10, "tanh"), f3.Linear(10, 3))
    else:
        model = f3.models.MLP([16, 12, 10, 3])
    return f3.Trainer(model, **{"optimizer": f3.Adam(lr=0.01), "batch_size": 8, "device": "cpu", "seed": 2, **choices})


def digest(trainer: f3.Trainer) -> dict[str, str]:
    """SHA-256 of weights, moments, errors and records."""
    store = trainer.learner.store
    if isinstance(store, FileStore):  # closed by now: its last generation
        last = max(store.folder.glob("errors-*.f3e"))
        errors = {"": torch.frombuffer(bytearray(last.read_bytes()), dtype=torch.uint8)}
    else:
        errors = {} if store is None else store.state()
    parts = {
        "weights": trainer.model.state_dict(),
        "moments": trainer.learner.state(),
        "errors": errors,
    }
    found = {
        name: hashlib.sha256(
            b"".join(bytes(t.detach().reshape(-1).view(torch.uint8).numpy()) for t in tensors.values())
        ).hexdigest()
        for name, tensors in parts.items()
    }
    records = [{key: value for key, value in r.items() if key != "learning_seconds"} for r in trainer.result.history]
    return found | {"records": json.dumps(records)}


def run(folder: Path | None, every: int = 5, until: int | None = None, epochs: int = 3, **choices: object) -> f3.Trainer:
    """A run, killed after so many steps, or whole; it goes on from the newest checkpoint in the folder."""
    trainer = make(**choices)
    left = until

    def kill(samples: int) -> None:
        nonlocal left
        if left is not None:
            left -= 1
            if left == 0:
                raise Killed

    made = None if folder is None else Checkpoints(folder, every)
    snapshot = None if folder is None else newest(folder, lambda line: pytest.fail(line))
    torch.manual_seed(1 if snapshot is None else 99)  # what dropout draws comes from the checkpoint
    with contextlib.suppress(Killed):
        train, test = text() if choices.get("kind") == "gpt" else (problem(), problem())
        trainer.fit(train, epochs, test, checkpoints=made, resume=snapshot, on_step=kill)
    return trainer


CHOICES = [
    {},
    {"method": "drtp", "optimizer": f3.SGD(lr=0.05, momentum=0.9)},
    {"method": "dfa"},
    {"method": "bp"},
    {"sampling": "error"},
    {"method": "bp", "sampling": "error"},
    {"kind": "gpt", "sampling": "error"},
    {"method": "bp", "optimizer": f3.SGD(lr=0.05, momentum=0.9, nesterov=True)},
    {"method": "bp", "optimizer": f3.SGD(lr=0.05)},
    {"method": "fa"},
    {"method": "last-layer"},
    {"kind": "tied"},
    {"error_dtype": "int8"},
    {"error_dtype": "ternary", "signal": "delayed-loss"},
    {"error_dtype": "top-2", "loss": "cross-entropy"},
    {"window": 20, "visits": 3},
    {"window": 20, "visits": 3, "first_visit": "target", "error_dtype": "float16"},
    {"window": 20, "visits": 3, "first_visit": "stale"},
    {"precision": "bfloat16-weights"},
    {"precision": "bfloat16-weights", "moments": "int8"},
    {"moments": "bfloat16", "optimizer": f3.SGD(lr=0.05, momentum=0.9)},
    {"kind": "vit", "moments": "int8", "loss": "cross-entropy"},
    {"precision": "bfloat16"},
    {"precision": "float64"},
    {"kind": "vit", "loss": "cross-entropy"},
    {"kind": "vit", "method": "bp"},
    {"kind": "batchnorm", "method": "dfa"},
    {"lr_schedule": "linear", "warmup_steps": 7},
    {"error_rank": 2},
    {"kind": "gpt", "error_dtype": "sampled-4"},
    {"kind": "gpt", "error_rank": 5, "window": 20, "visits": 3},
]


@pytest.mark.parametrize("choices", CHOICES, ids=lambda c: ",".join(str(v) for v in c.values()) or "default")
@pytest.mark.parametrize("home", ["memory", "file"])
def test_a_resumed_run_is_the_uninterrupted_one(choices: dict, home: str, tmp_path: Path) -> None:
    delayed = choices.get("method", "f3") == "f3"
    if home == "file" and (not delayed or (choices.get("window") and choices.get("first_visit") != "stale")):
        pytest.skip("has no store of its own on disk")
    stored = {"error_store": str(tmp_path / "whole")} if home == "file" else {}
    whole = digest(run(None, **choices, **stored))
    stored = {"error_store": str(tmp_path / "errors")} if home == "file" else {}
    for until in (6, 9, 1, 7):  # the first kill is in epoch 0, then on from steps 5, 10, 10, 15
        run(tmp_path / "checkpoints", until=until, **choices, **stored)
    resumed = run(tmp_path / "checkpoints", **choices, **stored)
    assert resumed.result.status == "completed"
    assert digest(resumed) == whole


def test_checkpoints_by_epoch_and_how_many_are_kept(tmp_path: Path) -> None:
    trainer = make()
    trainer.fit(problem(), 5, problem(), checkpoints=Checkpoints(tmp_path, 2, "epochs", keep=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000016", "step-000000000032"]
    other = make()
    other.fit(problem(), 5, problem(), resume=newest(tmp_path, print))
    assert digest(other) == digest(trainer)
    run(tmp_path / "many", every=1)
    assert len(list((tmp_path / "many").iterdir())) == 2


def test_more_epochs_go_on_where_the_learning_rate_is_constant(tmp_path: Path) -> None:
    constant = {"lr_schedule": "constant"}
    run(tmp_path, every=24, epochs=3, **constant)
    assert digest(run(tmp_path, every=24, epochs=5, **constant)) == digest(run(None, epochs=5, **constant))
    run(tmp_path / "cosine", every=24, epochs=3)
    with pytest.raises(f3.InputError, match="epochs was 3 and is 5"):
        run(tmp_path / "cosine", every=24, epochs=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 10}, "batch size was 8 and is 10"),
        ({"seed": 5}, "seed was 2 and is 5"),
        ({"method": "dfa"}, "method was 'f3' and is 'dfa'"),
        ({"optimizer": f3.Adam(lr=0.02)}, "rule was"),
        ({"kind": "vit"}, "network was"),
        ({"error_dtype": "int8"}, "error dtype was 'auto' and is 'int8'"),
        ({"error_rank": 2}, "error rank was None and is 2"),
        ({"window": 20, "visits": 3}, "windows was None and is"),
        ({"feedback": f3.Feedback(scale=2.0)}, r"feedback was \[.*scale=1\.0.*\] and is \[.*scale=2\.0.*\]"),
        ({"feedback": torch.ones(3, 12)}, "feedback was .* and is .*given, "),
    ],
)
def test_another_run_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    run(tmp_path, until=6, **({"feedback": "trinomial"} if "feedback" in change else {}))
    with pytest.raises(f3.InputError, match=message):
        run(tmp_path, **change)


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    run(tmp_path, until=6)
    x, y = problem()
    with pytest.raises(f3.InputError, match="data was"):
        make().fit((x + 1, y), 3, resume=newest(tmp_path, print))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path: Path) -> None:
    run(tmp_path, until=11)
    whole = digest(run(None))
    last = tmp_path / "step-000000000010" / "tensors.safetensors"
    content = bytearray(last.read_bytes())
    content[-3] ^= 1
    last.write_bytes(content)
    said = []
    snapshot = newest(tmp_path, said.append)
    assert snapshot.state["steps"] == 5
    assert said == [f"checkpoint {str(last.parent)!r} is damaged: the content of tensors.safetensors is not what was written; "
                    "taking the one before"]  # fmt: skip
    trainer = make()
    torch.manual_seed(99)
    trainer.fit(problem(), 3, problem(), resume=snapshot)
    assert digest(trainer) == whole
    (tmp_path / "step-000000000005" / "state.json").unlink()
    with pytest.raises(f3.InputError, match="is sound; start anew"):
        newest(tmp_path, said.append)
    assert newest(tmp_path / "nothing", said.append) is None


def test_what_a_killed_or_a_damaged_one_leaves_goes_with_the_next(tmp_path: Path) -> None:
    """Half-written checkpoints, and those of later steps than the one that the run went back to."""
    run(tmp_path, until=16)
    half = tmp_path / ".step-000000000020.0123.tmp"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    last = tmp_path / "step-000000000015" / "state.json"
    last.write_text(last.read_text()[:-2])
    warned = []
    trainer = make()
    snapshot = newest(tmp_path, warned.append)
    assert (len(warned), snapshot.state["steps"]) == (1, 10)
    trainer.fit(problem(), 2, checkpoints=Checkpoints(tmp_path, 12, keep=1), resume=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000012"]


def test_ctrl_c_leaves_a_last_checkpoint(tmp_path: Path) -> None:
    whole = digest(run(None, first_visit="target", window=20, visits=3))
    for moment in (4, 9, 1):  # in steps; none is a multiple of `every`
        trainer = make(first_visit="target", window=20, visits=3)
        steps = iter(range(1, 100))

        def press(samples: int, steps: object = steps, moment: int = moment) -> None:
            if next(steps) == moment:
                os.kill(os.getpid(), signal.SIGINT)

        done = 0 if not tmp_path.exists() else sum(1 for _ in tmp_path.iterdir())
        made, snapshot = Checkpoints(tmp_path, 100, keep=9), newest(tmp_path, print)
        result = trainer.fit(problem(), 3, problem(), checkpoints=made, resume=snapshot, on_step=press)
        assert result.status == "interrupted"
        assert len(list(tmp_path.iterdir())) == done + 1
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    steps = sorted(int(path.name[5:]) for path in tmp_path.iterdir())
    assert steps[-1] == result.steps
    assert digest(run(tmp_path, first_visit="target", window=20, visits=3)) == whole


def test_seconds_add_up(tmp_path: Path) -> None:
    def slow(samples: int) -> None:
        if list(tmp_path.iterdir()):
            raise Killed
        time.sleep(0.02)

    with pytest.raises(Killed):
        make().fit(problem(), 1, checkpoints=Checkpoints(tmp_path, 6), on_step=slow)
    assert newest(tmp_path, print).state["learning_seconds"] >= 5 * 0.02
    result = make().fit(problem(), 1, resume=newest(tmp_path, print))
    assert result.learning_seconds >= 5 * 0.02


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run(folder, until=6)
    return folder / "step-000000000005"


def named(folder: Path, name: str, content: Path | None = None) -> None:
    """Have the manifest name one file more, with a hash that is right where it is there."""
    path = folder / name
    if content is not None:
        path.write_bytes(content.read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    told = {"bytes": 0, "sha256": ""}
    if path.is_file() and not path.is_symlink():
        told = {"bytes": path.stat().st_size, "sha256": checkpoint.sha256(path)}
    manifest["files"][name] = told
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: (c / "tensors.safetensors").write_bytes((c / "tensors.safetensors").read_bytes()[:-1]),
        lambda c: (c / "tensors.safetensors").write_bytes((c / "tensors.safetensors").read_bytes() + b"0"),
        lambda c: (c / "tensors.safetensors").unlink(),
        lambda c: ((c / "state.json").rename(c / "other.json"), (c / "state.json").symlink_to(c / "other.json")),
        lambda c: (c / "manifest.json").write_text("[]"),
        lambda c: (c / "manifest.json").write_text('{"format": 1, "files": {"../../etc/passwd": {}, "state.json": {}}}'),
        lambda c: (c / "manifest.json").write_text('{"format": 1, "files": {"tensors.safetensors": 3, "state.json": {}}}'),
        lambda c: (c / "manifest.json").write_text('{"format": 2}'),
        lambda c: named(c, "../state.json"),
        lambda c: named(c, str(c / "state.json")),
        lambda c: named(c, "manifest.json"),
        lambda c: named(c, "tensors-1.safetensors"),  # is not there
        lambda c: named(c, "tensors--1.safetensors", c / "tensors.safetensors"),
        lambda c: named(c, "tensors-1.safetensors.", c / "tensors.safetensors"),
        lambda c: named(c, "tensors-1.safetensors", c / "tensors.safetensors"),  # every tensor is there twice
        lambda c: named(c, "tensors-1.safetensors", c / "state.json"),
        lambda c: (os.mkfifo(c / "tensors-1.safetensors"), named(c, "tensors-1.safetensors")),
        lambda c: ((c / "tensors-1.safetensors").symlink_to(c / "state.json"), named(c, "tensors-1.safetensors")),
        lambda c: (c / "manifest.json").write_text("[" * 100_000),
        lambda c: (c / "manifest.json").write_bytes(b"\xff\xfe"),
        lambda c: os.truncate(c / "manifest.json", 1 << 30),
    ],
)
def test_hostile_checkpoints(damage: object, sound: Path, tmp_path: Path) -> None:
    copy = tmp_path / sound.name
    shutil.copytree(sound, copy)
    damage(copy)
    with pytest.raises(f3.InputError, match="checkpoint") as error:
        read(copy)
    assert "\n" not in str(error.value)


def resealed(folder: Path) -> None:
    """A manifest that agrees with the files, as somebody hostile would write it."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": checkpoint.sha256(folder / name)}
             for name in ("tensors.safetensors", "state.json")}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_sealed_nonsense_is_refused(data: st.DataObject, sound: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Even with matching hashes: a state or tensors that are not those of this run."""
    copy = tmp_path_factory.mktemp("hostile") / sound.name
    shutil.copytree(sound, copy)
    state = json.loads((copy / "state.json").read_text())
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(state)))
        if data.draw(st.booleans()):
            del state[key]
        else:
            kept = state[key]
            state[key] = data.draw(
                st.one_of(st.none(), st.text(max_size=3), st.lists(st.integers(), max_size=2), st.booleans())
            )
            if state[key] == kept:
                return
        if key in ("format", "learning_seconds") or "tally" not in state:  # without a tally: the beginning of an epoch
            return
        (copy / "state.json").write_text(json.dumps(state))
    else:
        size = data.draw(st.sampled_from([8, 16, 100, 5000]))
        (copy / "tensors.safetensors").write_bytes(data.draw(st.binary(min_size=size, max_size=size)))
    resealed(copy)
    with pytest.raises(f3.InputError) as error:
        make().fit(problem(), 3, problem(), resume=read(copy))
    assert "\n" not in str(error.value)


def test_a_full_disk_or_a_read_only_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(f3.InputError, match="cannot write the checkpoint"):
        make().fit(problem(), 1, checkpoints=Checkpoints(tmp_path / "file" / "inside", 5))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(f3.InputError, match="No space left"):
        make().fit(problem(), 1, checkpoints=Checkpoints(tmp_path / "full", 5))
    assert not list((tmp_path / "full").iterdir())


def test_words_for_how_often() -> None:
    assert parse_every("500") == parse_every("500 steps") == (500, "steps")
    assert parse_every("2e") == parse_every("2 epochs") == (2, "epochs")
    assert parse_every("10min") == parse_every("10 minutes") == (10, "minutes")
    assert parse_every("never") is None
    for text in ("0", "-3", "often", "", "2.5", "1e3"):
        with pytest.raises(f3.InputError, match="is not understood"):
            parse_every(text)
    with pytest.raises(f3.InputError, match="keep must be a whole number"):
        Checkpoints(Path("x"), 5, keep=0)


def test_a_resumed_stream_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def fit(folder: Path | None, until: int | None = None) -> f3.Trainer:
        train, test = f3.stream_dataset("digits", shuffle_buffer=200, max_train_samples=500)
        torch.manual_seed(3)
        trainer = f3.Trainer(f3.models.MLP([64, 16, 10]), device="cpu", seed=2, window=40, visits=2, batch_size=20)
        steps = iter(range(10**6))

        def kill(samples: int) -> None:
            if until is not None and next(steps) == until:
                raise Killed

        made = None if folder is None else Checkpoints(folder, 7)
        snapshot = None if folder is None else newest(folder, print)
        with contextlib.suppress(Killed):
            trainer.fit(train, 4, test, checkpoints=made, resume=snapshot, on_step=kill)
        return trainer

    whole = digest(fit(None))
    for until in (12, 3, 20, 31):
        fit(tmp_path, until)
    assert digest(fit(tmp_path)) == whole
    train, test = f3.stream_dataset("digits", shuffle_buffer=80, max_train_samples=500)
    trainer = f3.Trainer(f3.models.MLP([64, 16, 10]), device="cpu", seed=2, window=40, visits=2, batch_size=20)
    with pytest.raises(f3.InputError, match=r"data was .*'shuffle_buffer': 200"):
        trainer.fit(train, 4, test, resume=newest(tmp_path, print))


def test_a_step_count_of_older_versions_is_read() -> None:
    """It was a float32."""
    step = torch.zeros((), dtype=torch.int64)
    fill({"": step}, {"": torch.tensor(12345.0)}, "moments")
    assert int(step) == 12345
    with pytest.raises(f3.InputError, match="moments of the checkpoint do not fit: "):
        fill({"": step}, {"": torch.zeros(2)}, "moments")


def with_feedback(*laws: f3.Feedback) -> f3.Trainer:
    torch.manual_seed(0)
    model = f3.models.MLP([6, 5, 5, 5, 3], feedback=laws)
    return f3.Trainer(model, device="cpu", lr_schedule="constant", batch_size=8)


def test_feedback_of_other_stages_is_refused(tmp_path: Path) -> None:
    """Which stage has which law, and how often; a checkpoint of older versions names a law once that all stages have."""
    one, three = f3.Feedback("trinomial"), f3.Feedback("trinomial", scale=3.0)
    x, y = torch.randn(24, 6), torch.arange(24) % 3
    with_feedback(one, one, three).fit((x, y), 1, checkpoints=Checkpoints(tmp_path / "two", 1))
    snapshot = newest(tmp_path / "two", print)
    with pytest.raises(f3.InputError, match="cannot resume from a checkpoint of another run: feedback was"):
        with_feedback(one, three, three).fit((x, y), 2, resume=snapshot)
    with_feedback(one, one, three).fit((x, y), 2, resume=snapshot)
    with_feedback(one, one, one).fit((x, y), 1, checkpoints=Checkpoints(tmp_path / "one", 1))
    older = newest(tmp_path / "one", print)
    older.state["settings"]["feedback"] = older.state["settings"]["feedback"][:1]
    with_feedback(one, one, one).fit((x, y), 2, resume=older)
    with pytest.raises(f3.InputError, match="feedback was"):
        with_feedback(one, one, three).fit((x, y), 2, resume=older)


def test_other_data_are_noticed_to_the_last_row(tmp_path: Path) -> None:
    x, y = torch.randn(500, 4, generator=torch.Generator().manual_seed(5)), torch.arange(500) % 3

    def fit(data: tuple[torch.Tensor, torch.Tensor], epochs: int, content: bool = True) -> None:
        snapshot = newest(tmp_path, print)
        if snapshot is not None and not content:  # as it was written once
            del snapshot.state["settings"]["data"]["content"]
        trainer = f3.Trainer(f3.models.MLP([4, 5, 3], seed=1), device="cpu", lr_schedule="constant")
        trainer.fit(data, epochs, checkpoints=Checkpoints(tmp_path, 1, "epochs"), resume=snapshot)

    fit((x, y), 1)
    other = x.clone()
    other[1, 0] += 1  # none of the 64 rows that are looked at first
    with pytest.raises(f3.InputError, match="'content'"):
        fit((other, y), 2)
    fit((x, y), 2)
    fit((x, y), 3, content=False)
