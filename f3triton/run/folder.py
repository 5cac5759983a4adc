"""A run's folder: what is written there, and how it is read back."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..base.files import check_tensors, read_object
from ..base.schema import ANYTHING, Fields, Word, check
from ..base.text import short
from ..base.words import WHICH
from ..data.preprocessing import PREPROCESSING
from ..kernels.words import LOSSES
from ..models.build import NETWORK, build
from ..network.sequential import Sequential
from .checkpoint import BEST, Snapshot, save_tensors
from .curves import Curve, draw_curves
from .lock import FolderLock

FORMAT = 1
_NAMES = (
    "config.json",
    "metrics.jsonl",
    "model.safetensors",
    BEST,
    "summary.json",
    "curves.png",
    "diagnostics.json",
    "diagnostics.png",
)
_NEW = ".new"  # the folder of a run that writes over another, until it has something to show
CHECKPOINTS = "checkpoints"
EVENTS = "tensorboard"
MODEL_FILES = {"best": BEST, "last": "model.safetensors"}  # the model files
_SPARE = 4 << 20  # bytes for everything in a folder but the model
_TYPES = ("F32", "F64", "BF16")  # of a model's tensors: see `base.precision`
# What a run's configuration holds; `options` has what its options may be.
CONFIG = Fields({"loss": Word(LOSSES), "network": NETWORK, "preprocessing": PREPROCESSING}, others=ANYTHING)


class RunFolder:
    """Writes a run: `config.json`, `metrics.jsonl`, `model.safetensors`, `best.safetensors`, `summary.json`, `curves.png`.

    With `resume` everything that is there stays. A run that is to be written over (`overwrite`) stays until `settle`: before
    that all is written to a folder inside, `at`, which `discard` removes. Every file but the growing `metrics.jsonl` is written
    beside its name and renamed, so that it is whole or not there. What others delete or change meanwhile is written again, and
    `warn` told.

    `heads`: whether those of hidden stages are kept in the model file. `lock`, if it is taken already. Raises InputError where
    the folder is in use, holds a run already (unless `overwrite`), cannot be written, or has no space.
    """

    def __init__(
        self,
        path: str | Path,
        overwrite: bool = False,
        resume: bool = False,
        heads: bool = True,
        warn: Callable[[str], None] | None = None,
        lock: FolderLock | None = None,
    ) -> None:
        self.path, self.heads, self.warn = Path(path).expanduser(), heads, warn or (lambda line: None)
        self._made = not self.path.exists()
        with _named(self.path, "create the output folder"):
            self.path.mkdir(parents=True, exist_ok=True)
        self.lock = lock or FolderLock(self.path)
        try:
            there = [] if resume else self.check(path, overwrite)
            with _named(self.path, "tidy"):
                self._tidy()
                self.at = self.path / _NEW if there else self.path
                self.at.mkdir(exist_ok=True)
        except InputError:
            self.lock.release()
            raise
        self.config = ""
        self.lines: list[str] = []  # of metrics.jsonl

    @staticmethod
    def check(path: str | Path, overwrite: bool = False) -> list[str]:
        """What a run has left there already. Raises InputError where there is anything, unless `overwrite`."""
        path = Path(path).expanduser()
        if path.exists() and not path.is_dir():
            raise InputError(f"output folder {str(path)!r} is a file; choose another with --output-dir")
        there = [name for name in (*_NAMES, CHECKPOINTS) if os.path.lexists(path / name)]
        if there and not overwrite:
            if CHECKPOINTS in there:
                raise InputError(
                    f"output folder {str(path)!r} holds checkpoints; go on with --resume auto, choose another, or --overwrite"
                )
            raise InputError(f"output folder {str(path)!r} holds a run already ({there[0]}); choose another, or --overwrite")
        return there

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.at / CHECKPOINTS

    def _tidy(self) -> None:
        """Remove what a run that was killed has left half written."""
        for name in _NAMES:
            for left in self.path.glob(f".{name}.*.tmp"):
                left.unlink()
        shutil.rmtree(self.path / _NEW, ignore_errors=True)

    def settle(self) -> None:
        """Put the new run in the place of the old one, now that there is something of it. As long as there is no `config.json`,
        the folder is a run to nobody."""
        if self.settled:
            return
        with _named(self.path, "write over"):
            for name in ("config.json", *_NAMES):
                (self.path / name).unlink(missing_ok=True)
            for name in (CHECKPOINTS, EVENTS):
                if (self.path / name).exists():
                    shutil.rmtree(self.path / name)
            for name in (CHECKPOINTS, *reversed(_NAMES)):
                if (self.at / name).exists():
                    (self.at / name).rename(self.path / name)
            self.discard()

    @property
    def settled(self) -> bool:
        """Whether the run is in its place, and the one before it gone."""
        return self.at == self.path

    def discard(self) -> None:
        """Leave the old run where it is, if it is there still, and nothing where nothing was."""
        if not self.settled:
            shutil.rmtree(self.at)
            self.at = self.path
        if self._made:
            with contextlib.suppress(OSError):  # it holds something
                self.path.rmdir()

    def require_space(self, model: nn.Module, files: int = 1) -> None:
        """Raise InputError where the disk has no room for two copies (old and new) of each model file, and small ones."""
        needed = 2 * files * sum(p.numel() * p.element_size() for p in model.parameters()) + _SPARE
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise InputError(
                f"output folder {str(self.path)!r} has {free:,} bytes free, but the run needs {needed:,}; "
                "free some space or choose another with --output-dir"
            )

    def write_config(self, content: dict) -> None:
        """Write `config.json`."""
        self.config = json_text(content, indent=2)
        self._write_text("config.json", self.config)

    def write_json(self, name: str, content: dict) -> None:
        """Write a JSON file; numbers that JSON has no word for (NaN, infinity) become null."""
        self._write_text(name, json_text(content, indent=2))

    def write_metrics(self, records: list[dict]) -> None:
        """Write `metrics.jsonl` anew: at a resumption, the records up to there."""
        self.lines = [json_text(record) for record in records]
        self._write_text("metrics.jsonl", "".join(self.lines))

    def keep(self, record: dict, model: nn.Module, best: bool = False) -> None:
        """Add a line to `metrics.jsonl` and write the model, also as the `best` one: an evaluation is there to stay."""
        self.mend()
        path = self.at / "metrics.jsonl"
        with _named(path, "write"):
            before = path.stat().st_size if path.exists() else 0
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json_text(record))
            except OSError:  # on a full disk, half a line
                os.truncate(path, before)
                raise
            self.lines.append(json_text(record))
        self.save_model(model)
        if best:
            self.save_model(model, BEST)
        self.settle()

    def mend(self, model: nn.Module | None = None) -> None:
        """Write again what is not as this run wrote it. With the last evaluation's `model` all is looked at, to the end."""
        with _named(self.at, "create"):
            self.at.mkdir(parents=True, exist_ok=True)
        self.lock.hold()
        texts, lost = {"config.json": [self.config], "metrics.jsonl": self.lines}, []
        for name, lines in texts.items():
            path = self.at / name
            with _named(path, "read"):
                there = path.stat().st_size if path.is_file() else 0
                same = there == sum(map(len, lines))  # JSON's own text has one byte a character
                if not same or (model is not None and there and path.read_text(encoding="utf-8") != "".join(lines)):
                    lost.append(name)
                    self._write_text(name, "".join(lines))
        if model is not None and not (self.at / "model.safetensors").is_file():
            lost.append("model.safetensors")
            self.save_model(model)
        if lost:
            self.warn(f"{' and '.join(lost)} in {str(self.path)!r} was deleted or changed while the run went on; written again")

    def go_back(self, snapshot: Snapshot) -> None:
        """Have the records and the best model of a checkpoint, those of later epochs not."""
        self.write_metrics(snapshot.state["history"])
        with _named(self.at / BEST, "remove"):
            (self.at / BEST).unlink(missing_ok=True)
        if snapshot.best is not None:
            self._replace(BEST, lambda path: shutil.copyfile(snapshot.best, path))

    def save_model(self, model: nn.Module, name: str = "model.safetensors") -> None:
        """Write the parameters and buffers as safetensors."""
        found = {name: tensor for name, tensor in model.state_dict().items() if self.heads or not name.startswith("heads.")}
        self._replace(name, lambda path: save_tensors(found, path, {"format": "pt"}))

    def draw(self, title: str, x_label: str, y_label: str, curves: dict[str, Curve]) -> None:
        """Write `curves.png`."""
        self._replace("curves.png", lambda path: draw_curves(path, title, x_label, y_label, curves))

    def _write_text(self, name: str, text: str) -> None:
        self._replace(name, lambda path: path.write_text(text, encoding="utf-8"))

    def _replace(self, name: str, write: Callable[[Path], object]) -> None:
        replace_file(self.at / name, write)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file by `write`, which gets another name for it, appear whole or not at all. Raises InputError where it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _named(path, "write"):
        try:
            write(temporary)
            if temporary.exists():
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class _named:
    """Turn an error of the operating system inside into an InputError that names the file and what could not be done."""

    def __init__(self, path: Path, action: str) -> None:
        self.path, self.action = path, action

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | SafetensorError):
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            reason = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
            raise InputError(f"cannot {self.action} {str(self.path)!r}: {reason}") from None


