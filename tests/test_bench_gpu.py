"""`python -m bench.gpu` as far as it goes without a GPU: its parts, what it writes, and that a failure hides nothing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import common, gpu, memory_child, memory_scaling, step, step_gpu, time_to_accuracy  # noqa: E402

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("quick", [False, True])
def test_every_benchmark_takes_its_arguments(
    quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A benchmark reads them first, and then says that it needs a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parts = gpu.parts(tmp_path, quick, tmp_path / "tests.xml")
    assert list(parts) == ["tests", "kernels", "tiles", "step", "memory"]
    for module, *arguments in [["bench.gpu", "--quick"], *list(parts.values())[1:]]:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(module).main()
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"{module}: error: needs a CUDA or ROCm device, and this machine has none\n"


@needs_triton
def test_the_tests_that_would_run(tmp_path: Path) -> None:
    """All of `test_gpu.py`, and the kernels' tests, which run in the interpreter where there is no GPU."""
    _, *arguments = gpu.parts(tmp_path, False, tmp_path / "tests.xml")["tests"]
    code = "import pytest, sys, torch; torch.cuda.is_available = lambda: True; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments, "--collect-only", "-q"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:]
    names = ("selfcheck", "triton_ops", "triton_training", "network_steps", "epoch_launch")
    kernels = {f"tests/interpreted/test_{name}.py" for name in names}
    assert {"tests/test_gpu.py"} | kernels <= {line.split(":")[0] for line in found.stdout.splitlines()}


