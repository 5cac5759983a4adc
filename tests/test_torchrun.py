"""`train.py` under torchrun: the same files as from one process, one report, and the ends that a run can come to."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from f3triton.run.checkpoint import read

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--max-train-samples", "200", "--max-test-samples", "100", "--hidden", "24x3", "--epochs", "4"]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or os.name != "posix", reason="needs torch.distributed")


def start(folder: Path, processes: int, *arguments: str, torchrun: tuple[str, ...] = (), script: Path | None = None):
    """`train.py` on so many processes (0: without torchrun), its output in a pipe."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *torchrun]
    command = [*(launcher if processes else [sys.executable]), str(script or ROOT / "train.py"), *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(folder: Path, processes: int, *arguments: str, **more: object) -> tuple[int, str]:
    """(exit code, output)."""
    process = start(folder, processes, *arguments, **more)
    output = process.communicate(timeout=100)[0]
    return process.returncode, output


def model(folder: Path) -> str:
    return hashlib.sha256((folder / "run" / "model.safetensors").read_bytes()).hexdigest()


WITH_GLOO = """
import sys
import train
from f3triton.distributed import devices
devices.BACKEND = "gloo"
sys.exit(train.main())
"""


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    """And three, whose activations go by groups of two, gloo's in the place of NCCL's."""
    arguments = [*SMALL, "--output-dir", "run", "--checkpoint-every", "5"]
    code, said = run(tmp_path / "one", 0, *arguments)
    assert code == 0, said
    code, both = run(tmp_path / "two", 2, *arguments, "--pipeline", "2")
    assert code == 0, both
    assert model(tmp_path / "one") == model(tmp_path / "two")
    script = tmp_path / "script.py"
    script.write_text(WITH_GLOO)
    code, said_by_three = run(tmp_path / "three", 3, *arguments, "--pipeline", "3", "--pipeline-link", "nccl", script=script)
    assert code == 0, said_by_three
    assert model(tmp_path / "one") == model(tmp_path / "three")
    for name in ("step-000000000015", "step-000000000010"):
        one, two = (read(tmp_path / n / "run" / "checkpoints" / name).tensors for n in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[tensor], two[tensor]) for tensor in one)
    lines = [line for line in both.splitlines() if line.startswith(("digits", "f3: epoch", "worker", "pipeline"))]
    epochs = [line.partition("  (")[0] for line in said.splitlines() if line.startswith("f3: epoch")]
    assert [line.partition("  (")[0] for line in lines if line.startswith("f3: epoch")] == epochs  # each is said once
    assert sum(line.startswith("digits") for line in lines) == 1
    assert sum(line.startswith("worker") for line in lines) == 2
    summary = json.loads((tmp_path / "two" / "run" / "summary.json").read_text())
    assert [one["worker"] for one in summary["workers"]] == [0, 1]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("workers", "graph"),
    [
        (["--pipeline", "2"], "off"),
        (["--pipeline", "2"], "on"),
        (["--data-parallel", "2", "--data-parallel-by", "factors"], "off"),
    ],
)
def test_two_processes_on_one_gpu_write_what_one_writes(workers: list[str], graph: str, tmp_path: Path) -> None:
    """Of replicas only the figures are compared: libraries choose products by the number of rows."""
    arguments = [*SMALL, "--output-dir", "run", "--device", "cuda", "--cuda-graph", graph]
    code, said = run(tmp_path / "one", 0, *arguments, "--epoch-launch", "off")  # whose sums are in another order
    assert code == 0, said
    code, said = run(tmp_path / "two", 2, *arguments, *workers)
    assert code == 0, said
    if "--pipeline" in workers:
        assert model(tmp_path / "one") == model(tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("one", "two"))
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["off", "on"])
def test_several_gpus_with_nccl_write_what_one_writes(graph: str, tmp_path: Path) -> None:
    count = min(torch.cuda.device_count(), 3)
    if count < 2 or not torch.distributed.is_nccl_available():
        pytest.skip("needs two GPUs and NCCL")
    arguments = [*SMALL, "--output-dir", "run", "--device", "cuda", "--cuda-graph", graph]
    code, said = run(tmp_path / "one", 0, *arguments, "--epoch-launch", "off")
    assert code == 0, said
    code, said = run(tmp_path / "several", count, *arguments, "--pipeline", str(count), "--pipeline-link", "nccl")
    assert code == 0, said
    assert model(tmp_path / "one") == model(tmp_path / "several")


@pytest.mark.slow
def test_two_processes_are_told_what_to_say(tmp_path: Path) -> None:
    code, said = run(tmp_path, 2, *SMALL)
    assert code != 0
    assert said.count("train.py: error: ") == 1
    assert "train.py: error: 2 processes were started, and nothing says what each is to do; add --pipeline auto" in said
    assert not (tmp_path / "runs").exists()
    code, said = run(tmp_path, 2, *SMALL, "--pipeline", "3")
    assert "train.py: error: pipeline 3 needs 3 processes, got 2" in said


