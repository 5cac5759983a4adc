"""The folder for Hugging Face's Kernel Hub: written, and used where f3triton cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"cwd": ROOT, "capture_output": True, "text": True}
# What a user runs; `kernel` is the loaded package.
STEP = """
import sys, torch
sys.modules["f3triton"] = None  # cannot be imported
{load}
def run(ops):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(7, 5), torch.randn(4, 5), torch.zeros(4)
    error, feedback, rule = torch.randn(7, 3), torch.randn(3, 4), kernel.AdamW(lr=0.1)
    states = kernel.new_state(weight, rule, 0), kernel.new_state(bias, rule, 1)
    h = ops.linear_step_(x, weight, bias, error, feedback, *states, kernel.Update(rule, 0.1, 1), "tanh")
    return h, weight, bias, *states[0].moments
for ours, specified in zip(run(kernel.library), run(kernel.reference), strict=True):
    torch.testing.assert_close(ours, specified)
assert hasattr(torch.ops, kernel.library.NAMESPACE)
assert kernel.dispatch.choose("auto", torch.device("cpu")).operations is kernel.eager
from importlib import import_module
import_module(f"{{kernel.library.__package__}}.gpu.tiles")
print(kernel.library.NAMESPACE)
"""
BY_LIBRARY = "import kernels, pathlib; kernel = kernels.get_local_kernel(pathlib.Path({folder!r}))"
BY_HAND = """
import importlib.util
spec = importlib.util.spec_from_file_location("loaded_by_hand", {file!r})
kernel = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
"""


def python(code: str, elsewhere: Path) -> subprocess.CompletedProcess[str]:
    """Runs where this repository's own `kernels/` does not stand in the way of the library of that name."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = os.pathsep.join(path for path in paths if path and Path(path).resolve() != ROOT)
    environment = {**os.environ, "PYTHONPATH": others, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "f3triton.kernels.package", str(folder)]
    done = subprocess.run(command, env=environment, **SETTINGS)
    assert done.returncode == 0, done.stderr
    again = subprocess.run(command, env=environment, **SETTINGS)
    assert again.returncode == 2
    assert "torch-universal exists; remove it" in again.stderr
    assert "Traceback" not in again.stderr
    assert [path.name for path in (folder / "build").iterdir()] == ["torch-universal"]
    return folder


@pytest.mark.parametrize("place", ["__init__.py", "f3triton/__init__.py"])
def test_the_folder_is_a_package_of_its_own(folder: Path, tmp_path: Path, place: str) -> None:
    file = folder / "build" / "torch-universal" / place
    done = python(STEP.format(load=BY_HAND.format(file=str(file))), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("loaded_by_hand")


def test_the_hubs_library_loads_it(folder: Path, tmp_path: Path) -> None:
    found = python("import kernels; print(kernels.get_local_kernel)", tmp_path)
    if found.returncode != 0:
        pytest.skip("the kernels library of Hugging Face is not installed: pip install kernels")
    done = python(STEP.format(load=BY_LIBRARY.format(folder=str(folder))), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("_f3triton_")  # the id of the kernel is the namespace of its operators
