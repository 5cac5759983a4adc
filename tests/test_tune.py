"""The choice of a backend: by rule, by what was measured, and never by a file that is damaged. No GPU: its name is made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from f3triton.kernels import dispatch, eager, times, tune
from f3triton.kernels.times import Work

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda")
STEP = Work("step", 50, 784, 500)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of that name, whose kernels are right, and an empty cache."""
    pytest.importorskip("triton")
    monkeypatch.setenv("F3TRITON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(dispatch, "_fault", lambda device, precision: None)


def table(torch_seconds: float, triton_seconds: float, *work: Work, precision: str = "float32") -> times.Table:
    return {one.key(precision): {"torch": torch_seconds, "triton": triton_seconds} for one in work}


@pytest.mark.parametrize(
    ("precision", "rows", "backend"),
    [("float32", 64, "triton"), ("float32", 65, "torch"), ("tf32", 4096, "triton"), ("bfloat16", 4096, "triton")],
)
def test_by_rule_where_nothing_was_measured(precision: str, rows: int, backend: str) -> None:
    choice = dispatch.choose("auto", GPU, precision, [Work("step", rows, 784, 500), Work("update", 10, 500, 10)])
    assert choice.backend == backend
    assert (choice.operations is eager) == (backend == "torch")
    assert str(choice).startswith(f"backend {backend}: {precision} ")
    assert str(choice).endswith("(a rule; python -m f3triton.kernels.tune measures)")


def test_what_was_measured_goes_before_the_rule() -> None:
    small, large = STEP, Work("step", 4096, 784, 500)
    times.write(GPU, table(1e-5, 2e-5, small) | table(3e-3, 1e-3, large))
    choice = dispatch.choose("auto", GPU, "float32", [small])
    assert choice.operations is eager
    told = "backend torch: a step's products and updates take 10.0 us by it and 20.0 us by triton, measured on this device"
    assert str(choice) == told
    assert dispatch.choose("auto", GPU, "float32", [large]).backend == "triton"
    assert dispatch.choose("auto", GPU, "float32", [small, large]).backend == "triton"  # the sum of both
    assert dispatch.choose("auto", GPU, "float32", [Work("step", 60, 800, 510)]).backend == "torch"  # as small as `small`


def test_only_what_was_measured_in_the_same_circumstances_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times.write(GPU, table(1e-5, 2e-5, STEP))
    assert times.measured(GPU, "float32", [STEP]) == {"torch": 1e-5, "triton": 2e-5}
    assert times.measured(GPU, "float32", []) is None
    assert times.measured(GPU, "tf32", [STEP]) is None
    for other in (Work("update", 50, 784, 500), Work("step", 65, 784, 500), Work("step", 50, 784, 513)):
        assert times.measured(GPU, "float32", [STEP, other]) is None
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert times.measured(GPU, "float32", [STEP]) is None


def test_tables_of_other_gpus_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    times.write(GPU, table(1e-5, 2e-5, STEP))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    times.write(GPU, table(5e-5, 4e-5, STEP))
    assert times.measured(GPU, "float32", [STEP]) == {"torch": 5e-5, "triton": 4e-5}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert times.measured(GPU, "float32", [STEP]) == {"torch": 1e-5, "triton": 2e-5}


def with_seconds(seconds: object) -> bytes:
    return json.dumps({"format": times.FORMAT, "tables": {times.circumstances(GPU): {STEP.key("float32"): seconds}}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        lambda: b"",
        lambda: b"\xff\xfe",
        lambda: b'{"format": 1, "tables": {',
        lambda: b"[" * 100_000,
        lambda: b'["another program\'s"]',
        lambda: b'{"format": 1}',
        lambda: b'{"format": 1, "tables": []}',
        lambda: b'{"format": 1, "tables": {"Some GPU": 3}}',
        lambda: with_seconds({"torch": 1e-5, "triton": 2e-5}).replace(b'"format": 1', b'"format": 2'),
        lambda: with_seconds({"torch": 1e-5}),
        lambda: with_seconds({"torch": 1e-5, "triton": "fast"}),
        lambda: with_seconds({"torch": 1e-5, "triton": True}),
        lambda: with_seconds({"torch": 1e-5, "triton": -2e-5}),
        lambda: with_seconds({"torch": 1e-5, "triton": float("nan")}),
        lambda: with_seconds([1e-5, 2e-5]),
        lambda: with_seconds({"torch": 1e-5, "triton": 2e-5}) + b" " * times.LARGEST,
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning(content: object) -> None:
    times.write(GPU, table(1e-5, 2e-5, STEP))
    times.place().write_bytes(content())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert dispatch.choose("auto", GPU, "float32", [STEP]).backend == "triton"  # the rule's
    assert len(told) == 1
    assert f"{times.place()} is ignored, it is damaged or not a table" in str(told[0].message)
    assert "\n" not in str(told[0].message)
    with pytest.warns(UserWarning, match="is ignored"):
        times.write(GPU, table(1e-5, 2e-5, STEP))  # takes its place
    assert times.measured(GPU, "float32", [STEP]) == {"torch": 1e-5, "triton": 2e-5}


def test_a_folder_in_the_place_of_the_file_is_ignored() -> None:
    times.place().mkdir(parents=True)
    with pytest.warns(UserWarning, match="is ignored"):
        assert times.measured(GPU, "float32", [STEP]) is None


def test_a_write_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = times.write(GPU, table(1e-5, 2e-5, STEP))
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        times.write(GPU, table(2e-5, 1e-5, STEP))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("precision", dispatch.PRODUCTS)
@pytest.mark.parametrize("operation", tune.OPERATIONS)
def test_candidates_run_on_scratch_copies(precision: str, operation: str) -> None:
    """Every candidate has tensors of its own, of the same values, and leaves its weights as they were."""
    work, cpu = Work(operation, 5, 8, 6), torch.device("cpu")
    one, other = (tune.prepare(work, eager, precision, cpu) for _ in range(2))

    def tensors(call: object) -> list[torch.Tensor]:
        return [value for value in call.args if isinstance(value, torch.Tensor)]

    before = [tensor.clone() for tensor in tensors(one)]
    assert len(before) >= 3
    for _ in range(3):
        one()
    for was, ours, theirs in zip(before, tensors(one), tensors(other), strict=True):
        assert torch.equal(ours, was)
        assert torch.equal(theirs, was)
        assert ours.data_ptr() != theirs.data_ptr()


def test_the_median_of_rounds_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    ran, seconds = [], iter([1e-5, 9e-5, 3e-5, 7e-5, 2e-5, 8e-5])

    def timer(call: object) -> float:
        ran.append(call.func)
        return next(seconds)

    work, cpu = Work("forward", 5, 8, 6), torch.device("cpu")
    found = tune.measure([work], {"torch": eager, "triton": dispatch.eager}, "float32", cpu, timer)
    assert found == {"forward float32 8x8x8": {"torch": 2e-5, "triton": 8e-5}}
    assert len(ran) == 6
    assert capsys.readouterr().out == "forward float32, 5 x 8 -> 6: torch 20.0 us, triton 80.0 us\n"


def test_kernels_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dispatch, "_fault", lambda device, precision: "gives wrong results on this device (wrong weight)")
    with pytest.raises(SystemExit, match="1"):
        tune.main([], GPU)
    wanted = "backend 'triton' gives wrong results on this device (wrong weight); use backend 'torch'"
    assert capsys.readouterr().err == f"f3triton.kernels.tune: error: {wanted}\n"
    assert not times.place().exists()


@pytest.mark.parametrize("arguments", [["--sizes", "5"], ["--sizes", "5", "0"], ["--sizes", "5", "4", "--batch-size", "0"]])
def test_sizes_that_make_no_layer_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.main(arguments, GPU)
    assert "--sizes needs two or more sizes of at least 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_it_says_that_it_needs_a_gpu() -> None:
    result = subprocess.run([sys.executable, "-m", "f3triton.kernels.tune"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "f3triton.kernels.tune: error: needs a CUDA or ROCm device, and this machine has none\n"
    assert result.stdout == ""


def test_the_whole_of_it_in_the_interpreter() -> None:
    """Each operation through the Triton kernels, kept in the file; a backend that is called takes the time it is given."""
    program = (
        "import torch\n"
        "from f3triton.kernels import eager, tune\n"
        "def timer(call):\n"
        "    call()\n"
        "    return 2e-5 if getattr(eager, call.func.__name__) is call.func else 1e-5\n"
        "tune.main(['--sizes', '9', '6', '4', '6', '4', '--batch-size', '5'], torch.device('cpu'), timer)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    tables = times.read()
    assert list(tables) == [times.circumstances(torch.device("cpu"))]
    shapes = ("8x16x8", "8x8x4", "8x4x8")
    wanted = {f"{operation} float32 {shape}" for operation in tune.OPERATIONS for shape in shapes}
    assert tables[times.circumstances(torch.device("cpu"))] == {key: {"torch": 2e-5, "triton": 1e-5} for key in wanted}
    assert result.stdout.count("step float32, 5 x 6 -> 4: torch 20.0 us, triton 10.0 us\n") == 1  # it is there twice
    assert result.stdout.splitlines()[-1].startswith(f"kept in {times.place()} for cpu, torch {torch.__version__}, triton ")
