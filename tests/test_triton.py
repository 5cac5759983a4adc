"""The Triton kernels without a GPU: in Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("file", ["test_bench.py", "test_selfcheck.py", "test_triton_ops.py", "test_triton_training.py"])
def test_in_the_interpreter(file: str) -> None:
    """The interpreter has to be chosen before triton is imported, so the tests run in a process of their own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests" / "interpreted" / file)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def check_compiled(architecture: str) -> None:
    from bench.kernel_report import SHARED_LIMIT, cases, fits, report

    for case in (case for case in cases() if fits(case, architecture)):
        row = report(case, architecture)
        told = f"{case.name} {case.dtype} for {architecture}: {row}"
        assert row["shared_bytes"] <= SHARED_LIMIT[architecture] * 1024, told
        if architecture.startswith("sm_"):
            assert row["stack"] <= (8 if case.generated else 0), told  # no spilled registers; one for entries that are made
            assert row["local"] == 0, told
        rows_of_product = case.size[0] if case.kernel == "step_small" else case.tile.blocks[0]
        if architecture == "sm_90" and case.dtype != "fp32" and rows_of_product >= 64:  # what Hopper's instruction takes
            assert row["tensor_core"] == "wgmma.mma_async", told


@needs_triton
def test_every_tile_compiles_for_hopper() -> None:
    check_compiled("sm_90")


@needs_triton
def test_sizes_of_one_compile() -> None:
    """A launch turns a size of 1 into a constant, which has not every method of a number in a register."""
    from bench.kernel_report import ARCHITECTURES, cases, compile_case

    smallest = {case.kernel: case for case in reversed(cases()) if case.dtype == "fp32"}
    assert len(smallest) == 5
    for case in smallest.values():
        compile_case(case, ARCHITECTURES["sm_90"], ones=True)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx942"])
def test_every_tile_compiles(architecture: str) -> None:
    check_compiled(architecture)


@needs_triton
def test_the_tables_cover_what_the_choosers_return() -> None:
    from f3triton.kernels.gpu import tiles

    from bench.kernel_report import cases

    compiled = {case.tile for case in cases()}
    for rows, outputs in ((1, 1), (16, 4096), (17, 33), (200, 5000), (4096, 300), (5000, 5000)):
        for half, roomy in itertools.product((True, False), repeat=2):
            assert tiles.forward_tile(rows, outputs, half, roomy) in compiled
            assert {tiles.update_tile(outputs, rows, half, moments, roomy) for moments in (0, 1, 2)} <= compiled
    assert {tiles.step_tile(rows)[1] for rows in range(1, tiles.STEP_ROWS + 1)} <= compiled


@needs_triton
def test_the_triton_backend_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from f3triton.kernels.dispatch import backend

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device, got 'cpu'; set TRITON_INTERPRET=1"):
        backend("triton", torch.device("cpu"))
