"""Checkpoints: everything that a run needs to go on as if nothing had happened, in folders that are whole or not there.

A checkpoint is a folder `step-NNNNNNNNNNNN` with `tensors.safetensors` (weights, buffers, moments, errors, outputs whose loss
has not been looked at yet, states of the random generators), `state.json` (where the run is, its records and settings) and
`manifest.json` (the files' sizes and SHA-256). Each worker of a pipeline writes its weights, buffers and moments itself, to
`tensors-WORKER.safetensors`. It is written under another name, put on disk file by file, the manifest last, and then renamed: a
folder of that name without a sound manifest was damaged later, and is named and passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.choices import check_word, plain
from ..base.exceptions import InputError
from ..base.faults import fault
from ..base.files import LARGEST_JSON, check_tensors, parse_object, read_bytes, read_object
from ..base.schema import ANY_OBJECT, ANYTHING, NUMBER, STRING, Fields, Many, Whole, check, maybe
from ..base.text import short
from ..distributed.ring import Files

# In the order in which a checkpoint meets them (see `errors.faults`).
CHECKPOINT_LABELS = (
    "checkpoint:begin",  # its folder is there, under another name
    "checkpoint:tensors",  # written; in a pipeline by each worker
    "checkpoint:state",  # written
    "checkpoint:synced",
    "checkpoint:manifest",  # written and synced, and the folder
    "checkpoint:renamed",
    "checkpoint:complete",  # and so is that on disk
    "checkpoint:removing",  # an old one has lost its manifest
    "checkpoint:removed",  # all old ones are gone
)

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
BEST = "best.safetensors"  # the best model so far, where the run keeps one
PARTS = re.compile(r"tensors(-[0-9]{1,6})?\.safetensors")
NAME = re.compile(r"step-(\d{12})")
CHUNK = 1 << 22
UNITS = ("steps", "epochs", "minutes")

_FILE = Fields({"bytes": Whole(), "sha256": STRING})
_MANIFEST = Fields({"format": Whole(), "files": Fields({TENSORS: _FILE, STATE: _FILE}, others=_FILE)})
# What `state.json` holds: where the run is, its records, and what its parts give (see `state`).
_TALLY = {
    "sizes": Many(Whole()),
    "waiting": Many(Whole()),
    "samples": Whole(),
    "total": STRING,
    "hits": Whole(),
    "batches": Whole(),
}
_STREAM = {"pass": Whole(), "block": Whole(), "hash": STRING}
_READER = {"rows": Whole(), "stream": maybe(ANY_OBJECT), "chunk": Whole(), "taken": Whole()}
_RECORD = {"epoch": NUMBER, "step": Whole(), "lr": NUMBER, "learning_seconds": NUMBER}
_HISTORY = Many(Fields(_RECORD, {"test_mse_in_units": Fields({}, others=NUMBER)}, others=NUMBER))
STATE_HOLDS = Fields(
    {
        "settings": Fields({}, {"feedback": Many(STRING)}, others=ANYTHING),
        "epoch": Whole(),
        "steps": Whole(),
        "epochs_done": Whole(),
        "learning_seconds": NUMBER,
        "history": _HISTORY,
    },
    {
        "format": Whole(FORMAT, FORMAT),
        "tally": Fields(_TALLY),
        "store_epoch": Whole(),
        "stream": maybe(Fields({**_STREAM, "reader": Fields(_READER)})),
    },
)


@dataclass
class Snapshot:
    """A run at one moment: `tensors` by name, `state`, which JSON can hold, and the file of the `best` model until then."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    best: Path | None = None


