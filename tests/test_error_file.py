"""The store in a folder: equal to the one in memory, safe at every moment of a commit, and careful where it is put."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_train_script import fails, run
from test_trainer import mlp, problem, train, weights

import f3triton as f3
from f3triton.base import faults
from f3triton.error_store import ErrorStore, FileStore, MemoryStore, Rows, make_codec, make_store, remove_store
from f3triton.error_store.disk import ahead
from f3triton.error_store.disk.file import STORE_LABELS
from f3triton.error_store.disk.format import ROWS_AT, read_manifest, verify
from f3triton.error_store.disk.mapped import MappedRows

SAMPLES, WIDTH = 37, 5


def spec(word: str = "float32", samples: int = SAMPLES, **changes: object) -> Rows:
    target = torch.eye(WIDTH)[torch.arange(samples) * 3 % WIDTH]
    data = {"name": "toy", "revision": None, "split": "train", "rows": samples, "hash": "00"}
    codec = make_codec(word, WIDTH, torch.float32)
    return Rows(samples, codec, torch.device("cpu"), lambda index: target[index], {**data, **changes})


def visit(stores: list[ErrorStore], epoch: int, missing: int = 0, batch: int = 8) -> list[torch.Tensor]:
    """An epoch of reads and writes, the same in all stores, without the last `missing` samples of a random order."""
    generator = torch.Generator().manual_seed(epoch)
    read = []
    for index in torch.randperm(SAMPLES, generator=generator)[: SAMPLES - missing].split(batch) if missing < SAMPLES else ():
        rows = [store.read(index) for store in stores]
        assert all(torch.equal(one, rows[0]) for one in rows)
        read.append(rows[0])
        errors = torch.randn(len(index), WIDTH, generator=generator)
        for store in stores:
            store.write(index, errors)
    return read


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def _no_hook() -> Iterator[None]:
    yield
    faults.hook = None


@pytest.mark.parametrize("word", ["float32", "float16", "bfloat16", "int8", "ternary", "top-2"])
def test_equal_to_memory(word: str, tmp_path: Path) -> None:
    file, memory = make_store(tmp_path / "store", spec(word)), make_store("memory", spec(word))
    assert isinstance(file, FileStore)
    assert isinstance(memory, MemoryStore)
    for epoch, missing in enumerate((0, 5, 0, SAMPLES, 1)):
        visit([file, memory], epoch, missing)
        assert file.commit() == memory.commit() == missing
        file.release(file.epoch)
        assert torch.equal(file.rows, memory.rows)
    file.close()
    opened = FileStore.open(tmp_path / "store", spec(word))
    assert opened.epoch == 5
    assert torch.equal(opened.rows, memory.rows)
    visit([opened, memory], 6)
    assert torch.equal(opened.rows, memory.rows)


def test_the_first_epoch_without_all_rows(tmp_path: Path) -> None:
    file, memory = FileStore.create(tmp_path, spec("int8")), MemoryStore(spec("int8"))
    visit([file, memory], 0, missing=30)
    assert torch.equal(file.rows, memory.rows)
    assert file.commit() == memory.commit() == 30
    assert torch.equal(file.rows, memory.rows)


def test_a_sample_twice_in_an_epoch(tmp_path: Path) -> None:
    file, memory = FileStore.create(tmp_path, spec()), MemoryStore(spec())
    for index in ([3, 4], [4, 5], [3, 9], [7, 7]):
        index = torch.tensor(index)
        assert torch.equal(file.read(index), memory.read(index))
        for store in (file, memory):
            store.write(index, torch.arange(10.0).view(2, 5) + index[:, None])
    file.commit()
    assert torch.equal(file.rows, memory.rows)


def test_going_back_to_a_kept_generation(tmp_path: Path) -> None:
    store, rows = FileStore.create(tmp_path, spec(), generations=4), []
    for epoch in range(4):
        rows.append(store.rows)
        visit([store], epoch)
        store.commit()
    assert store.describe()["generations"] == [0, 1, 2, 3]
    store.release(2)  # whoever goes back to 2 reads 1
    assert store.describe()["generations"] == [1, 2, 3]
    store.close()
    assert sorted(files(tmp_path)) == ["errors-1.f3e", "errors-2.f3e", "errors-3.f3e", "manifest.json"]
    before = files(tmp_path)
    for epoch in (1, 5, -1):
        with pytest.raises(f3.InputError, match=f"cannot go to epoch {epoch}; it keeps the rows of epochs: 1, 2, 3"):
            FileStore.open(tmp_path, spec(), epoch)
    assert files(tmp_path) == before
    store = FileStore.open(tmp_path, spec(), 3)
    assert torch.equal(store.rows, rows[3])
    store.close()
    store = FileStore.open(tmp_path, spec(), 2)
    assert (store.epoch, store.describe()["generations"]) == (2, [1])
    assert torch.equal(store.rows, rows[2])
    visit([store], 2)
    visit_again = store.rows
    store.commit()
    assert torch.equal(store.rows, visit_again)
    assert torch.equal(store.rows, rows[3])
    store.close()
    store = FileStore.open(tmp_path, spec(), 0)  # the targets are always there
    assert torch.equal(store.rows, rows[0])


@pytest.mark.parametrize("word", ["float32", "ternary"])
def test_state_and_restore_within_an_epoch(word: str, tmp_path: Path) -> None:
    store, memory = FileStore.create(tmp_path, spec(word)), MemoryStore(spec(word))
    for epoch in range(2):
        visit([store, memory], epoch)
        store.commit(), memory.commit()
    visit([store, memory], 2, missing=20)
    state, kept = store.state(), {name: tensor.clone() for name, tensor in memory.state().items()}
    visit([store, memory], 3, missing=10)  # some of the rows in the state, and others
    store.close()
    store = FileStore.open(tmp_path, spec(word))
    store.restore(state, 2)
    memory.restore(kept, 2)
    assert torch.equal(store.rows, memory.rows)
    visit([store, memory], 4, missing=30)
    assert store.commit() == memory.commit() > 0
    assert torch.equal(store.rows, memory.rows)
    store.restore(state, 2)  # from a later epoch, in the same process
    assert torch.equal(store.rows[state["visited"]], store.codec.decode(state["rows"]))
    for broken in ({}, {**state, "rows": state["rows"][:-1]}, {**state, "visited": state["visited"][:-1]}):
        with pytest.raises(f3.InputError, match="does not belong to the error store"):
            store.restore(broken, 2)


def test_what_is_on_disk(tmp_path: Path) -> None:
    """The bytes by the documentation, read with nothing of the package."""
    import json
    import struct
    import zlib

    import numpy as np

    store = FileStore.create(tmp_path, spec("float16"))
    visit([store], 0)
    store.commit()
    store.release(1)
    visit([store], 1, missing=9)
    rows, written = store.rows, store.visited.tolist()
    store.commit()
    store.release(2)
    store.close()
    assert sorted(files(tmp_path)) == ["errors-1.f3e", "manifest.json"]
    manifest, content = json.loads((tmp_path / "manifest.json").read_text()), (tmp_path / "errors-1.f3e").read_bytes()
    magic, version, length = struct.unpack_from("<8sII", content)
    assert (magic, version) == (b"F3ERRORS", 1)
    described = {"samples": 37, "width": 5, "codec": "float16", "row_bytes": 10, "data": spec().data}
    assert json.loads(content[16 : 16 + length]) == {**described, "epoch": 1}
    assert content[16 + length : 16384] == bytes(16384 - 16 - length)
    end = 16384 + 37 * 10
    assert (np.frombuffer(content[16384:end], "<f2").reshape(37, 5) == rows.numpy()).all()
    assert np.unpackbits(np.frombuffer(content[end:], np.uint8), bitorder="little").tolist() == [*written, 0, 0, 0]
    assert len(content) == end + 5
    entry = {"epoch": 1, "file": "errors-1.f3e", "bytes": end + 5, "crc32": zlib.crc32(content), "carried": 9}
    assert manifest == {"format": "f3triton-errors", "version": 1, "rows": described, "generations": [entry]}


# --- reading ahead and writing behind ---


def planned_visit(store: ErrorStore, memory: ErrorStore, batches: list[torch.Tensor]) -> None:
    """Read and write in the order of a plan; the store in memory does the same one by one."""
    generator = torch.Generator().manual_seed(len(batches))
    for index, expected in zip(store.plan(iter(batches), torch.device("cpu")), batches, strict=True):
        assert torch.equal(index, expected)
        assert torch.equal(store.read(index), memory.read(index))
        errors = torch.randn(len(index), WIDTH, generator=generator)
        memory.write(index, errors)
        store.write(index, errors)
        errors.zero_()  # the caller's own, again


@pytest.mark.parametrize("word", ["float32", "int8"])
@pytest.mark.parametrize("slow", ["", "gather", "scatter"])
def test_a_plan_with_samples_that_come_again(word: str, slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, some of which share samples with those just before, and some with none; with either thread behind."""
    if slow:
        really = getattr(MappedRows, slow)

        def slowly(self: MappedRows, *arguments: object) -> object:
            time.sleep(0.002)
            return really(self, *arguments)

        monkeypatch.setattr(MappedRows, slow, slowly)
    store, memory = FileStore.create(tmp_path, spec(word)), MemoryStore(spec(word))
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        batches = [torch.randperm(SAMPLES, generator=generator)[:size] for size in (3, 9, 2, 2, 2, 2, 30, 1, 2, 2, 1)]
        planned_visit(store, memory, [*torch.arange(20).split(2), *batches])
        assert store.commit() == memory.commit()
        assert torch.equal(store.rows, memory.rows)
        store.release(store.epoch)


