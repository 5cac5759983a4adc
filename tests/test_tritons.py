"""Every kernel compiles, and spills nothing, with every Triton that a supported torch brings. Needs no GPU.

The versions are in the folder that F3TRITON_TRITONS names: `python -m bench.tritons FOLDER` installs them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import tritons  # noqa: E402

FOLDER = os.environ.get("F3TRITON_TRITONS")
pytestmark = [
    pytest.mark.skipif(FOLDER is None, reason="F3TRITON_TRITONS is not set: see bench/tritons.py"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def check(version: str, architectures: list[str], tmp_path: Path) -> None:
    from bench.kernel_report import SHARED_LIMIT, cases, fits

    if not tritons.folder_of(version, Path(FOLDER)).is_dir():
        pytest.skip(f"there is no Triton {version} in F3TRITON_TRITONS")
    output = tmp_path / "report.json"
    command = [sys.executable, "-m", "bench.kernel_report", "--brief", "--arch", *architectures, "--output", str(output)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=tritons.environment(version, Path(FOLDER)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    content = json.loads(output.read_text())
    assert content["versions"]["triton"] == version
    rows = content["rows"]
    assert len(rows) == sum(fits(case, architecture) for case in cases() for architecture in architectures)
    for row in rows:
        assert row["shared_bytes"] <= SHARED_LIMIT[row["arch"]] * 1024, row
        if row["arch"].startswith("sm_"):
            assert (row["stack"], row["local"]) == (0, 0), row  # no spilled registers


@pytest.mark.parametrize("version", tritons.SUPPORTED)
def test_every_kernel_compiles_for_hopper(version: str, tmp_path: Path) -> None:
    check(version, ["sm_90"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("version", tritons.SUPPORTED)
def test_every_kernel_compiles_for_all_architectures(version: str, tmp_path: Path) -> None:
    from bench.kernel_report import ARCHITECTURES

    check(version, list(ARCHITECTURES), tmp_path)
