"""Decoded images kept on disk, so that a data set is decoded once and not once a run.

Best effort: a cache that cannot be written or read is as good as none. The folder is `$F3TRITON_CACHE`, or
`~/.cache/f3triton`; deleting it is always safe.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from torch import Tensor

MAX_SHARE_OF_FREE_SPACE = 0.1


def folder() -> Path:
    """Where decoded images are kept."""
    return Path(os.environ.get("F3TRITON_CACHE") or Path("~/.cache/f3triton").expanduser())


def read(key: str, rows: int) -> Tensor | None:
    """The uint8 tensor [rows, C, H, W] kept under `key`, or None."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(folder() / f"{key}.safetensors"), framework="pt") as file:
            # A copy: the tensor as opened is a view of the file, and would follow its fate.
            pixels = file.get_tensor("pixels").clone()
            intact = (file.metadata() or {}).get("checksum") == _checksum(pixels)
    except (OSError, RuntimeError, ValueError, SafetensorError):
        return None
    return pixels if intact and pixels.dtype == torch.uint8 and pixels.ndim == 4 and len(pixels) == rows else None


def write(key: str, pixels: Tensor) -> None:
    """Keep a contiguous uint8 tensor under `key`, unless the disk is nearly full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = None
    try:
        folder().mkdir(parents=True, exist_ok=True)
        if pixels.numel() > MAX_SHARE_OF_FREE_SPACE * shutil.disk_usage(folder()).free:
            return
        handle, temporary = tempfile.mkstemp(dir=folder(), suffix=".tmp")
        os.close(handle)
        save_file({"pixels": pixels}, temporary, metadata={"checksum": _checksum(pixels)})
        os.replace(temporary, folder() / f"{key}.safetensors")
        temporary = None
    except (OSError, RuntimeError, SafetensorError):
        pass
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _checksum(pixels: Tensor) -> str:
    return hashlib.blake2b(pixels.numpy().data, digest_size=16).hexdigest()
