"""What only a GPU can show: graphs, tensors beyond 2^31 elements, and memory errors. Run by `pytest -m gpu`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import f3triton as f3

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]


def train(graph: str, **settings: object) -> f3.Trainer:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(230, 9, generator=generator)
    y = (x @ torch.randn(9, 4, generator=generator)).argmax(-1)
    torch.manual_seed(1)
    model = f3.models.MLP([9, 20, 17, 4])
    trainer = f3.Trainer(model, optimizer=f3.Adam(lr=0.01), batch_size=20, device="cuda", cuda_graph=graph, **settings)
    trainer.fit((x, y), 4, (x, y))
    return trainer


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "settings", [{}, {"method": "dfa"}, {"method": "drtp"}, {"precision": "bfloat16"}, {"clip_norm": 0.05}], ids=str
)
def test_a_graph_gives_the_same_run(backend: str, settings: dict) -> None:
    plain, graphed = (train(graph, backend=backend, **settings) for graph in ("off", "on"))
    for one, other in zip(plain.model.parameters(), graphed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    again = train("on", backend=backend, **settings)
    for one, other in zip(again.model.parameters(), graphed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [([9, 20, 4], {}), ([9, 20, 17, 30, 4], {"method": "drtp"}), ([784, 500, 500, 500, 4], {"optimizer": f3.SGD(lr=0.01)})],
    ids=str,
)
def test_steps_in_one_launch_give_the_same_run(sizes: list[int], settings: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(930, sizes[0], generator=generator)
    y = (x[:, :9] @ torch.randn(9, 4, generator=generator)).argmax(-1)

    def run(**how: str) -> f3.Trainer:
        torch.manual_seed(1)
        model, settings_of_all = f3.models.MLP(sizes), {"optimizer": f3.Adam(lr=0.001), "batch_size": 50, "backend": "triton"}
        trainer = f3.Trainer(model, device="cuda", **{**settings_of_all, **settings, **how})
        trainer.fit((x, y), 4, (x, y))
        return trainer

    launched, again, graphed = run(epoch_launch="on"), run(epoch_launch="on"), run(epoch_launch="off", cuda_graph="on")
    for one, other, twice in zip(*(trainer.model.parameters() for trainer in (launched, graphed, again)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert torch.equal(one, twice)
    assert launched.result.history[-1]["test_loss"] == pytest.approx(graphed.result.history[-1]["test_loss"], rel=1e-3)


def test_the_kernels_pass_their_check_on_this_device() -> None:
    from f3triton.kernels import dispatch

    for precision in ("float32", "tf32", "bfloat16", "float16", "bfloat16-weights"):
        assert dispatch.backend("triton", torch.device("cuda", 0), precision) is not None


def test_more_than_two_to_the_31_elements() -> None:
    """A weight of 2^31 + 2^16 elements; its last rows are those that 32-bit offsets would miss."""
    from f3triton.kernels import SGD, State, Update
    from f3triton.kernels.gpu import ops as triton_ops

    inputs = 1 << 16
    outputs = (1 << 15) + 1
    needed = 3 * 4 * inputs * outputs
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    x = torch.zeros(16, inputs, device="cuda")
    x[:, -1] = 1
    weight = torch.zeros(outputs, inputs, device="cuda")
    weight[-1, -1] = 3
    error, feedback = torch.ones(16, 2, device="cuda"), torch.zeros(2, outputs, device="cuda")
    feedback[:, -1] = 1
    h = triton_ops.linear_step_(x, weight, None, error, feedback, State(()), None, Update(SGD(), 0.5, 1))
    assert torch.equal(h[:, -1], torch.full((16,), 3.0, device="cuda"))
    assert float(weight[-1, -1]) == 3 - 0.5 * 16 * 2
    assert int(weight.count_nonzero()) == 1


@pytest.mark.slow
def test_compute_sanitizer_finds_nothing() -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.skip("compute-sanitizer is not installed")
    tests = str(ROOT / "tests" / "interpreted" / "test_triton_ops.py")
    command = [
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-k",
        "forward or three_steps",
        tests,
    ]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