LONG = [*SMALL[:-1], "100000", "--eval-every", "1000", "--checkpoint-every", "20", "--output-dir", "run", "--quiet"]
PIPELINE, REPLICAS = ["--pipeline", "auto"], ["--data-parallel", "2"]


def until_checkpoints(folder: Path, process: subprocess.Popen) -> None:
    for _ in range(600):
        if any((folder / "run" / "checkpoints").glob("step-*")):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    pytest.fail("no checkpoint after a minute")


def children(process: subprocess.Popen) -> dict[int, int]:
    """The process of each rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid:
                env = dict(item.split("=", 1) for item in (path / "environ").read_text().split("\0") if "=" in item)
                found[int(env["RANK"])] = int(path.name)
        except (OSError, KeyError, ValueError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_worker_that_is_killed(rank: int, tmp_path: Path) -> None:
    process = start(tmp_path, 3, *LONG, *PIPELINE)
    until_checkpoints(tmp_path, process)
    os.kill(children(process)[rank], signal.SIGKILL)
    began = time.monotonic()
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert time.monotonic() - began < 30
    assert said.count("train.py: error: ") == 1
    assert f"train.py: error: worker {rank} is gone (" in said


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("method", ["f3", "bp"])
def test_a_replica_that_is_killed(method: str, tmp_path: Path) -> None:
    process = start(tmp_path, 2, *LONG, *REPLICAS, "--method", method)
    until_checkpoints(tmp_path, process)
    os.kill(children(process)[1], signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert said.count("train.py: error: ") == 1
    assert "train.py: error: another replica is gone (" in said
    assert said.count("Traceback") == 1  # torchrun's own


@pytest.mark.slow
@pytest.mark.parametrize("workers", [PIPELINE, REPLICAS], ids=["pipeline", "replicas"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop(number: int, workers: list[str], tmp_path: Path) -> None:
    process = start(tmp_path, 2, *LONG, *workers)
    until_checkpoints(tmp_path, process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "interrupted; what was evaluated and saved so far is kept" in said
    last = max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["step"] == int(last.removeprefix("step-"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    arguments = [
        *SMALL,
        "--optimizer",
        "sgd",
        "--lr",
        "1e30",
        "--activation",
        "identity",
        "--loss",
        "mse",
        "--output-dir",
        "run",
    ]
    code, said = run(tmp_path, 2, *arguments, "--pipeline", "auto")
    assert code != 0
    assert said.count("train.py: error: ") == 1
    assert "train.py: error: the loss became " in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"


KILLS_ITSELF = """
import os, signal, sys
import train
from f3triton.learn.step import F3Learner
learn = F3Learner.learn
def dies(self, *arguments):
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if (attempt, int(os.environ["RANK"]), self.updater.number) in ((0, 1, 10), (1, 0, 13)):
        os.kill(os.getpid(), signal.SIGKILL)
    return learn(self, *arguments)
F3Learner.learn = dies
sys.exit(train.main())
"""


@pytest.mark.slow
def test_torchrun_starts_it_again_and_it_goes_on(tmp_path: Path) -> None:
    arguments = [*SMALL, "--output-dir", "run", "--checkpoint-every", "3", "--resume", "auto"]
    code, said = run(tmp_path / "one", 0, *arguments)
    assert code == 0, said
    script = tmp_path / "script.py"
    script.write_text(KILLS_ITSELF)
    code, said = run(tmp_path / "two", 2, *arguments, "--pipeline", "2", torchrun=("--max-restarts=3",), script=script)
    assert code == 0, said
    assert "going on after step" in said
    assert model(tmp_path / "one") == model(tmp_path / "two")


SCRIPT = """
import hashlib, sys
import torch
import f3triton as f3

train, test = f3.load_dataset("digits", max_train_samples=120, max_test_samples=60)
torch.manual_seed(0)
model = f3.models.MLP([64, 24, 24, 10])
trainer = f3.Trainer(model, batch_size=20, device="cpu", pipeline="auto" if len(sys.argv) == 1 else "off")
result = trainer.fit(train, 3, test)
weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
found = hashlib.sha256(weights).hexdigest(), result.history[-1]["test_loss"], trainer.evaluate(test)["test_loss"]
sys.stdout.write(" ".join(map(str, found)) + "\\n")
"""


@pytest.mark.slow
def test_a_script_of_ones_own(tmp_path: Path) -> None:
    """Every process has the whole network in the end, and the records."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    code, one = run(tmp_path, 0, "off", script=script)
    assert code == 0, one
    code, said = run(tmp_path, 3, script=script)
    assert code == 0, said
    assert said.count(one.splitlines()[-1]) == 3
