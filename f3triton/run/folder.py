"""A run's folder: what is written there, and how it is read back."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..base.exceptions import InputError
from ..base.files import read_object, size_of
from ..base.memory import available_memory
from ..base.schema import ANYTHING, Fields, Word, check
from ..base.text import readable_bytes, short
from ..data.preprocessing import PREPROCESSING
from ..kernels.reference import LOSSES
from ..models.build import NETWORK, build
from ..network.sequential import Sequential
from .curves import Curve, draw_curves

FORMAT = 1
_NAMES = ("config.json", "metrics.jsonl", "model.safetensors", "summary.json", "curves.png")
CHECKPOINTS = "checkpoints"
_SPARE = 4 << 20  # bytes for everything in a folder but the model
_TYPES = ("F32", "F64", "BF16")  # of a model's tensors: see `base.precision`
# What a run's configuration holds; `options` has what its options may be.
CONFIG = Fields({"loss": Word(LOSSES), "network": NETWORK, "preprocessing": PREPROCESSING}, others=ANYTHING)


class RunFolder:
    """Writes a run: `config.json`, `metrics.jsonl`, `model.safetensors`, `summary.json`, `curves.png`.

    `checkpoints` is where its checkpoints go. With `resume` everything that is there stays.

    Every file but the growing `metrics.jsonl` is written beside its name and renamed, so that it is whole or not there.
    Raises InputError where the folder holds a run already (unless `overwrite`), cannot be written, or has no space.
    """

    def __init__(self, path: str | Path, overwrite: bool = False, resume: bool = False) -> None:
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / CHECKPOINTS
        if resume:
            return
        there = self.check(path, overwrite)
        with _named(self.path, "create the output folder"):
            self.path.mkdir(parents=True, exist_ok=True)
        for name in there:
            with _named(self.path / name, "remove"):
                (self.path / name).unlink()
        with _named(self.checkpoints, "remove"):
            if self.checkpoints.is_dir():
                shutil.rmtree(self.checkpoints)

    @staticmethod
    def check(path: str | Path, overwrite: bool = False) -> list[str]:
        """The run's files that are there already. Raises InputError where there are any, unless `overwrite`."""
        path = Path(path).expanduser()
        if path.exists() and not path.is_dir():
            raise InputError(f"output folder {str(path)!r} is a file; choose another with --output-dir")
        there = [name for name in _NAMES if (path / name).exists()]
        if not overwrite and (path / CHECKPOINTS).exists():
            raise InputError(
                f"output folder {str(path)!r} holds checkpoints; go on with --resume auto, choose another, or --overwrite"
            )
        if there and not overwrite:
            raise InputError(f"output folder {str(path)!r} holds a run already ({there[0]}); choose another, or --overwrite")
        return there

    def require_space(self, model: nn.Module) -> None:
        """Raise InputError where the disk has no room for two copies of the model (old and new) and the small files."""
        needed = 2 * sum(p.numel() * p.element_size() for p in model.parameters()) + _SPARE
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise InputError(
                f"output folder {str(self.path)!r} has {free:,} bytes free, but the run needs {needed:,}; "
                "free some space or choose another with --output-dir"
            )

    def write_json(self, name: str, content: dict) -> None:
        """Write a JSON file; numbers that JSON has no word for (NaN, infinity) become null."""
        text = json.dumps(_plain(content), indent=2, allow_nan=False) + "\n"
        self._replace(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_metrics(self, records: list[dict]) -> None:
        """Write `metrics.jsonl` anew: at a resumption, the records up to there."""
        text = "".join(json.dumps(_plain(record), allow_nan=False) + "\n" for record in records)
        self._replace("metrics.jsonl", lambda path: path.write_text(text, encoding="utf-8"))

    def append_metrics(self, record: dict) -> None:
        """Add one line to `metrics.jsonl`."""
        path = self.path / "metrics.jsonl"
        with _named(path, "write"), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record), allow_nan=False) + "\n")

    def save_model(self, model: nn.Module, heads: bool = True) -> None:
        """Write the parameters and buffers as safetensors; of its hidden stages' heads only if `heads`."""
        found = {name: tensor for name, tensor in model.state_dict().items() if heads or not name.startswith("heads.")}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
        self._replace("model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))

    def draw(self, title: str, x_label: str, y_label: str, curves: dict[str, Curve]) -> None:
        """Write `curves.png`."""
        self._replace("curves.png", lambda path: draw_curves(path, title, x_label, y_label, curves))

    def _replace(self, name: str, write: Callable[[Path], object]) -> None:
        final = self.path / name
        temporary = self.path / f".{name}.{os.getpid()}.tmp"
        with _named(final, "write"):
            try:
                write(temporary)
                if temporary.exists():
                    temporary.replace(final)
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


def build_network(config: dict) -> Sequential:
    """The network of a description (see `models.build`), its tensors without memory. Raises InputError."""
    with torch.device("meta"):
        return build(config)


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill a network from safetensors, after every name, shape and type has been checked. Raises InputError."""
    expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    size, free = size_of(path), available_memory()
    if size > free:
        raise InputError(f"model {str(path)!r} has {size:,} bytes, and {readable_bytes(free)} of memory are free")
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
