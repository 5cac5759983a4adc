"""Many workers, the bits of one: threads and processes, with random sleeps in every loop, killed and resumed, and what is
refused.

The processes are forked from this one, which has imported everything; torchrun itself is tried in `test_torchrun.py`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations, count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import text
from test_train_script import fails
from torch import nn

import f3triton as f3
from f3triton.base import faults
from f3triton.base.data import Visit
from f3triton.distributed import devices, mesh
from f3triton.distributed.links import Gone, Packet, pack, unpack
from f3triton.distributed.ring import Needs
from f3triton.distributed.split import best_split, milliseconds, parts_of
from f3triton.kernels import eager
from f3triton.learn import step
from f3triton.learn.cuda_graph import GraphedStep
from f3triton.learn.peers import BackpropLearner
from f3triton.learn.signal import Signal
from f3triton.learn.step import F3Learner
from f3triton.network.updater import Arithmetic
from f3triton.run import checkpoint
from f3triton.run.checkpoint import Checkpoints, newest, read
from f3triton.run.tally import Diverged
from f3triton.run.workers import rows_are_alike
from f3triton.visits.windows import WindowOrder, Windows

CPU = torch.device("cpu")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

CHOICES: dict[str, dict[str, object]] = {
    "mlp": {},
    "limited": {"clip_norm": 0.01},
    "loss": {"signal": "delayed-loss", "loss": "cross-entropy", "hidden_scale": "mean", "optimizer": f3.AdamW(lr=0.01)},
    "momentum": {"optimizer": f3.SGD(lr=0.05, momentum=0.9)},
    "drtp": {"method": "drtp"},
    "last-layer": {"method": "last-layer"},
    "local": {"method": "local"},
    "local gpt": {"kind": "gpt", "method": "local", "local_head": "own", "local_head_depth": 1},
    "rank, masked": {"error_rank": 2, "mask_target": True},
    "regression": {"kind": "regression"},
    "windows, skip": {"window": 24, "visits": 2},
    "windows, target": {"window": 24, "visits": 2, "first_visit": "target"},
    "windows, stale": {"window": 24, "visits": 2, "first_visit": "stale"},
    "turns": {"window": 16, "visits": 2, "window_order": "turns"},
    "drawn by error": {"sampling": "error"},
    "local, drawn by error": {"method": "local", "sampling": "error"},
    "int8": {"error_dtype": "int8"},
    "top-2": {"error_dtype": "top-2"},
    "bfloat16 weights": {"precision": "bfloat16-weights"},
    "int8 moments": {"moments": "int8"},
    "vit": {"kind": "vit"},
    "dropout": {"kind": "dropout"},
    "batch norm": {"kind": "batch norm"},
    "gpt": {"kind": "gpt", "error_dtype": "sampled-4", "window": 8, "visits": 2},
    "file": {"error_store": "errors"},
    "stream": {"kind": "stream", "window": 24, "visits": 2},
}


def network(kind: str) -> f3.Sequential:
    torch.manual_seed(3)
    if kind == "vit":
        return f3.models.ViT(4, 1, 4, patch_size=2, depth=2, heads=2, dim=8, mlp_width=12)
    if kind == "gpt":
        return f3.models.GPT(256, 4, 2, 2, 8, dropout=0.1)
    if kind == "stream":
        return f3.models.MLP([64, 12, 12, 12, 10])
    if kind in ("dropout", "batch norm"):
        extra = {"dropout": lambda: nn.Dropout(0.4), "batch norm": lambda: nn.BatchNorm1d(12)}[kind]
        blocks = [f3.Block(nn.Sequential(nn.Linear(n, 12), extra(), nn.Tanh())) for n in (16, 12, 12)]
        return f3.Sequential(*blocks, f3.Linear(12, 4))
    return f3.models.MLP([16, 12, 14, 12, 4], norm="layer" if kind == "local" else "none")


def data(kind: str) -> f3.Dataset:
    generator = torch.Generator().manual_seed(5)
    if kind == "stream":
        return f3.stream_dataset("digits", max_train_samples=70, shuffle_buffer=48, statistics_rows=70)[0]
    if kind == "gpt":
        return text()[0]
    x = torch.randn(70, *((1, 4, 4) if kind == "vit" else (16,)), generator=generator)
    y = x.flatten(1) @ torch.randn(16, 4, generator=generator)
    return f3.Dataset.from_tensors(x, y if kind == "regression" else y.argmax(-1))


def train(folder: Path, pipeline: int | str, kind: str = "mlp", epochs: int = 4, **choices: object) -> dict[str, object]:
    """Digests of a run: its weights, all that is in every checkpoint, and its records."""
    if "error_store" in choices:
        choices["error_store"] = str(folder / "errors")
    train_set = data(kind)
    test_set = None if kind == "stream" else train_set
    settings = {"optimizer": f3.Adam(lr=0.01), "batch_size": 8, "device": "cpu", "seed": 2, **choices}
    model = network("local" if kind == "mlp" and choices.get("method") == "local" else kind)
    trainer = f3.Trainer(model, pipeline=pipeline, **settings)
    snapshot = newest(folder / "checkpoints", print)
    made = Checkpoints(folder / "checkpoints", 5, keep=100) if trainer.seat.writes else None
    result = trainer.fit(train_set, epochs, test_set, checkpoints=made, resume=snapshot, eval_every=2)
    found = {"weights": digest(model.state_dict()), "records": timeless(result.history), "status": result.status}
    if trainer.seat.writes:
        there = {path.name: read(path) for path in sorted((folder / "checkpoints").iterdir())}
        found["checkpoints"] = {name: [digest(one.tensors), state_of(one.state)] for name, one in there.items()}
    return found


def digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def timeless(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "learning_seconds"} for record in history]


def state_of(state: dict) -> dict:
    return {key: value for key, value in state.items() if key != "learning_seconds"} | {"history": timeless(state["history"])}


@contextlib.contextmanager
def sleeping(seed: int, longest: float = 0.004) -> None:
    """Every worker sleeps at random before each of its steps."""
    original, draws = F3Learner.learn, {}

    def learn(self: F3Learner, *arguments: object) -> object:
        who = self.part.start
        time.sleep(draws.setdefault(who, random.Random(f"{seed} {who} {os.getpid()}")).uniform(0, longest))
        return original(self, *arguments)

    F3Learner.learn = learn
    try:
        yield
    finally:
        F3Learner.learn = original


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOICES)
def test_threads_have_the_bits_of_one_worker(name: str, tmp_path: Path) -> None:
    for place in ("one", "several"):
        (tmp_path / place).mkdir()
    one = train(tmp_path / "one", "off", **CHOICES[name])
    workers = {"local": 3, "local gpt": 2}.get(name, 2 + sorted(CHOICES).index(name) % 2)
    with sleeping(len(name)):
        several = train(tmp_path / "several", f"threads:{workers}", **CHOICES[name])
    assert several == one
    assert len(one["checkpoints"]) > 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_no_sleep_changes_a_bit(workers: int, seed: int, tmp_path: Path) -> None:
    names = sorted(name for name in CHOICES if not name.startswith("local"))
    name = names[seed % len(names)]
    for place in ("one", "several"):
        (tmp_path / place).mkdir()
    one = train(tmp_path / "one", "off", **CHOICES[name])
    if len(network(CHOICES[name].get("kind", "mlp"))) < workers:
        pytest.skip("too few stages")
    with sleeping(seed, 0.01):
        assert train(tmp_path / "several", f"threads:{workers}", **CHOICES[name]) == one


def test_the_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the rows that a batch needs, some are older than they should be."""
    one = train(tmp_path / "one", "off")
    monkeypatch.setattr(Needs, "of", lambda self, row, reads, number: 0)
    with sleeping(1, 0.01):
        assert train(tmp_path / "several", "threads:4")["weights"] != one["weights"]


