"""What `tune` has measured, in a file: seconds of an operation by backend, device, versions, precision and shape."""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

FORMAT = 1


LARGEST = 1 << 20  # bytes of a file that is read; a table has about a hundred for each operation


Table = dict[str, dict[str, float]]  # seconds by backend, by operation and shape


class Work(NamedTuple):
    """An operation on a linear layer: `forward`, `update`, `step` (both), or `backward` (the input's gradient, and update)."""

    operation: str
    rows: int
    inputs: int
    outputs: int

    def key(self, precision: str) -> str:
        """Its name in the table: sizes up to the next power of two behave alike."""
        sizes = "x".join(str(1 << (size - 1).bit_length()) for size in self[1:])
        return f"{self.operation} {precision} {sizes}"


def place() -> Path:
    """The file of the tables."""
    return Path(os.environ.get("F3TRITON_CACHE") or os.path.expanduser("~/.cache/f3triton")) / "tune.json"


def circumstances(device: torch.device) -> str:
    """What a measurement holds for: the device's name, and the versions of all that runs on it."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "none"

    own = [f"{package} {version(package)}" for package in ("triton", "f3triton")]
    runtime = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return ", ".join([name, f"torch {torch.__version__}", *own, runtime])


def read() -> dict[str, Table]:
    """All tables by circumstances; none, with a warning, where the file is not one of this program's."""
    path = place()
    try:
        if not path.exists():
            return {}
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise ValueError(f"not a file of at most {LARGEST} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        tables = content["tables"]
        for seconds in (seconds for table in tables.values() for seconds in table.values()):
            if set(seconds) != {"torch", "triton"} or not all(type(s) is float and 0 < s < math.inf for s in seconds.values()):
                raise ValueError("not times by backend")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"{path} is ignored, it is damaged or not a table of f3triton.kernels.tune: {error}", stacklevel=2)
        return {}
    return tables


def write(device: torch.device, table: Table) -> Path:
    """Add `table` to what is kept for the device, whole or not at all. Raises OSError where that cannot be."""
    tables, path = read(), place()
    tables.setdefault(circumstances(device), {}).update(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        try:
            json.dump({"format": FORMAT, "tables": tables}, file, indent=1)
            file.close()
            os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)
    return path


def measured(device: torch.device, precision: str, work: Iterable[Work]) -> dict[str, float] | None:
    """Seconds of all of `work` together by backend; None where there is none, or some of it has not been measured here."""
    keys = [one.key(precision) for one in work]
    table = read().get(circumstances(device), {}) if keys else {}
    if not keys or not table.keys() >= set(keys):
        return None
    return {backend: sum(table[key][backend] for key in keys) for backend in ("torch", "triton")}
