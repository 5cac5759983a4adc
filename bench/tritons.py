"""The versions of Triton that the kernels are compiled with, each in a folder of its own.

    python -m bench.tritons FOLDER      install those that are missing, without their dependencies: about a gigabyte each

With `F3TRITON_TRITONS=FOLDER` the tests find them there. Any torch will do for compiling, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

# Triton: the releases of torch whose ordinary build for Linux requires it
SUPPORTED = {"3.6.0": ("2.11.0",), "3.7.1": ("2.12.1", "2.13.0"), "3.8.0": ("2.14.1",), "3.9.0": ("2.15.0",)}


def folder_of(version: str, folder: Path) -> Path:
    return folder / f"triton-{version}"


def environment(version: str, folder: Path) -> dict[str, str]:
    """The environment of a process that imports this version of Triton."""
    paths = [str(folder_of(version, folder)), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def install(version: str, folder: Path) -> None:
    """Install a version whole or not at all."""
    target = folder_of(version, folder)
    if target.exists():
        return
    partial = target.with_name(f"{target.name}.partial")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps", "--target", str(partial)]
    subprocess.run([*command, f"triton=={version}"], check=True)
    partial.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    for version in SUPPORTED:
        install(version, folder)


if __name__ == "__main__":
    main()