def test_resumed_with_another_number_of_workers(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "off")
    folder = tmp_path / "some"
    for steps, workers in ((7, "threads:3"), (13, "off"), (22, "threads:2"), (10**9, "threads:4")):
        with stopping_at(steps, RuntimeError("enough")), contextlib.suppress(RuntimeError):
            train(folder, workers)
    left = {name.name for name in (folder / "checkpoints").iterdir()}
    assert left == set(whole["checkpoints"])
    assert train(folder, "off")["weights"] == whole["weights"]


@contextlib.contextmanager
def stopping_at(steps: int, what: BaseException | Callable[[], None], part: int = 0) -> None:
    """Raise `what`, or call it, where the worker whose stages begin at `part` begins that step."""
    original = F3Learner.learn

    def learn(self: F3Learner, *arguments: object) -> object:
        if self.updater.number + 1 == steps and self.part.start == part:
            if isinstance(what, BaseException):
                raise what
            what()
        return original(self, *arguments)

    F3Learner.learn = learn
    try:
        yield
    finally:
        F3Learner.learn = original


@pytest.mark.parametrize("place", [0, 1, 3])
def test_what_goes_wrong_at_a_worker_ends_the_run_and_is_told(place: int, tmp_path: Path) -> None:
    before = threading.active_count()
    text = "it broke" if place == 0 else f"worker {place}: ValueError: it broke"
    with stopping_at(12, ValueError("it broke"), place), pytest.raises((ValueError, RuntimeError), match=f"^{text}$"):
        train(tmp_path, "threads:4")
    assert threading.active_count() == before
    with stopping_at(12, f3.InputError("bad"), place), pytest.raises(f3.InputError, match=r"bad$"):
        train(tmp_path, "threads:4")