def json_text(content: dict, indent: int | None = None) -> str:
    """A line, or lines, of JSON; numbers that it has no word for (NaN, infinity) become null."""
    return json.dumps(_plain(content), indent=indent, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    """JSON's own types: NaN and infinity are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# --- reading back -----------------------------------------------------------------------------------------------------


def read_json(folder: Path, name: str) -> dict:
    """A JSON object from a run's folder. Raises InputError where the folder or file is missing or not a run's."""
    if not folder.is_dir():
        raise InputError(f"run folder {str(folder)!r} does not exist")
    if not os.path.lexists(folder / name):
        raise InputError(f"{str(folder)!r} is not a finished run: it has no {name}")
    return read_object(folder / name)


def read_config(folder: Path) -> dict:
    """A run's `config.json`, in which everything is as `CONFIG` says. Raises InputError."""
    config = read_json(folder, "config.json")
    check(CONFIG, config, f"{str(folder / 'config.json')!r}: it")
    return config


def model_file(folder: Path, which: str | None = None) -> tuple[str, Path]:
    """A run's `best` or `last` model (default: best, where there is one): which it is, and its file.

    Raises InputError for another word, or where there is no best one.
    """
    best = os.path.lexists(folder / BEST)
    which = check_word("which", which or ("best" if best else "last"), WHICH)
    if which == "best" and not best:
        raise InputError(f"{str(folder)!r} has no {BEST}; take the last model, or train with --keep-best")
    return which, folder / MODEL_FILES[which]


def build_network(config: dict) -> Sequential:
    """The network of a description (see `models.build`), its tensors without memory. Raises InputError."""
    with torch.device("meta"):
        return build(config)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a model file. Raises InputError where it is none."""
    check_tensors(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the model {str(path)!r}: {short(str(error), 200)[1:-1]}") from None


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill a network from safetensors, after every name, shape and type has been checked. Raises InputError."""
    expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    check_tensors(path)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            found = {name: one.get_shape() for name, one in slices.items()}
            types = {name: one.get_dtype() for name, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the model {str(path)!r}: {short(str(error), 200)[1:-1]}") from None
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            needed = f"shape {found.get(name)}, the network needs {expected.get(name)}"
            raise InputError(f"model {str(path)!r}: tensor {short(name)} has {needed}")
    for name, tensor in network.state_dict().items():
        allowed = _TYPES if tensor.is_floating_point() else ("I64",)  # a count of batches
        if types[name] not in allowed:
            raise InputError(f"model {str(path)!r}: tensor {name!r} has type {types[name]}; allowed: {', '.join(allowed)}")
    network.load_state_dict(load_file(path), assign=True)
