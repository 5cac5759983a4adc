"""The Triton kernels without a GPU: in Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.common import read_result  # noqa: E402
from bench.report import fullest  # noqa: E402

COMMITTED = {row["case"]: row for row in read_result("kernels-compiled.json")["rows"] if row["arch"] == "sm_90"}
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


@needs_triton
def test_the_committed_report_has_every_case_with_its_tile() -> None:
    from bench.kernel_report import cases, launch_of

    assert {name: row["tile"] for name, row in COMMITTED.items()} == {case.name: launch_of(case).tile for case in cases()}


def compile_for_hopper(names: Iterable[str]) -> None:
    """Nothing spills, and nothing takes more registers than the committed report says.

    Registers are those of one Triton and its ptxas: with another, only that nothing spills.
    """
    from bench.kernel_report import SHARED_LIMIT, cases, report

    names = set(names)
    wanted = [case for case in cases() if case.name in names]
    assert len(wanted) == len(names) > 0
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), get_context("spawn")) as pool:
        for row in pool.map(report, wanted, ["sm_90"] * len(wanted), [False] * len(wanted)):
            assert "failed" not in row, row
            assert row["shared_bytes"] <= SHARED_LIMIT["sm_90"] * 1024, row
            assert (row["stack"], row["local"]) == (0, 0), row  # no spilled registers
            committed = COMMITTED[row["case"]]
            assert row["reg"] <= committed["reg"] or row["triton"] != committed["triton"], (row, committed["reg"])


@needs_triton
def test_the_fullest_kernels_compile_for_hopper() -> None:
    """Of each kernel, tile and type the case that is nearest to spilling; a seventh of the time of all of them."""
    compile_for_hopper(row["case"] for row in fullest())


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_for_hopper() -> None:
    compile_for_hopper(COMMITTED)


@needs_triton
def test_large_products_use_hoppers_tensor_cores() -> None:
    from bench.kernel_report import Case, report

    for case in (Case("forward", (4096, 500, 500, 10), "bf16"), Case("update", (4096, 4100, 4100, 1), "bf16", roomy=True)):
        assert report(case, "sm_90")["tensor_core"] == "wgmma.mma_async"


@needs_triton
@pytest.mark.parametrize("operation", ["forward", "update"])
def test_a_size_of_500_is_compiled_as_one_of_512_is(operation: str) -> None:
    """Whole copies of 16 bytes: a row of 500 float32 numbers has them, though 500 is no multiple of 16."""
    from bench.kernel_report import Case, report, twin

    case = Case(operation, (256, 500, 500, 10 if operation == "forward" else 1))
    here, there = report(case, "sm_90"), report(twin(case), "sm_90")
    assert here["reg"] <= 1.1 * there["reg"], (here, there)
    assert here["accesses"] <= 1.1 * there["accesses"], (here, there)


@needs_triton
def test_the_report_has_every_tile_of_the_tables() -> None:
    from bench.kernel_report import cases, launch_of
    from f3triton.kernels.gpu import tiles

    compiled = {launch_of(case).tile for case in cases()}
    for tile in [*tiles.FORWARD.values(), *tiles.UPDATE.values()]:
        slices = f" {tile.slices} slices" if tile.slices > 1 else ""
        assert f"{'x'.join(map(str, tile.blocks))} {tile.warps}w {tile.stages}s{slices}" in compiled
    for rows, outputs in ((1, 1), (16, 4096), (17, 33), (200, 5000), (4096, 300), (5000, 5000)):
        for half, roomy in itertools.product((True, False), repeat=2):
            assert tiles.forward_tile(rows, outputs, half, roomy) in tiles.FORWARD.values()
            for moments in (0, 1, 2):
                assert tiles.update_tile(rows, outputs, rows, half, moments, roomy) in tiles.UPDATE.values()


@needs_triton
def test_a_weight_that_is_short_one_way_has_tiles_by_its_shape() -> None:
    from f3triton.kernels.gpu import tiles

    small, medium = tiles.UPDATE["small"], tiles.UPDATE["medium"]
    for shape, wanted in (((10, 50_000), small), ((256, 4096), medium), ((4096, 256), medium), ((256, 256), small)):
        assert tiles.update_tile(50, *shape, multiprocessors=132) == wanted, shape


@needs_triton
def test_the_triton_backend_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from f3triton.kernels.dispatch import backend

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device, got 'cpu'; set TRITON_INTERPRET=1"):
        backend("triton", torch.device("cpu"))