def test_a_failing_part_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = "def test_good(): pass\ndef test_bad(): assert 0\n@pytest.mark.skip(reason='no room')\ndef test_none(): pass\n"
    (tmp_path / "test_some.py").write_text(f"import pytest\n{tests}")
    (tmp_path / "writes.py").write_text("import sys; open(sys.argv[1], 'w').write('{}')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def parts(output: Path, quick: bool, log: Path) -> dict[str, list[str]]:
        tests = ["pytest", "-p", "no:cacheprovider", "--junit-xml", str(log), str(tmp_path / "test_some.py")]
        return {"tests": tests, "missing": ["no_such_module"], "writes": ["writes", str(output / "written.json")]}

    monkeypatch.setattr(gpu, "parts", parts)
    assert gpu.run_all(tmp_path, True, 10, CPU) == ["tests", "missing"]
    assert (tmp_path / "written.json").exists()
    content = json.loads((tmp_path / "gpu.json").read_text())
    needed = {"benchmark", "command", "date", "processor", "vector_capability", "device", "versions", "settings"}
    assert needed <= content.keys()
    tests, missing, writes = content["rows"]
    assert (tests["exit_status"], tests["passed"]) == (1, 1)
    assert [name.split("::")[1] for name in tests["failed"]] == ["test_bad"]
    assert list(tests["skipped"].values()) == ["no room"]
    assert (missing["exit_status"], "no_such_module" in missing["last_lines"][-1]) == (1, True)
    assert (writes["exit_status"], "last_lines" in writes) == (0, False)


def test_a_part_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hangs.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpu.run(["hangs"], minutes=1 / 60)[0] == -signal.SIGKILL


def test_the_command_ends_with_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    monkeypatch.setattr(gpu, "run_all", lambda *arguments: asked.append(arguments) or ["step"])
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--quick", "--minutes", "3", "--output", str(tmp_path)])
    assert ended.value.code == "failed: step"
    assert asked == [(tmp_path, True, 3.0, torch.device("cuda"))]


def test_a_gpu_is_named_with_its_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.65.06\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    content = common.origin("bench.gpu", torch.device("cuda"))
    assert content["device"] == "cuda (Some GPU)"
    assert {"driver": "580.65.06", "cuda": "13.0"}.items() <= content["versions"].items()
    assert "cuda (Some GPU) (driver 580.65.06)" in common.where(content)
    monkeypatch.setenv("PATH", "")
    assert common.driver(torch.device("cuda"))["driver"] == "unknown"


def test_a_processor_is_named_with_its_vector_instructions() -> None:
    content = common.origin("bench.step")
    assert content["vector_capability"] == torch.backends.cpu.get_cpu_capability()
    assert content["vector_capability"] in common.where(content)
    old = {key: value for key, value in content.items() if key not in ("processor_family", "vector_capability")}
    assert common.where(old).startswith(f"{content['processor']}, cpu (")


def test_steps_are_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, on a tiny network here; a contestant that fails is named and leaves the rest."""
    everyone = step_gpu.contestants

    def with_a_broken_one(*setting: object) -> dict:
        def broken() -> None:
            raise RuntimeError("no compiler\nand more")

        return {"broken": broken, **everyone(*setting)}

    monkeypatch.setattr(step_gpu, "contestants", with_a_broken_one)
    content = step.on_gpu(CPU, quick=True, rounds=2)
    (setting,) = step_gpu.QUICK
    assert content["failed"] == {f"{setting}, broken": "RuntimeError: no compiler and more"}
    assert [row["method"] for row in content["rows"]] == ["f3triton f3", "f3triton f3, torch backend", "backprop, fused Adam"]
    assert all(row["median"] > 0 and math.isfinite(row["f3_is_faster"]) for row in content["rows"])
    common.save(tmp_path / "step.json", content)
    assert json.loads((tmp_path / "step.json").read_text()) == content
    assert (tmp_path / "step.png").stat().st_size > 10_000


CONTESTANTS = (*memory_child.OURS, *memory_child.PLAIN, *memory_child.INFERENCE)


@pytest.mark.parametrize("method", [method for method in CONTESTANTS if method != "bp-compiled"])
@pytest.mark.parametrize("kind", ["mlp", "transformer"])
@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of memory is read from /proc")
def test_memory_is_measured(kind: str, method: str) -> None:
    found = memory_child.measure(kind, method, 2, 64, 8, 16, CPU)
    assert found.keys() == {"step", "weights", "moments", "feedback", "total", "saved", "parameters"}
    each, weights = {part: found[part] / found["parameters"] for part in ("weights", "moments")}, 2 if "bf16" in method else 4
    assert each["weights"] == weights
    if method in memory_child.INFERENCE:
        assert each["moments"] == 0
    else:  # vectors keep float32, and so does what has few columns more than its scales
        assert (2 <= each["moments"] < 3) if "int8" in method else (8 <= each["moments"] < 8.1)


@pytest.mark.skipif(not memory_child.HAS_8BIT, reason="8-bit Adam is torchao's, which is not installed")
@pytest.mark.parametrize("method", memory_child.EIGHT_BIT)
def test_memory_of_adam_in_8_bits_is_measured(method: str) -> None:
    found = memory_child.measure("mlp", method, 2, 64, 8, 0, CPU)
    assert 2 <= found["moments"] / found["parameters"] < 8


@pytest.mark.parametrize("budget", [0, 5, 1000, 54_321, 10**6])
@pytest.mark.parametrize("guess", [1, 300, 10**5])
def test_the_largest_depth_is_found_by_few_measurements(budget: int, guess: int) -> None:
    asked = []

    def total(depth: int) -> int:
        asked.append(depth)
        return 40 + 7 * depth

    found = memory_scaling.largest(total, budget, guess)
    assert found == max(0, (budget - 40) // 7)
    assert len(asked) <= 8


def test_a_failing_measurement_of_memory_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_child(method: str, setting: memory_scaling.Setting, device: str) -> dict[str, int]:
        if method == "bp":
            raise RuntimeError("out of memory")
        return dict.fromkeys(
            ("step", "weights", "moments", "feedback", "total", "saved", "parameters"), 1 << (20 + setting.depth // 20)
        )

    monkeypatch.setattr(memory_scaling, "in_child", in_child)
    monkeypatch.setattr(sys, "argv", ["memory_scaling", "--quick", "--output", str(tmp_path / "memory.json")])
    with pytest.raises(SystemExit) as ended:
        memory_scaling.main()
    content = json.loads((tmp_path / "memory.json").read_text())
    names = [f"MLP, bp, hidden layers {depth}" for depth in (1, 20)]
    names += [f"{next(iter(memory_scaling.QUICK_BYTES))}, bp", "largest in 64 MiB, bp"]
    assert content["failed"] == dict.fromkeys(names, "RuntimeError: out of memory")
    assert ended.value.code == f"failed: {', '.join(names)}"
    assert {row["method"] for row in content["rows"] if row["x_name"] == "hidden layers"} == {
        "f3",
        "f3-bf16-int8",
        "bp-checkpoint-in-backward",
    }
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert not (tmp_path / "memory.partial.json").exists()


def test_seconds_to_a_target_are_the_median_of_all_seeds() -> None:
    """Also of one that did not get there; with two cores by the fastest form; most of them not: no bar."""
    rates = {"one core": [10.0], "two threads inside the products": [15.0], "pipeline of two threads": [20.0, 30.0, 20.0]}
    speeds = {("3 tanh", "local", form): found for form, found in rates.items()}
    curve = [[100, 3.0, 3.1], [200, 2.0, 1.9]]
    for steps, seconds in (([100, math.inf, 200], [20.0, 10.0]), ([100, 120, 200], [12.0, 6.0]), ([math.inf, 9, math.inf], [])):
        chosen = time_to_accuracy.Chosen("3 tanh", "local", 10, 1e-3, curve, steps)
        rows = time_to_accuracy.rows_of(chosen, "mnist", 2.0, speeds)
        there = [row for row in rows if row["metric"] == "seconds to the target"]
        assert [row["median"] for row in there] == seconds
        assert all(row["n"] == sum(step < math.inf for step in steps) for row in there)
        assert [row["form"] for row in there] == ["one core", "pipeline of two threads"][: len(seconds)]
        assert time_to_accuracy.show(rows).count("3 tanh") == bool(seconds)