def test_a_plan_that_ends_early_and_one_without_writes(tmp_path: Path) -> None:
    store, memory = FileStore.create(tmp_path, spec()), MemoryStore(spec())
    batches = list(torch.arange(SAMPLES).split(2))
    for number, index in enumerate(store.plan(batches, torch.device("cpu"))):
        if number == 3:
            break
        store.write(index, torch.full((2, WIDTH), 7.0))
        memory.write(index, torch.full((2, WIDTH), 7.0))
    assert store.state()["visited"].sum() == 6
    for index in store.plan(batches, torch.device("cpu")):
        if index[0] >= 20:
            store.write(index, torch.full((len(index), WIDTH), 8.0))
            memory.write(index, torch.full((len(index), WIDTH), 8.0))
    planned_visit(store, memory, batches)
    assert store.commit() == memory.commit() == 0
    assert torch.equal(store.rows, memory.rows)


def test_rows_that_are_not_in_memory_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("f3triton.error_store.disk.mapped.MAPPED_BYTES", 1 << 20)  # and leave this process's tables soon
    width, samples = 2000, 2000
    rows = Rows(samples, make_codec("float16", width, torch.float32), torch.device("cpu"), lambda i: torch.zeros(len(i), width))
    store, every = FileStore.create(tmp_path, rows), torch.arange(samples)
    values = torch.arange(samples)[:, None].repeat(1, width).half().float()
    store.write(every, values)
    store.commit()
    asked = []
    really = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments) or really(*arguments))
    file = store.previous
    file.forget()
    really(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    cold = file._on_disk(every[::100])
    for index in store.plan(torch.randperm(samples).split(100), torch.device("cpu")):
        assert torch.equal(store.read(index), values[index])
    assert bool(asked) == cold  # a file system in memory cannot forget
    assert all(arguments[2] == 2 * width for arguments in asked)


def test_the_queues_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore.create(tmp_path, spec(samples=1000))
    asked, slow = [], threading.Event()
    really = MappedRows.scatter

    def waits(self: MappedRows, *arguments: object) -> None:
        slow.wait(5)
        really(self, *arguments)

    monkeypatch.setattr(MappedRows, "scatter", waits)

    def source() -> Iterator[torch.Tensor]:
        for index in torch.arange(1000).split(10):
            asked.append(index)
            yield index

    plan = store.plan(source(), torch.device("cpu"))
    for number, index in enumerate(plan):
        assert len(asked) - number <= ahead.AHEAD + ahead.ASKED
        if number == ahead.BEHIND:
            threading.Timer(0.05, slow.set).start()
        store.write(index, torch.zeros(10, WIDTH))
        assert len(store.ahead.behind) <= ahead.BEHIND
    assert store.commit() == 0
    assert store.ahead.waited > 0.02


@pytest.mark.parametrize("broken", ["gather", "scatter"])
def test_an_error_in_a_thread_ends_the_run_with_its_cause(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()  # two threads may call at once, and each must have a number of its own
    really = getattr(MappedRows, broken)

    def breaks(self: MappedRows, *arguments: object) -> object:
        if next(calls) == 2:  # a busy machine reads more rows at a call, so there may be few
            raise OSError(5, "Input/output error")
        return really(self, *arguments)

    monkeypatch.setattr(MappedRows, broken, breaks)
    action = "reads" if broken == "gather" else "writes"
    trainer = f3.Trainer(mlp(), device="cpu", batch_size=2, error_store=tmp_path / "errors")
    with pytest.raises(RuntimeError, match=f"the thread that {action} error rows failed: .*Input/output error") as error:
        trainer.fit(problem(), 3)
    assert isinstance(error.value.__cause__, OSError)
    assert trainer.result.steps < 70
    FileStore.open(tmp_path / "errors", trainer.learner.store.spec).close()  # and the lock is free


def test_an_error_of_the_users_own_order(tmp_path: Path) -> None:
    def batches(epoch: int) -> Iterator[torch.Tensor]:
        yield torch.tensor([1, 2])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        f3.Trainer(mlp(), device="cpu", error_store=tmp_path / "errors").fit(problem(), 3, batches=batches)
    store = FileStore.create(tmp_path / "b", spec())
    plan = iter(store.plan([torch.tensor([99])], torch.device("cpu")))
    index = next(plan)
    with pytest.raises(RuntimeError, match=r"the thread that reads error rows failed: .*out of range"):
        store.read(index)


# --- crashes ---


class Crash(BaseException):
    pass


def crash_at(label: str, number: int = 1) -> Callable[[str], None]:
    count = 0

    def hook(found: str) -> None:
        nonlocal count
        count += found == label
        if found == label and count == number:
            raise Crash

    return hook


def three_epochs(store: ErrorStore) -> None:
    for epoch in range(store.epoch, 3):
        visit([store], epoch, missing=4)
        store.commit()
        store.release(store.epoch)


@pytest.mark.usefixtures("_no_hook")
def test_every_label_is_met(tmp_path: Path) -> None:
    met = []
    store = FileStore.create(tmp_path, spec())
    faults.hook = met.append
    three_epochs(store)
    assert set(met) == set(STORE_LABELS)


@pytest.mark.usefixtures("_no_hook")
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("label", STORE_LABELS)
def test_stopped_at_every_moment(label: str, number: int, tmp_path: Path) -> None:
    """Whatever the moment, the folder as it is then opens at an epoch's beginning, and ends as if nothing had happened."""
    memory = MemoryStore(spec())
    three_epochs(memory)
    store = FileStore.create(tmp_path / "a", spec())
    faults.hook = crash_at(label, number)
    try:
        three_epochs(store)
    except Crash:
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    faults.hook = None
    if not (tmp_path / "b").exists():
        assert number == 3  # the first epoch has nothing to release
        assert label in ("store:release", "store:released")
        return
    again = FileStore.open(tmp_path / "b", spec())
    three_epochs(again)
    again.release(again.epoch)
    assert torch.equal(again.rows, memory.rows)
    again.close()
    assert sorted(files(tmp_path / "b")) == ["errors-2.f3e", "manifest.json"]


class Disk:
    """What a power cut leaves of a folder: a file's bytes of its last fsync, and zeros where it had none.

    Names are as they are at the moment: a rename that was not synced may have reached the disk or not, and both are tried.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: dict[int, bytes] = {}  # by inode
        really = os.fsync

        def fsync(descriptor: int) -> None:
            really(descriptor)
            path = Path(f"/proc/self/fd/{descriptor}")
            if path.is_file():
                self.synced[os.fstat(descriptor).st_ino] = path.read_bytes()

        monkeypatch.setattr(os, "fsync", fsync)

    def after_power_cut(self, folder: Path, to: Path) -> None:
        to.mkdir()
        for path in folder.iterdir():
            size = path.stat().st_size
            (to / path.name).write_bytes(self.synced.get(path.stat().st_ino, b"")[:size].ljust(size, b"\0"))


@pytest.mark.usefixtures("_no_hook")
@pytest.mark.parametrize("broken", [False, True])
def test_pages_that_were_not_synced_are_lost(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut at every moment of three epochs; with a commit that syncs no data, the same test finds the loss."""
    memory, rows = MemoryStore(spec()), []
    disk = Disk(monkeypatch)
    store, cuts, damaged = FileStore.create(tmp_path / "a", spec()), 0, 0
    if broken:
        monkeypatch.setattr("f3triton.error_store.disk.mapped.MappedRows.sync", lambda self: self.map.flush())

    def cut(label: str) -> None:
        nonlocal cuts, damaged
        cuts += 1
        disk.after_power_cut(tmp_path / "a", tmp_path / f"cut{cuts}")
        faults.hook = None
        try:
            again = FileStore.open(tmp_path / f"cut{cuts}", spec())
            assert torch.equal(again.rows, rows[again.epoch])
            again.close()
        except f3.InputError:
            damaged += 1
        faults.hook = cut

    for epoch in range(4):
        rows.append(memory.rows.clone())
        visit([memory], epoch)
        memory.commit()
    faults.hook = cut
    for epoch in range(3):
        visit([store], epoch)
        store.commit()
        store.release(store.epoch)
    assert cuts > 40
    assert (damaged > 0) == broken


def test_a_failed_sync_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore.create(tmp_path, spec())
    visit([store], 0)

    def fsync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(f3.InputError, match=r"cannot write .*errors-0\.f3e': Input/output error"):
            store.commit()
    store.close()
    assert FileStore.open(tmp_path, spec()).epoch == 0


def test_a_killed_process_leaves_the_last_commit(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_error_file import *
store = FileStore.create({str(tmp_path)!r}, spec())
visit([store], 0)
store.commit()
visit([store], 1, missing=3)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    memory = MemoryStore(spec())
    visit([memory], 0)
    store = FileStore.open(tmp_path, spec())
    assert store.epoch == 1
    assert torch.equal(store.rows, memory.rows)


# --- where it is put ---


def test_another_store_is_refused(tmp_path: Path) -> None:
    store = FileStore.create(tmp_path, spec())
    with pytest.raises(f3.InputError, match="in use by another run"):
        FileStore.open(tmp_path, spec())
    with pytest.raises(f3.InputError, match=r"exists already \(manifest\.json\)"):
        FileStore.create(tmp_path, spec())
    visit([store], 0)
    store.commit()
    store.close()
    before = files(tmp_path)
    for other, difference in (
        (spec(name="other"), "the data set's name is 'toy' there, and 'other' here"),
        (spec(revision="abc"), "the data set's revision is None there, and 'abc' here"),
        (spec(hash="11"), "the data set's hash is '00' there, and '11' here"),
        (spec(samples=36), "the data set's rows is 37 there, and 36 here"),
        (spec("int8"), "error dtype is 'float32' there, and 'int8' here"),
    ):
        with pytest.raises(f3.InputError, match=difference):
            FileStore.open(tmp_path, other)
    assert files(tmp_path) == before
    FileStore.open(tmp_path, spec()).close()
    assert files(tmp_path) == before
    with pytest.raises(f3.InputError, match="does not exist"):
        FileStore.open(tmp_path / "other", spec())


def test_a_closed_store_and_its_lock(tmp_path: Path) -> None:
    store = FileStore.create(tmp_path, spec())
    store.close()
    store.close()
    with pytest.raises(RuntimeError, match="is closed"):
        store.write(torch.tensor([1]), torch.zeros(1, WIDTH))
    store = FileStore.open(tmp_path, spec())
    del store  # nobody can close it any more
    FileStore.open(tmp_path, spec()).close()


def test_removing_a_store(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("stays")
    remove_store(tmp_path)
    store = FileStore.create(tmp_path, spec())
    with pytest.raises(f3.InputError, match="in use by another run"):
        remove_store(tmp_path)
    visit([store], 0)
    store.commit()
    store.close()
    remove_store(tmp_path)
    assert list(files(tmp_path)) == ["mine.txt"]
    (tmp_path / "manifest.json").write_text('{"of": "another program"}')
    with pytest.raises(f3.InputError, match="manifest"):
        remove_store(tmp_path)
    assert len(files(tmp_path)) == 2


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROWS_AT, limits[1]))
    try:
        with pytest.raises(f3.InputError, match=r"cannot reserve 16\.7 KiB for a generation of rows: File too large"):
            FileStore.create(tmp_path / "new" / "store", spec())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "new" / "store").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mounted, check=False, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_and_one_that_cannot_be_written(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(f3.InputError, match=r"needs 1\.0 MiB for 2 generations of rows, and 64\.0 KiB are free"):
        FileStore.create(small_disk / "store", spec())
    monkeypatch.setattr("f3triton.error_store.disk.folder.SPARE_BYTES", 0)
    FileStore.create(small_disk / "store", spec()).close()
    remove_store(small_disk / "store")
    monkeypatch.setattr(
        "f3triton.error_store.disk.folder.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)
    )
    with pytest.raises(f3.InputError, match=r"cannot reserve 16\.7 KiB .*: No space left on device"):
        FileStore.create(small_disk / "store", spec(), generations=4)
    assert files(small_disk / "store") == {}
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(f3.InputError, match="error store"):
        FileStore.create(small_disk / "other", spec())


# --- training ---


@pytest.mark.parametrize("settings", [{}, {"error_dtype": "int8"}, {"window": 20, "visits": 2, "first_visit": "stale"}])
def test_training_is_the_same_as_from_memory(settings: dict, tmp_path: Path) -> None:
    memory = train(mlp(), 4, **settings)
    file = train(mlp(), 4, error_store=tmp_path / "errors", **settings)
    assert torch.equal(weights(memory.model), weights(file.model))
    manifest = read_manifest(tmp_path / "errors")
    (generation,) = manifest.generations.values()
    verify(tmp_path / "errors", manifest.kind, generation)
    passes = 2 if "window" in settings else 4
    assert (generation.epoch, generation.carried) == (passes - 1, 0)
    assert manifest.kind.data["rows"] == 60
    assert len(manifest.kind.data["hash"]) == 32


def test_training_in_windows_with_a_small_store(tmp_path: Path) -> None:
    settings = {"window": 20, "visits": 2, "first_visit": "target"}
    file = train(mlp(), 4, error_store=str(tmp_path / "errors"), **settings)
    assert torch.equal(weights(train(mlp(), 4, **settings).model), weights(file.model))
    assert read_manifest(tmp_path / "errors").kind.samples == 20


def test_samples_of_the_users_own_order(tmp_path: Path) -> None:
    def batches(epoch: int) -> list[torch.Tensor]:
        return [torch.tensor(index) for index in ([0, 1, 2], [2, 3, 1], [epoch, 5], [5, 0])]

    models = []
    for home in ("memory", tmp_path / "errors"):
        trainer = f3.Trainer(mlp(), device="cpu", error_store=home)
        result = trainer.fit(problem(), 3, batches=batches)
        assert [record["carried_rows"] for record in result.history] == [55, 55, 55]
        models.append(weights(trainer.model))
    assert torch.equal(*models)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "errors"
    options = ("--hidden", 8, "--epochs", 2, "--error-dtype", "int8", "--error-store", store)
    assert run(*options, "--dry-run") == 0
    assert not store.exists()
    assert run(*options, "--output-dir", tmp_path / "a") == 0
    assert f"error store: {store}, int8, 1,438 rows of 14 bytes, 19.7 KiB" in capsys.readouterr().out
    assert sorted(path.name for path in store.iterdir()) == ["errors-1.f3e", "manifest.json"]
    data = read_manifest(store).kind.data
    assert (data["name"], data["revision"], data["split"], data["rows"]) == ("digits", None, "train", 1438)
    assert "exists already" in fails(capsys, *options, "--output-dir", tmp_path / "b")
    assert "exists already" in fails(capsys, *options, "--dry-run")
    assert not (tmp_path / "b").exists()
    assert run(*options, "--output-dir", tmp_path / "a", "--overwrite") == 0
    assert "allowed: auto, device, memory and a folder" in fails(capsys, "--error-store", "memry")
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(capsys, "--error-store", tmp_path / "file" / "errors")