def test_a_loss_that_is_not_finite_ends_all_workers(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(Diverged, match=r"the loss became (nan|inf) at step"):
        train(tmp_path, "threads:3", kind="regression", optimizer=f3.SGD(lr=1e30))
    assert threading.active_count() == before


def test_interrupted_between_steps(tmp_path: Path) -> None:
    one = train(tmp_path / "one", "off")
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / str(number)
        with stopping_at(12, lambda number=number: signal.raise_signal(number)):
            found = train(folder, "threads:3")
        assert found["status"] == "interrupted"
        assert "step-000000000012" in found["checkpoints"]
        assert found["records"][-1]["step"] == 12
        assert train(folder, "off")["weights"] == one["weights"]


def test_times_are_told() -> None:
    trainer = f3.Trainer(network("mlp"), batch_size=8, device="cpu", pipeline="threads:2", pipeline_split="1,4")
    with pytest.raises(f3.InputError, match="with the sum 4, the network's stages"):
        trainer.fit(data("mlp"), 1)
    trainer = f3.Trainer(network("mlp"), batch_size=8, device="cpu", pipeline="threads:2", pipeline_split=[1, 3])
    result = trainer.fit(data("mlp"), 3)
    assert [one["stages"] for one in result.workers] == [1, 3]
    alone = f3.Trainer(network("mlp"), batch_size=8, device="cpu", pipeline="auto", pipeline_split=[1, 3])
    with pytest.raises(f3.InputError, match=r"split \[1, 3\] is for 2 workers, and there is one; start"):
        alone.fit(data("mlp"), 1)
    assert all(one["busy_ms"] > 0 and one["waiting_ms"] >= 0 for one in result.workers)
    lines = trainer.describe_workers()
    assert lines[0] == "pipeline of 2 threads: 1, 3 stages"
    assert lines[1].startswith("reuse distance: ")


def test_an_order_in_which_a_pipeline_waits_is_warned_of() -> None:
    def lines(**order: str) -> list[str]:
        settings = {"batch_size": 5, "device": "cpu", "pipeline": "threads:3", "pipeline_split": "1,1,2", "window": 20}
        trainer = f3.Trainer(network("mlp"), visits=2, **settings, **order)
        trainer.check(data("mlp"), None, 2)
        return trainer.describe_workers()[1:]

    assert lines()[0].startswith("reuse distance: 1 steps or more, ")
    assert lines()[1] == "warning: in those the pipeline runs empty; take --window-order turns, or fewer workers"
    assert lines(window_order="turns") == [
        "reuse distance: 4 steps or more, 6 mostly; shorter than the pipeline in 0.0% of the steps"
    ]


# --- processes --------------------------------------------------------------------------------------------------------


def together(count: int, work: Callable[[int], object], folder: Path) -> list[int]:
    """Run `work(rank)` in so many forked processes; their exit codes. What each returns is in `RANK.json`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                with (
                    (folder / f"{rank}.log").open("w") as log,
                    contextlib.redirect_stdout(log),
                    contextlib.redirect_stderr(log),
                ):
                    (folder / f"{rank}.json").write_text(json.dumps(work(rank)))
                code = 0
            except BaseException as error:  # nothing may get back into pytest
                (folder / f"{rank}.log").open("a").write(f"{type(error).__name__}: {error}\n")
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def said(folder: Path, count: int) -> str:
    return "".join(f"{rank}: {(folder / f'{rank}.log').read_text()}" for rank in range(count))


BY_DEVICES = ["mlp", "windows, skip", "turns", "bfloat16 weights", "vit"]
IN_PROCESSES = ["mlp", "momentum", "windows, skip", "turns", "top-2", "bfloat16 weights", "vit", "stream", "local"]


@forks
@pytest.mark.parametrize(("workers", "link"), [(2, "host"), (3, "host"), (4, "host"), (2, "nccl"), (3, "nccl")])
def test_processes_have_the_bits_of_one_worker(
    workers: int, link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All choices in one run of the processes, one after the other; of three as if they were on several hosts. Gloo is in the
    place of NCCL."""
    monkeypatch.setattr("f3triton.run.workers.available", lambda: workers != 3)
    monkeypatch.setattr("f3triton.distributed.devices.BACKEND", "gloo")
    names = [name for name in IN_PROCESSES if workers < 4 or name != "local"] if link == "host" else BY_DEVICES
    one, folders = {}, {}
    for name in names:
        folders[name] = tmp_path / name
        folders[name].mkdir()
        one[name] = train(tmp_path / f"{name}, one", "off", **CHOICES[name])

    def work(rank: int) -> object:
        with sleeping(workers, 0.002):
            return {name: train(folders[name], "auto", pipeline_link=link, **CHOICES[name]) for name in names}

    assert together(workers, work, tmp_path) == [0] * workers, said(tmp_path, workers)
    for rank in range(workers):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name in names:
            wanted = json.loads(json.dumps(one[name]))
            assert found[name] == (wanted if rank == 0 else {k: v for k, v in wanted.items() if k != "checkpoints"}), name


@forks
@pytest.mark.parametrize(("workers", "link"), [(2, "host"), (3, "nccl")])
def test_graphs_of_parts_have_the_bits_of_a_graph_of_the_whole(
    workers: int, link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is captured on CUDA runs here as it is: the same tensors, read and written in place, and a short last batch."""
    monkeypatch.setattr("f3triton.distributed.devices.BACKEND", "gloo")
    original, made = f3.Trainer.__init__, []

    def with_graph(self: f3.Trainer, *arguments: object, **given: object) -> None:
        original(self, *arguments, **given)
        self.cuda_graph = "on"

    monkeypatch.setattr(f3.Trainer, "__init__", with_graph)
    monkeypatch.setattr(step, "GraphedStep", lambda *given: made.append(GraphedStep(*given)) or made[-1])
    names = ["mlp", "windows, skip", "turns", "momentum", "drtp", "local"]
    for name in names:
        (tmp_path / name).mkdir()
    one = {name: train(tmp_path / f"{name}, one", "off", **CHOICES[name]) for name in names}

    def work(rank: int) -> object:
        made.clear()
        with sleeping(workers, 0.002):
            found = [train(tmp_path / name, "auto", pipeline_link=link, **CHOICES[name])["weights"] for name in names]
        return [found, [graph.steps for graph in made]]

    assert together(workers, work, tmp_path) == [0] * workers, said(tmp_path, workers)
    for rank in range(workers):
        weights, steps = json.loads((tmp_path / f"{rank}.json").read_text())
        assert weights == [one[name]["weights"] for name in names]
        assert (len(steps), sum(steps)) == (8, 32 * len(names))  # of two kinds with windows; all but the short batches


def test_a_graph_needs_a_worker_of_linear_stages() -> None:
    trainer = f3.Trainer(network("dropout"), device="cpu", pipeline="threads:2", pipeline_split="2,2")
    trainer.cuda_graph = "on"
    with pytest.raises(f3.InputError, match="cuda graph 'on' needs a worker whose stages are all Linear; use 'auto'"):
        trainer.check(data("dropout"), None, 1)


@forks
def test_two_pipelines_by_factors_have_the_bits_of_one_worker(tmp_path: Path) -> None:
    names = ["mlp", "windows, skip", "bfloat16 weights", "local", "limited"]
    one = {name: train(tmp_path / f"{name}, one", "off", batch_size=16, **CHOICES[name]) for name in names}
    for name in names:
        (tmp_path / name).mkdir()
    more = {"data_parallel": 2, "data_parallel_by": "factors", "batch_size": 16}

    def work(rank: int) -> object:
        with sleeping(5, 0.002):
            return {name: train(tmp_path / name, 2, **CHOICES[name], **more) for name in names}

    assert together(4, work, tmp_path) == [0] * 4, said(tmp_path, 4)
    for rank in range(4):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {name: found[name]["weights"] for name in names} == {name: one[name]["weights"] for name in names}
        assert {name: found[name]["records"] for name in names} == {name: one[name]["records"] for name in names}


@forks
def test_replicas_keep_the_same_weights(tmp_path: Path) -> None:
    """Whatever masks are drawn, and where a last batch cannot be divided; readings are of the whole batch."""
    gpt = {"kind": "gpt", "method": "local"}
    choices = {
        "dropout": {"kind": "dropout"},
        "own heads": {**gpt, "local_head": "own", "local_head_depth": 1},
        "shared": {**gpt, "reach": 2, "local_positions": 0.5},
    }

    def work(rank: int) -> object:
        more = {"epochs": 2, "data_parallel": 2, "batch_size": 16}
        return {name: train(tmp_path / name, "off", **more, **choices[name]) for name in choices}

    assert together(2, work, tmp_path) == [0, 0], said(tmp_path, 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert {name: first[name]["weights"] for name in choices} == {name: second[name]["weights"] for name in choices}


@forks
@pytest.mark.parametrize("method", ["f3", "local", "bp"])
def test_replicas_by_gradients_agree_to_rounding(method: str, tmp_path: Path) -> None:
    def run(**more: object) -> dict:
        return train(tmp_path / str(len(more)), "off", method=method, precision="float64", **more)

    one = run()
    by = {} if method == "bp" else {"data_parallel_by": "gradients"}
    assert together(2, lambda rank: run(data_parallel=2, **by), tmp_path) == [0, 0], said(tmp_path, 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["weights"] == second["weights"]
    for mine, its in zip(one["records"], first["records"], strict=True):
        assert its["test_loss"] == pytest.approx(mine["test_loss"], rel=1e-9)


@contextlib.contextmanager
def visiting(steps: int, what: Callable[[], None]) -> None:
    """Call `what` where backpropagation, or F3, begins that step."""

    def wrapped(original: Callable) -> Callable:
        def visit(self: object, *arguments: object) -> object:
            if (self.steps if isinstance(self, BackpropLearner) else self.updater.number) + 1 == steps:
                what()
            return original(self, *arguments)

        return visit

    with pytest.MonkeyPatch.context() as patch:
        for kind in (BackpropLearner, F3Learner):
            patch.setattr(kind, "visit", wrapped(kind.visit))
        yield


@forks
@pytest.mark.parametrize("method", ["f3", "bp"])
def test_a_lost_replica_ends_the_others_in_one_line(method: str, tmp_path: Path) -> None:
    def work(rank: int) -> object:
        with visiting(7, lambda: os.kill(os.getpid(), signal.SIGKILL) if rank else None):
            return train(tmp_path / method, "off", method=method, data_parallel=2)

    assert together(2, work, tmp_path) == [1, -signal.SIGKILL]
    assert (tmp_path / "0.log").read_text().startswith("Gone: another replica is gone (")


@forks
@pytest.mark.parametrize("pipeline", ["off", 2])
def test_replicas_are_interrupted_after_the_same_step(pipeline: int | str, tmp_path: Path) -> None:
    choices = {"data_parallel_by": "factors", "batch_size": 16}
    one = train(tmp_path / "one", "off", batch_size=16)
    count = 2 if pipeline == "off" else 4

    def work(rank: int) -> object:
        asked = (lambda: signal.raise_signal(signal.SIGINT)) if rank == count // 2 else lambda: None
        with stopping_at(12, asked):  # in the second replica
            return train(tmp_path / "two", pipeline, data_parallel=2, **choices)

    assert together(count, work, tmp_path) == [0] * count, said(tmp_path, count)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    assert {each["status"] for each in found} == {"interrupted"}
    assert {each["records"][-1]["step"] for each in found} == {13}
    assert len({each["weights"] for each in found}) == 1
    assert "step-000000000013" in found[0]["checkpoints"]
    assert train(tmp_path / "two", "off", batch_size=16)["weights"] == one["weights"]


def killed(folder: Path, workers: int, victim: int, steps: int, **more: object) -> list[int]:
    """Exit codes of processes of which one is killed where it begins a step."""
    parts = {2: (0, 2), 3: (0, 2, 3), 4: (0, 1, 2, 3)}[workers]
    split = {2: "2,2", 3: "2,1,1", 4: "1,1,1,1"}[workers]

    def work(rank: int) -> object:
        with stopping_at(steps, lambda: os.kill(os.getpid(), signal.SIGKILL), parts[victim]):
            return train(folder, "auto", pipeline_split=split, **more)

    return together(workers, work, folder)


@forks
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize(("one_host", "link"), [(True, "host"), (False, "host"), (True, "nccl")])
def test_a_killed_worker_ends_the_others_and_any_number_go_on(
    victim: int, one_host: bool, link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("f3triton.run.workers.available", lambda: one_host)
    monkeypatch.setattr("f3triton.distributed.devices.BACKEND", "gloo")
    whole = train(tmp_path / "whole", "off")
    folder = tmp_path / "killed"
    folder.mkdir()
    began = time.monotonic()
    codes = killed(folder, 3, victim, 13, pipeline_link=link)
    assert codes[victim] == -signal.SIGKILL
    assert all(code == 1 for rank, code in enumerate(codes) if rank != victim)
    assert time.monotonic() - began < 30
    assert "is gone (" in said(folder, 3)
    found = train(folder, f"threads:{victim + 2}")
    assert found == whole


@forks
def test_each_worker_writes_its_own_part(tmp_path: Path) -> None:
    """Nobody has more than that on the way, and any number of workers goes on from it."""
    whole = train(tmp_path / "whole", "off")
    folder = tmp_path / "two"
    folder.mkdir()
    assert together(2, lambda rank: train(folder, 2, pipeline_split="2,2"), folder) == [0, 0], said(folder, 2)
    step = folder / "checkpoints" / "step-000000000015"
    rest, *parts = (set(load_file(step / f"tensors{which}.safetensors")) for which in ("", "-0", "-1"))
    assert sorted(path.name for path in step.glob("*.safetensors")) == [
        "tensors-0.safetensors",
        "tensors-1.safetensors",
        "tensors.safetensors",
    ]
    assert not any(name.startswith(("network", "moments")) for name in rest)
    assert {name.split(".")[2] for name in parts[0] if name.startswith("network.")} == {"0", "1"}
    assert {name.split(".")[2] for name in parts[1] if name.startswith("network.")} == {"2", "3"}
    assert "moments" in parts[0] - parts[1]
    for workers in (1, 2, 3):
        again = tmp_path / f"by {workers}"
        shutil.copytree(step, again / "checkpoints" / step.name)
        if workers == 1:
            found = train(again, "off")
        else:
            assert together(workers, lambda rank, again=again: train(again, "auto"), again) == [0] * workers
            found = json.loads((again / "0.json").read_text())
        assert found["weights"] == whole["weights"]
        assert {name: found["checkpoints"][name] for name in list(whole["checkpoints"])[3:]} == json.loads(
            json.dumps({name: one for name, one in whole["checkpoints"].items() if name > step.name})
        )


@forks
def test_a_worker_whose_disk_is_full(tmp_path: Path) -> None:
    """One line, of everybody; nothing half-written is left, and a run with room goes on."""
    whole = train(tmp_path / "whole", "off")

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def work(rank: int) -> object:
        with stopping_at(12, lambda: setattr(checkpoint, "save_tensors", full), 2):
            return train(tmp_path, "auto", pipeline_split="2,1,1")

    assert together(3, work, tmp_path) == [1, 1, 1]
    for rank, kind in enumerate(("InputError", "WorkerFailed", "WorkerFailed")):
        text = (tmp_path / f"{rank}.log").read_text()
        assert text.startswith(f"{kind}: worker 1: cannot write the checkpoint '{tmp_path / 'checkpoints'}/.step-")
        assert text.endswith("tensors-1.safetensors': No space left on device\n")
        assert text.count("\n") == 1
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(left) == ["step-000000000005", "step-000000000010"]
    assert train(tmp_path, "threads:2") == whole


@forks
@pytest.mark.parametrize(("rank", "label"), [(1, "tensors"), (0, "begin"), (0, "tensors"), (0, "manifest"), (0, "renamed")])
def test_a_worker_is_killed_while_a_checkpoint_is_written(
    rank: int, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", "off")
    folder = tmp_path / "killed"
    folder.mkdir()
    moments = count(1)

    def kill(said: str) -> None:
        if said == f"checkpoint:{label}" and next(moments) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def work(own: int) -> object:
        faults.hook = kill if own == rank else None
        return train(folder, "auto")

    codes = together(2, work, folder)
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 1)
    assert train(folder, "threads:3") == whole
    assert not list((folder / "checkpoints").glob(".*"))


@forks
@pytest.mark.slow
def test_every_rank_is_killed_at_ten_moments(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "off")
    draw = random.Random(8)
    for workers in (2, 3, 4):
        for victim in range(workers):
            folder = tmp_path / f"{workers} {victim}"
            folder.mkdir()
            for moment in range(10):
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                codes = killed(folder, workers, victim, draw.randint(1, 35))
                assert codes[victim] == -signal.SIGKILL
                again = 1 + moment % 4
                assert train(folder, "off" if again == 1 else f"threads:{again}") == whole


@forks
def test_processes_that_differ_are_refused_before_the_first_step(tmp_path: Path) -> None:
    def work(rank: int) -> object:
        torch.manual_seed(rank)
        model = f3.models.MLP([16, 12, 4])
        with pytest.raises(f3.InputError, match=r"^first weights must be the same in all processes, but it is"):
            f3.Trainer(model, batch_size=8, device="cpu", pipeline="auto").fit(data("mlp"), 1)
        with pytest.raises(f3.InputError, match=r"^pipeline link 'nccl' needs CUDA devices, and process 0 has 'cpu'; use"):
            f3.Trainer(model, device="cpu", pipeline=2, pipeline_link="nccl")
        with pytest.raises(f3.InputError, match=r"^rule must be the same .*lr=0.1.* in process 0 and .*lr=0.2"):
            f3.Trainer(network("mlp"), optimizer="sgd", lr=(rank + 1) / 10, device="cpu", pipeline=2).fit(data("mlp"), 1)
        return None

    assert together(2, work, tmp_path) == [0, 0], said(tmp_path, 2)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_the_split_with_the_smallest_largest_part() -> None:
    assert best_split([1.0, 1, 1, 1], 2) == [2, 2]
    assert best_split([5.0, 1, 1, 1, 1], 2) == [1, 4]
    assert best_split([1.0, 1, 1, 9], 3, last=2) == [1, 1, 2]
    assert best_split([9.0, 1, 1, 9, 9], 2, first=2, last=2) == [3, 2]
    assert best_split([9.0, 1, 1, 1], 3, first=2) == [2, 1, 1]
    assert parts_of([1, 4]) == [range(0, 1), range(1, 5)]
    draw = random.Random(2)
    for _ in range(200):
        costs = [draw.choice([1.0, 2.0, 5.0, 0.5]) for _ in range(draw.randint(2, 7))]
        workers = draw.randint(1, min(4, len(costs)))
        split = best_split(costs, workers)
        assert sum(split) == len(costs)
        assert min(split) >= 1

        def largest(ends: tuple[int, ...], costs: list[float] = costs) -> float:
            return max(sum(costs[a:b]) for a, b in zip((0, *ends), (*ends, len(costs)), strict=True))

        best = min(largest(ends) for ends in combinations(range(1, len(costs)), workers - 1))
        assert largest(tuple(part.stop for part in parts_of(split))[:-1]) == best


def test_measuring_a_network_leaves_it_as_it_was() -> None:
    model = network("dropout")
    model.prepare(data("dropout").inputs[:1], 4, seed=0)
    before, generator = digest(model.state_dict()), torch.get_rng_state()
    found = milliseconds(model, data("dropout").inputs[:8], torch.zeros(8, 4), Signal(), Arithmetic(f3.Adam(), eager, CPU))
    assert len(found) == 4
    assert min(found) > 0
    assert digest(model.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_needs_are_the_last_steps_that_visited_a_sample() -> None:
    needs = Needs(6)
    rows = [torch.tensor(row) for row in ([0, 1], [2, 3], [1, 4], [2, 0], [5, 5])]
    assert [needs.of(row, number != 3, number) for number, row in enumerate(rows, 1)] == [0, 0, 0, 2, 0]


def test_a_packet_is_what_it_was() -> None:
    tensors = {
        "x": torch.randn(3, 5),
        "none": torch.empty(0, 4),
        "half": torch.randn(7).bfloat16(),
        "flag": torch.tensor([True, False]),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "column": torch.randn(4, 4).t(),
    }
    about = {"lr": 0.1 + 0.2, "hidden": True, "words": ["ä"]}
    kind, found, there = unpack(pack(Packet("visit", about, tensors)), CPU)
    assert (kind, found) == ("visit", about)
    assert {name: (t.dtype, t.shape) for name, t in there.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
    assert all(torch.equal(there[name], tensors[name]) for name in tensors)


class Recorded:
    """The host's link and the group between a sender and a receiver of devices, and all that is asked of them, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.heads: list[Packet] = []
        self.on_the_way: list[torch.Tensor] = []
        self.said: list[str] = []
        self.numbers = {"isend": count(), "irecv": count()}
        for name in self.numbers:
            patch.setattr(devices.dist, name, partial(self.ask, name))

    def put(self, packet: Packet) -> None:
        self.said.append(f"head {len(self.heads)}")
        self.heads.append(unpack(pack(packet), CPU))

    def get(self) -> Packet:
        return self.heads.pop(0)

    def ready(self) -> bool:
        return bool(self.heads)

    def ask(self, name: str, whole: torch.Tensor, **where: object) -> SimpleNamespace:
        number = next(self.numbers[name])
        self.said.append(f"{name} {number}")
        if name == "isend":
            self.on_the_way.append(whole)

        def wait() -> None:
            self.said.append(f"{name} {number} done")
            if name == "irecv":
                whole.copy_(self.on_the_way[number])

        return SimpleNamespace(wait=wait)


def test_what_a_link_between_devices_asks_for_and_when(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, links = Recorded(monkeypatch), devices.DeviceLinks(CPU)
    sender = devices.DeviceSender(recorded, links, "worker 1", slots=2)
    x = torch.zeros(3, 5)
    for number in range(4):
        sender.put(Packet("visit", {"lr": 0.5}, {"x": x.fill_(number), "target": torch.tensor([number])}))  # written again
    sender.put(Packet("states", {}, {"w": x}))
    sender.put(Packet("end", {}, {}))
    assert recorded.said == [
        *("head 0", "isend 0", "head 1", "isend 1", "head 2", "isend 2", "isend 0 done", "head 3", "isend 3", "isend 1 done"),
        *("head 4", "head 5", "isend 2 done", "isend 3 done"),  # no memory is freed before it was sent
    ]
    assert all("x" not in head.tensors for head in recorded.heads[:4])
    recorded.said.clear()
    receiver = devices.DeviceReceiver(recorded, links, "worker 0", slots=2)
    for number in range(4):
        kind, about, found = receiver.get()
        assert (kind, about, found.keys()) == ("visit", {"lr": 0.5}, {"x", "target"})
        assert torch.equal(found["x"], torch.full((3, 5), float(number)))
        assert found["target"].tolist() == [number]
        assert receiver.ready()
    assert recorded.said == [  # the next one is on its way while a batch is computed
        *("irecv 0", "irecv 1", "irecv 0 done", "irecv 2", "irecv 1 done", "irecv 3", "irecv 2 done", "irecv 3 done"),
    ]
    assert torch.equal(receiver.get().tensors["w"], x)
    assert receiver.get().kind == "end"
    assert not receiver.ready()


def test_results_are_sent_in_order_and_none_of_a_device_whose_links_were_ended() -> None:
    sent: list[Packet] = []
    links = devices.DeviceLinks(CPU)
    sender = devices.LaterSender(SimpleNamespace(put=sent.append), links)
    a = torch.zeros(2)
    for number in range(9):
        sender.put(Packet("visit", {}, {"a": a.fill_(number)}))
    sender.put(Packet("end", {}, {}))
    assert [float(packet.tensors["a"][0]) for packet in sent[:-1]] == list(range(9))
    later = devices.LaterSender(SimpleNamespace(put=sent.append), links)
    links.abort()
    later.put(Packet("end", {}, {}))
    assert len(sent) == 10

    def broken() -> None:
        raise RuntimeError("CUDA error")

    failing = devices.LaterSender(SimpleNamespace(put=sent.append), devices.DeviceLinks(CPU))
    failing.queue.put((Packet("visit", {}, {}), SimpleNamespace(synchronize=broken)))
    with pytest.raises(RuntimeError, match="CUDA error"):
        failing.put(Packet("end", {}, {}))
    assert sent[10:] == [Packet("error", {"text": "the last worker: CUDA error", "input": False}, {})]

    def gone(packet: Packet) -> None:
        raise Gone("worker 0 is gone (closed)")

    with pytest.raises(Gone, match="worker 0 is gone"):
        devices.LaterSender(SimpleNamespace(put=gone), devices.DeviceLinks(CPU)).put(Packet("end", {}, {}))


def test_what_stands_against_nccl() -> None:
    a, b, c = (["here", name, True] for name in "abc")
    assert devices.fault([[0, 1], [2, 3]], [a, b, a, c]) is None  # replicas have no link between them
    assert devices.fault([[0, 1]], [a, ["there", "a", True]]) is None
    assert devices.fault([[0, 1, 2]], [a, b, a]) == "needs a GPU for each worker, and processes 0 and 2 have the same one"
    assert devices.fault([[0, 1]], [a, ["here", "cpu", True]]) == "needs CUDA devices, and process 1 has 'cpu'"
    assert "needs a torch with NCCL, and that of process 1" in devices.fault([[0, 1]], [a, ["here", "b", False]])


def test_windows_in_turn_do_not_come_back_soon() -> None:
    for samples, size, batch in ((400, 50, 10), (390, 50, 10), (130, 20, 8)):
        windows = Windows(size, 3, order="turns")
        order = WindowOrder(samples, batch, windows, 0)
        visits: list[Visit] = [visit for epoch in range(6) for visit in order.visits(epoch)]
        needs, last = Needs(windows.rows(samples)), {}
        pairs = samples // size // 2 * 2 * size  # samples of the first pass that are in a pair
        for number, visit in enumerate(visits, 1):
            needed = needs.of(visit.row, visit.teach == "signal", number)
            own = [last.get(int(sample), 0) for sample in visit.index]
            if visit.teach == "signal":
                assert needed == max(own)  # a row belongs to one sample at a time
                if number <= pairs * 3 // batch:
                    assert number - needed > size // batch
            last |= dict.fromkeys(visit.index.tolist(), number)
        first = torch.cat([visit.index for visit in visits[: len(visits) // 2]])
        assert torch.equal(first.bincount(minlength=samples), torch.full((samples,), 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline": "threads"}, "pipeline 'threads' is unknown; allowed: off, auto, a number of processes"),
        (
            {"pipeline": 2, "method": "dfa"},
            "pipeline 2 needs stages that do not wait for later ones, and with the method 'dfa'",
        ),
        ({"pipeline": 2, "method": "bp"}, "and with the method 'bp' they do"),
        ({"pipeline": "auto", "method": "fa"}, "and with the method 'fa' they do"),
        ({"pipeline": 2, "method": "sdfa"}, "and with the method 'sdfa' they do"),
        ({"pipeline": 2, "method": "local", "reach": 2}, "reach 2 needs weights or gradients of later stages"),
        ({"pipeline_split": "1,2"}, "pipeline split '1,2' has no effect without a pipeline"),
        ({"pipeline": 2, "pipeline_split": "a"}, "pipeline split 'a' is not understood"),
        ({"pipeline_link": "nccl"}, "pipeline link 'nccl' needs a pipeline of processes, got pipeline 'off'; use 'host'"),
        ({"pipeline_link": "nccl", "pipeline": "threads:2"}, "needs a pipeline of processes, got pipeline 'threads:2'"),
        ({"cuda_graph": "on", "pipeline": "threads:2"}, "cuda graph 'on' does not go with threads or data parallel"),
        ({"pipeline_link": "ib", "pipeline": 2}, "pipeline link 'ib' is unknown; allowed: host, nccl"),
        ({"data_parallel": 3}, "batch size 50 cannot be divided among 3 replicas"),
        (
            {"data_parallel": 2, "method": "dfa"},
            "data parallel is for the methods f3, drtp, local, last-layer and bp, got 'dfa'",
        ),
        ({"data_parallel_by": "factors"}, "data parallel by 'factors' has no effect without data parallel"),
        ({"data_parallel": 2, "error_store": "./e"}, "error store './e' cannot be written by several replicas"),
        ({"window_order": "turns"}, "window order 'turns' has no effect without windows"),
    ],
)
def test_settings_that_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(f3.InputError, match=message):
        f3.Settings(**settings)


def test_what_the_script_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "pipeline 2 needs 2 processes, got 1; start them by torchrun --nproc-per-node 2" in fails(capsys, "--pipeline", "2")
    assert "a pipeline of 4 workers needs as many stages, and the network has 3" in fails(capsys, "--pipeline", "threads:4")
    few = ["--max-train-samples", 100, "--pipeline", "threads:2"]
    assert "--diagnose has no effect with several workers" in fails(capsys, *few, "--diagnose")
    assert "--compare has no effect with several workers" in fails(capsys, *few, "--compare")
    tiny = tmp_path / "text.txt"
    tiny.write_text("to be or not to be, that is the question " * 30)
    gpt = ["--text", tiny, "--dim", 8, "--heads", 2, "--depth", 2, "--context", 8, "--pipeline", "threads:2"]
    assert "tied embeddings are read by the first stage and learnt by the last" in fails(capsys, *gpt, "--tied")
    own = ["--method", "local", "--local-head", "own", "--pipeline", "threads:3"]
    assert "of 3 workers needs as many stages (the first one needs 2 of them, the last one needs 2 of them), and" in fails(
        capsys, *gpt[:-2], *own
    )
    assert "shared heads read every stage's output" in fails(capsys, *gpt, "--method", "local")
    stream = ["--streaming", "--max-train-samples", 200, "--window", 50, "--window-order", "turns"]
    assert "window order 'turns' needs data that is loaded whole" in fails(capsys, *stream)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were started, and nothing says what each is to do; add --pipeline auto" in fails(capsys)
    assert mesh.processes() == (0, 2)


@pytest.mark.parametrize("precision", ["bfloat16-weights", "bfloat16", "float64"])
def test_rows_of_replicas_are_compared_in_every_precision(precision: str) -> None:
    trainer = f3.Trainer(f3.models.MLP([8, 16, 16, 3]), precision=precision, device="cpu", batch_size=20)
    trainer.seat = replace(trainer.seat, replicas=2)
    plan = trainer.check((torch.randn(40, 8), torch.arange(40) % 3), None, 1)
    assert rows_are_alike(trainer, plan) in (True, False)