@dataclass
class Checkpoints:
    """Where checkpoints go, and when: after every `every` steps, epochs or minutes, by the `unit`; the last `keep` of them are
    kept. `on_write` is called after each. The file `best`, where there is one, is kept with them. Time, by `clock` in seconds,
    decides only when they are written, and nothing that is in the run.

    Raises InputError for numbers below 1, and for unknown units.
    """

    folder: Path
    every: int
    unit: str = "steps"
    keep: int = 2
    on_write: Callable[[], None] = lambda: None
    best: Path | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).expanduser()
        self.every, self.keep = plain(self.every), plain(self.keep)
        for name, value in (("checkpoint every", self.every), ("keep", self.keep)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.unit = check_word("unit", self.unit, UNITS)
        self._began: float | None = None  # the minutes that are under way

    def due(self, steps: int) -> bool:
        """Whether there is one after so many steps, at this moment."""
        if self.unit == "minutes":
            now = self.clock()
            self._began = now if self._began is None else self._began
            due = now - self._began >= 60 * self.every
            self._began = now if due else self._began
            return due
        return self.unit == "steps" and steps % self.every == 0

    def due_after_epoch(self, epochs: int) -> bool:
        """Whether there is one after so many epochs."""
        return self.unit == "epochs" and epochs % self.every == 0


def parse_every(text: str) -> tuple[int, str] | None:
    """`500` is every 500 steps, `2e` (or `2epochs`) every 2 epochs, `10min` every 10 minutes, `never` None. Raises InputError
    for anything else."""
    if text.strip() == "never":
        return None
    found = re.fullmatch(r"(\d{1,12})\s*(steps?|e|epochs?|min|minutes?)?", text.strip())
    if found is None or int(found[1]) < 1:
        allowed = "a number of steps (500), of epochs (2e) or of minutes (10min), never"
        raise InputError(f"checkpoint every {text!r} is not understood; allowed: {allowed}")
    return int(found[1]), next(unit for unit in UNITS if unit.startswith((found[2] or "s")[0]))


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what disk or folder do not allow inside into an InputError that names the `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write the checkpoint {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None


def begin(folder: Path) -> Path:
    """A new folder in `folder` for a checkpoint, under another name; what was left half written is removed. Raises
    InputError."""
    temporary = folder / f".step-{uuid.uuid4().hex}.tmp"
    with writing(temporary):
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync(folder.parent)
        remove_half_written(folder)
        temporary.mkdir()
        fault("checkpoint:begin")
    return temporary


def write_part(temporary: str, worker: int, tensors: dict[str, Tensor]) -> Files:
    """Write a worker's tensors in a folder that `begin` has made; returns what the manifest says of them. Raises InputError."""
    return _write_tensors(Path(temporary) / f"tensors-{worker}.safetensors", tensors)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> Files:
    with writing(path):
        save_tensors(tensors, path)
        fault("checkpoint:tensors")
        return {path.name: _sealed(path)}


def _sealed(path: Path) -> dict[str, object]:
    """Put a file on disk; its size and hash."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def finish(temporary: Path, parts: Files, snapshot: Snapshot, steps: int, keep: int) -> None:
    """Write all else of a checkpoint to the folder that `begin` has made, where the `parts` are; give it its name, and remove
    all but the last `keep`. Raises InputError where disk or folder do not allow it.

    Those of later steps are removed too: they are of a run that went back to before them, because they were damaged.
    """
    folder = temporary.parent
    final = folder / f"step-{steps:012d}"
    files = parts | _write_tensors(temporary / TENSORS, snapshot.tensors)
    with writing(final):
        text = json.dumps({"format": FORMAT, **snapshot.state}, allow_nan=True)
        (temporary / STATE).write_text(text, encoding="utf-8")
        fault("checkpoint:state")
        files[STATE] = _sealed(temporary / STATE)
        if snapshot.best is not None and snapshot.best.exists():
            shutil.copyfile(snapshot.best, temporary / BEST)
            files[BEST] = _sealed(temporary / BEST)
        fault("checkpoint:synced")
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}), encoding="utf-8")
        sync(temporary / MANIFEST)
        sync(temporary)
        fault("checkpoint:manifest")
        if final.exists():  # the same step again, after going back to an older checkpoint
            remove(final)
        temporary.rename(final)
        fault("checkpoint:renamed")
        sync(folder)
        fault("checkpoint:complete")
        for number, later in found_in(folder):
            if number > steps:
                remove(later)
        keep_last(folder, steps, keep)
        fault("checkpoint:removed")


def tidy(folder: Path, steps: int, keep: int) -> None:
    """Remove what the run that wrote the checkpoint of `steps` has left, where it was killed at that. Raises InputError."""
    try:
        remove_half_written(folder)
        keep_last(folder, steps, keep)
    except OSError as error:
        raise InputError(f"cannot remove old checkpoints in {str(folder)!r}: {error.strerror}") from None


def remove_half_written(folder: Path) -> None:
    """Remove what a run that was killed has left of a checkpoint."""
    for left in folder.glob(".step-*.tmp"):
        shutil.rmtree(left)


def keep_last(folder: Path, steps: int, keep: int) -> None:
    """Remove the checkpoints before that of `steps`, but for the last `keep` - 1 of them."""
    older = sorted(((number, path) for number, path in found_in(folder) if number < steps), reverse=True)
    whole = [path for _, path in older if (path / MANIFEST).exists()]
    for _, old in older:
        if old not in whole[: keep - 1]:
            remove(old)


def remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that a half-removed one is not taken for a damaged one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    fault("checkpoint:removing")
    shutil.rmtree(folder)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors to a new file, with the mode that the user's files have: the library's own is for the user alone."""
    path.touch()
    mode = path.stat().st_mode
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in storages else tensor  # a parameter with two names: the format wants two
        storages.add(place)
    save_file(found, path, metadata)
    path.chmod(mode)


def sync(path: Path) -> None:
    """Put a file, or a folder's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------------


def found_in(folder: Path) -> Iterator[tuple[int, Path]]:
    """(steps, folder) of every checkpoint by name."""
    if folder.is_dir():
        for path in folder.iterdir():
            name = NAME.fullmatch(path.name)
            if name and path.is_dir() and not path.is_symlink():
                yield int(name[1]), path


def newest(folder: Path, warn: Any) -> Snapshot | None:
    """The newest sound checkpoint in `folder`, None where there is none; damaged ones are told to `warn`, one line each.

    A folder without a manifest was being removed, and is passed over without a word. Raises InputError where there are
    checkpoints with a manifest, but not a sound one.
    """
    if folder.is_symlink():
        raise InputError(f"{str(folder)!r} is a link; checkpoints are in the run's own folder")
    damaged = []
    for _, path in sorted(found_in(folder), reverse=True):
        if not (path / MANIFEST).exists():
            continue
        try:
            return read(path)
        except InputError as error:
            damaged.append(error)
            warn(f"{error}; taking the one before")
    if damaged:
        raise InputError(f"no checkpoint in {str(folder)!r} is sound; start anew in another folder")
    return None


def read(folder: Path) -> Snapshot:
    """A checkpoint, after sizes and hashes have been compared, and its state with what `STATE` says. Raises InputError for one
    that is not sound."""
    try:
        manifest = read_object(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise InputError(f"it has the format {short(manifest.get('format'))}; this version reads {FORMAT}")
        check(_MANIFEST, manifest, f"its {MANIFEST}")
        text, parts = read_bytes(folder / STATE, LARGEST_JSON), []
        for name, told in manifest["files"].items():
            if PARTS.fullmatch(name):
                parts.append(name)
            elif name not in (STATE, BEST):
                raise InputError(f"its {MANIFEST} names {short(name)}; allowed: {STATE}, {BEST}, tensors-WORKER.safetensors")
            size = len(text) if name == STATE else check_tensors(folder / name)
            if size != told["bytes"]:
                raise InputError(f"{name} has {size} bytes, not {told['bytes']}")
            if sha256(folder / name) != told["sha256"]:
                raise InputError(f"the content of {name} is not what was written")
        state = parse_object(text, folder / STATE, nan=True)
        check(STATE_HOLDS, state, STATE)
        if folder.name != f"step-{state['steps']:012d}":
            raise InputError(f"{STATE} is that of step {state['steps']}")
        tensors: dict[str, Tensor] = {}
        for name in parts:
            own = load_file(folder / name)
            if twice := tensors.keys() & own.keys():
                raise InputError(f"the tensor {short(min(twice))} is in {name} and in another file")
            tensors |= own
        return Snapshot(tensors, state, folder / BEST if BEST in manifest["files"] else None)
    except (InputError, OSError, SafetensorError) as error:
        raise InputError(f"checkpoint {str(folder)!r} is damaged: {error}") from None


def peek(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint that may be damaged; empty where it cannot be read."""
    try:
        return read_object(folder / STATE, nan=True)
    except InputError:
        return {}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that are not what they were, a phrase each."""
    return [
        f"{short(name.replace('_', ' '))[1:-1]} was {short(then.get(name), 300)} and is {short(now.get(name), 300)}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
