"""`train.py` as a user runs it: what a run leaves behind, and one clear line with exit code 2 for everything that is wrong."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import f3triton as f3
from f3triton.run.checkpoint import Checkpoints
from f3triton.run.options import from_json, make_parser, make_settings, parse, to_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train import main  # noqa: E402

FAST = ["--hidden", "16", "--epochs", "2"]


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        return stop.code


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused run prints."""
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: "), error
    assert error.count("\n") == 1, error
    return error


def write_csv(path: Path, rows: int = 40, columns: str = "a,b,y", row: str = "{0},{1},{2}") -> Path:
    lines = [row.format(i % 7, (i * 3) % 5, ["no", "yes"][i % 7 > 3]) for i in range(rows)]
    path.write_text("\n".join([columns, *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run on the bundled digits, with the comparison."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert run("--output-dir", folder, "--hidden", 64, "--epochs", 5, "--compare", "--quiet") == 0
    return folder


def test_a_run_leaves_everything_behind(digits: Path) -> None:
    names = {"config.json", "metrics.jsonl", "model.safetensors", "best.safetensors", "summary.json", "curves.png"}
    assert {path.name for path in digits.iterdir()} == names
    summary = json.loads((digits / "summary.json").read_text())
    promised = "method dataset task train_samples test_samples epochs steps train_loss test_loss test_error best_test_error"
    promised += " best_epoch seconds steps_per_second peak_memory_bytes parameters seed device versions comparison"
    assert not set(promised.split()) - set(summary)
    assert summary["status"] == "completed"
    assert summary["steps"] == 5 * 29
    assert summary["parameters"] == 64 * 64 + 64 + 64 * 10 + 10
    records = [json.loads(line) for line in (digits / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5]
    assert records[-1]["test_error"] == summary["test_error"]
    assert summary["best_test_error"] == min(record["test_error"] for record in records)
    picture = Image.open(digits / "curves.png")
    assert picture.size[0] > 600
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 100  # axes, words and four curves, not a blank sheet


def test_evaluate_reproduces_the_stored_figure_exactly(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--evaluate", digits) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["loss", "error"]
    assert all(line.endswith("(exactly as stored by the run)") for line in lines)


def test_load_predicts_on_raw_rows(digits: Path) -> None:
    model = f3.load(digits, which="last")
    assert not model.training
    _, test = f3.load_dataset("digits")
    probabilities = model(test.inputs)  # uint8 pixels, as the data set holds them
    wrong = 100 * (probabilities.argmax(-1) != test.targets).double().mean()
    assert float(wrong) == pytest.approx(json.loads((digits / "summary.json").read_text())["test_error"])
    image = Image.fromarray(test.inputs[0].reshape(8, 8).numpy())
    assert model.predict([{"image": image}]) == [str(int(probabilities[0].argmax()))]


def test_same_seed_same_file(digits: Path, tmp_path: Path) -> None:
    assert run("--output-dir", tmp_path / "again", "--hidden", 64, "--epochs", 5, "--quiet") == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (digits / "model.safetensors").read_bytes()


def test_a_table_with_categories_and_missing_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.csv"
    rows = [f"{i % 9},{'red' if i % 3 else 'blue'},{'' if i == 5 else i / 7},{(i % 9) * 1.5 + i / 100}" for i in range(60)]
    path.write_text("\n".join(["size,colour,weight,price", *rows]) + "\n")
    folder = tmp_path / "run"
    assert run("--dataset", path, "--target", "price", *FAST, "--epochs", 60, "--lr", 0.02, "--output-dir", folder) == 0
    out = capsys.readouterr().out
    assert "weight" in out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["task"] == "regression"
    assert summary["test_mse"] < 0.7
    model = f3.load(folder)
    std = model.preprocessing.target.std[0]
    assert summary["test_mse_in_units"]["price"] == pytest.approx(summary["test_mse"] * std**2)
    price = model.predict([{"size": 8, "colour": "green", "weight": None}])[0]  # an unseen category, a missing value
    assert 5 < price < 20
    assert run("--evaluate", folder) == 0
    assert "exactly as stored" in capsys.readouterr().out
    with path.open() as file:  # as text, every value of it
        raw = list(csv.DictReader(file))
    assert model.predict(raw) == model.predict([{**row, "size": int(row["size"])} for row in raw])
    with pytest.raises(f3.InputError, match="'size' of the rows given holds words, where numbers are needed"):
        model.predict([{**raw[0], "size": "large"}])
    assert run("--predict", folder, path, "--output-dir", tmp_path) == 0
    assert "60 predictions" in capsys.readouterr().out
    with (tmp_path / "table-predictions.csv").open() as file:
        assert [float(row["prediction"]) for row in csv.DictReader(file)] == pytest.approx(model.predict(raw))
    assert run("--predict", folder, path, "--output-dir", tmp_path) == 2
    assert "is there already" in capsys.readouterr().err


def test_predict_writes_probabilities(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, test = f3.load_dataset("digits")
    model = f3.load(digits)
    image = tmp_path / "seven.png"
    Image.fromarray(test.inputs[0].reshape(8, 8).numpy()).save(image)
    expected = model(test.inputs[:1])
    torch.testing.assert_close(model([str(image)]), expected)
    torch.testing.assert_close(expected.sum(-1), torch.ones(1))
    sigmoids = torch.sigmoid(model.network(test.preprocessing.normalise(test.inputs[:1])))
    torch.testing.assert_close(expected, sigmoids / sigmoids.sum())
    assert model.classes == tuple("0123456789")
    assert run("--predict", digits, image, "--output-dir", tmp_path, "--quiet") == 0
    with (tmp_path / "seven-predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["prediction"] for row in rows] == model.predict([image])
    assert [float(rows[0][f"probability of {i}"]) for i in range(10)] == pytest.approx(expected[0].tolist())
    assert run("--predict", digits, tmp_path / "none.csv", "--output-dir", tmp_path) == 2
    assert "no such file" in capsys.readouterr().err
    assert run("--predict", digits, image, "--epochs", 3) == 2
    assert list(tmp_path.glob("*.tmp")) == []


def test_dry_run_prints_the_budget_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--dry-run", "--hidden", 100, 50, "--batch-size", 32) == 0
    out = capsys.readouterr().out
    parameters = 64 * 100 + 100 + 100 * 50 + 50 + 50 * 10 + 10
    assert f"parameters {parameters:,}" in out
    for line, count in (("weights", 4 * parameters), ("moments", 8 * parameters), ("errors", 4 * 1438 * 10)):
        shown = next(row for row in out.splitlines() if row.strip().startswith(line))
        assert f"{count / 1024:.1f} KiB" in shown
    weights = 64 * 100 + 100 * 50 + 50 * 10
    assert f"FLOPs a step {4 * 32 * weights + 2 * 32 * 10 * 150:,}" in out
    assert run("--dry-run", "--hidden", 10**11) == 0  # terabytes: nothing of it is allocated
    assert "TiB" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["bp", "dfa", "drtp", "sdfa", "last-layer"])
def test_every_method_by_its_word(method: str, tmp_path: Path) -> None:
    assert run("--method", method, *FAST, "--output-dir", tmp_path / "run", "--quiet") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["method"] == method


def test_options_reach_the_trainer(tmp_path: Path) -> None:
    """Every choice changes the weights it ends with: none is parsed and ignored."""
    variants = {
        "plain": [],
        "signal": ["--signal", "delayed-loss"],
        "link": ["--link", "softmax"],
        "mask": ["--mask-target"],
        "feedback": ["--feedback", "kaiming"],
        "values": ["--feedback", "discrete-uniform", "--feedback-values", "0.5", "2"],
        "scale": ["--feedback-scale", "0.3", "--optimizer", "sgd"],
        "hidden scale": ["--hidden-scale", "mean", "--optimizer", "sgd"],
        "activation": ["--activation", "relu"],
        "loss": ["--loss", "cross-entropy"],
        "sgd": ["--optimizer", "sgd"],
        "momentum": ["--optimizer", "sgd", "--momentum", "0.9"],
        "nesterov": ["--optimizer", "sgd", "--momentum", "0.9", "--nesterov"],
        "adamw": ["--optimizer", "adamw"],
        "decay": ["--weight-decay", "0.1"],
        "lr": ["--lr", "0.01"],
        "schedule": ["--lr-schedule", "linear"],
        "warmup": ["--warmup-steps", "10"],
        "batch": ["--batch-size", "7"],
        "seed": ["--seed", "3"],
        "precision": ["--precision", "bfloat16"],
        "fewer": ["--max-train-samples", "500"],
    }
    ends: dict[str, bytes] = {}
    for name, options in variants.items():
        folder = tmp_path / name
        assert run(*FAST, *options, "--output-dir", folder, "--quiet") == 0, name
        ends[name] = (folder / "model.safetensors").read_bytes()
    for name in ends:
        same = [other for other in ends if other != name and ends[other] == ends[name]]
        assert not same, f"{name} ended like {same}"


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "0"], "network.sizes[1] is 0; allowed: a whole number from 1 to"),
        (["--hidden", "many"], "'many' is not a number of units"),
        (["--lr", "-1"], "lr must be a finite number >= 0, got -1.0"),
        (["--lr", "nan"], "lr must be a finite number"),
        (["--momentum", "0.9"], "optimizer 'adam' has no 'momentum'"),
        (["--method", "hebb"], "invalid choice: 'hebb'"),
        (["--method", "drtp", "--signal", "delayed-error"], "method 'drtp' has the signal 'target'"),
        (["--feedback", "gaussian"], "feedback 'gaussian' is unknown; allowed: kaiming, trinomial"),
        (["--feedback", "cartesian-product"], "needs layers of 3^10 = 59049 units, got 500"),
        (["--feedback-scale", "big"], "feedback scale 'big' is unknown"),
        (["--hidden-scale", "big"], "hidden scale must be a finite number or 'mean', got 'big'"),
        (["--dataset", "no/such/folder"], "no/such/folder"),
        (["--dataset", "somebody/else"], "somebody/else"),
        (["--target", "price"], "price"),
        (["--task", "regression", "--loss", "bce"], "regression"),
        (["--test-split", "exam"], "exam"),
        (["--epochs", "0"], "epochs must be a whole number of at least 1, got 0"),
        (["--batch-size", "0"], "batch size must be a whole number of at least 1 and below 2^31, got 0"),
        (["--eval-every", "0"], "eval every must be a whole number of at least 1, got 0"),
        (["--seed", "-1"], "seed (--seed) is -1"),
        (["--seed", str(2**64)], "a whole number from 0 to 2^63 - 1"),
        (["--test-fraction", "1.5"], "test_fraction (--test-fraction) is 1.5"),
        (["--hidden", "100000000000"], "not enough memory"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--method", "bp", "--mask-target"], "--mask-target has no effect with the method 'bp'"),
        (["--method", "last-layer", "--feedback=kaiming"], "--feedback has no effect with the signal 'none'"),
        (["--method", "drtp", "--link", "softmax"], "--link has no effect with the signal 'target'"),
        (["--test-fraction", "0.3"], "test_fraction (--test-fraction) 0.3 has no effect where there is a test split"),
        (["--streaming", "--test-fraction", "0.3"], "has no effect where there is a test split"),
        (["--method", "bp", "--feedback-shape", "generated"], "--feedback-shape has no effect with the method 'bp'"),
        (["--method", "fa", "--feedback-shape", "generated"], "--feedback-shape has no effect with the method 'fa'"),
        (["--method", "last-layer", "--feedback-shape", "generated"], "--feedback-shape has no effect with the signal 'none'"),
        (["--method", "local", "--feedback-shape", "generated"], "--feedback-shape has no effect with the signal"),
        (["--feedback-shape", "shared"], "'shared' has no effect with --model mlp"),
        (["--feedback-shape", "shared-generated"], "'shared-generated' has no effect with --model mlp"),
        (["--residual", "--hidden", "7", "8"], "--residual has no effect in an mlp of the sizes [64, 7, 8, 10]"),
        (["--warmup-steps", "-1"], "warmup steps must be between 0 and"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--backend", "triton"], "TRITON_INTERPRET=1"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--evaluate", "no/such/run"], "run folder 'no/such/run' does not exist"),
        (["--evaluate", ".", "--lr", "1"], "got --lr"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert message in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir()), "a refused run leaves nothing behind"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("a,y\n1,no\ninf,yes\n2,no\n3,yes\n", [], "a"),
        ("a,y\n1,no\n2,\n2,no\n3,yes\n", [], "y"),
        ("a,y\n1,0.5\n2,inf\n2,0.1\n3,0.2\n", ["--target", "y"], "y"),
        ("a,y\n", [], "empty"),
        ("a,y\n1,no\n2,no\n2,no\n3,no\n", [], "class"),
        ("a,y\n1,no\n2,yes\n2,no\n3,yes\n", ["--target", "z"], "a, y"),
        ("a,y\n1,no\n2,yes\n2,no\n3,yes\n", ["--task", "regression"], "y"),
        ("a,y\n1,0.5\n2,0.1\n2,0.7\n3,0.2\n", ["--loss", "bce"], "loss 'bce' needs classes, but the task is regression"),
    ],
)
def test_bad_tables(content: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.csv"
    path.write_text(content)
    assert message in fails(capsys, "--dataset", path, "--output-dir", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in digits.iterdir()}
    assert "holds a run already" in fails(capsys, "--output-dir", digits)
    assert before == {path.name: path.read_bytes() for path in digits.iterdir()}


def test_overwrite(tmp_path: Path) -> None:
    for hidden in (8, 9):
        assert run("--hidden", hidden, "--epochs", 1, "--output-dir", tmp_path / "run", "--overwrite", "--quiet") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["network"]["sizes"] == [64, 9, 10]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_output_folder_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file" in fails(capsys, "--output-dir", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    error = fails(capsys, *FAST, "--output-dir", tmp_path / "run")
    assert "has 1,000 bytes free" in error


def test_a_disk_that_fills_up_while_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full is a disk without space: the line must say so."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    from f3triton.run.folder import _named

    refused = pytest.raises(f3.InputError, match=r"cannot write '/dev/full': the disk is full")
    with refused, _named(Path("/dev/full"), "write"), open("/dev/full", "w") as file:
        file.write("x" * 100_000)


def test_divergence_keeps_the_last_good_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b,y\n" + "\n".join(f"{i},{i * 7 % 11},{i / 3}" for i in range(60)))
    folder = tmp_path / "run"
    error = fails(capsys, "--dataset", path, "--target", "y", *FAST, "--optimizer", "sgd", "--lr", "1e20",
                  "--lr-schedule", "constant", "--output-dir", folder)  # fmt: skip
    assert "at step" in error
    assert "kept in" in error
    assert json.loads((folder / "summary.json").read_text())["status"] == "diverged"
    assert all(torch.isfinite(p).all() for p in f3.load(folder).parameters())


def test_ctrl_c_ends_cleanly(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), "--epochs", "100000", "--output-dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    deadline = time.time() + 60
    while not (folder / "metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "interrupted" in error
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["test_error"] is not None
    assert run("--evaluate", folder) == 0


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FAST, "--quiet", "--output-dir", tmp_path / "run") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_help_is_grouped_and_shows_defaults() -> None:
    text = make_parser().format_help()
    assert text.startswith("usage: train.py [options]\n\nTrain a neural network")
    for group in ("data:", "model:", "method:", "training:", "run:"):
        assert f"\n{group}" in text
    assert "default: tanh" in text
    assert "(default: None)" not in text


def test_every_help_text_is_understood_alone() -> None:
    helps = {action.option_strings[-1]: action.help for action in make_parser()._actions}
    assert not {option: text for option, text in helps.items() if re.match(r"(of|that|its|also|likewise|default)\b", text)}


def test_options_are_derived_from_the_settings() -> None:
    assert make_settings(parse([])) == f3.Settings()
    words = ["--loss=mse", "--optimizer=sgd", "--momentum=0.5", "--nesterov", "--window=99", "--visits=3", "--hidden-scale=0.5"]
    wanted = f3.Settings(
        loss="mse", optimizer="sgd", momentum=0.5, nesterov=True, window=99, visits=3, hidden_scale=0.5, mask_target=True
    )
    options = parse([*words, "--mask-target"])
    assert make_settings(options) == wanted
    assert make_settings(from_json(json.loads(json.dumps(to_json(options))))) == wanted


def test_nothing_imports_the_script() -> None:
    pattern = re.compile(r"^\s*(import train\b|from train import)", re.MULTILINE)
    files = [*ROOT.glob("bench/**/*.py"), *ROOT.glob("f3triton/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    assert len(files) > 50
    assert not [path for path in files if pattern.search(path.read_text(encoding="utf-8"))]


def test_the_library_imports_neither_datasets_nor_matplotlib() -> None:
    code = "import sys, f3triton; print([name for name in ('datasets', 'matplotlib', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "vit", "--patch-size", "4", "--depth", "2", "--dim", "8", "--heads", "2", "--position-embedding"],
        [
            "--model",
            "vit",
            "--patch-size",
            "4",
            "--granularity",
            "layer",
            "--embedding",
            "patch",
            "--pool",
            "mean",
            "--norm",
            "rms",
        ],
        ["--model", "convnet", "--channels", "4", "6", "--kernel-size", "3", "--hidden", "20", "--feedback-shape", "shared"],
        ["--method", "fa", "--hidden", "20x2"],
    ],
)
def test_other_networks_and_back_again(arguments: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    common = ["--epochs", "2", "--max-train-samples", "200", "--quiet", "--output-dir", str(run_dir)]
    assert main([*arguments, *common]) == 0
    assert main(["--evaluate", str(run_dir)]) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    _, test = f3.load_dataset("digits")
    assert f3.load(run_dir)(test.inputs[:5].view(5, 1, 8, 8)).shape == (5, 10)
    assert summary["parameters"] == sum(p.numel() for p in f3.load(run_dir).parameters())


@pytest.mark.parametrize("model", ["vit --patch-size 4", "vit --patch-size 4 --granularity layer", "convnet", "mlp"])
def test_dry_run_of_every_network(model: str, capsys: pytest.CaptureFixture) -> None:
    for method in ("f3", "bp", "dfa"):
        assert main(["--model", *model.split(), "--method", method, "--dry-run"]) == 0
    assert "activations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit"], "patches of 7 pixels do not divide an image of 8x8"),
        (["--model", "vit", "--patch-size", "4", "--heads", "7"], "7 heads do not divide the dimension 32"),
        (["--model", "vit", "--hidden", "5"], "--hidden has no effect with --model vit; it belongs to mlp, convnet"),
        (["--model", "convnet", "--kernel-size", "4"], "kernel size of a ConvNet must be an odd whole number, got 4"),
        (["--model", "convnet", "--channels", "4", "4", "4", "4"], "an image of 8x8 is too small for 4 poolings"),
        (["--model", "convnet", "--method", "fa"], "method 'fa' needs a sequence of Linear stages, stage 0 is a Block"),
    ],
)
def test_networks_that_do_not_fit(arguments: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert message in fails(capsys, *arguments, "--output-dir", str(tmp_path / "run"))


def test_resume_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = [*FAST, "--quiet", "--epochs", "4", "--max-train-samples", "300"]
    whole = tmp_path / "whole"
    assert run(*common, "--checkpoint-every", "5", "--keep", "9", "--output-dir", whole) == 0
    steps = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert steps == [f"step-{n:012d}" for n in (5, 10, 15, 20)]

    def cut_short(name: str) -> Path:
        """The folder as it would be, had the run been killed after step 10."""
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        for step in steps[2:]:
            shutil.rmtree(folder / "checkpoints" / step)
        for file in ("summary.json", "model.safetensors", "curves.png"):
            (folder / file).unlink()
        return folder

    def same(folder: Path) -> bool:
        records = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, folder)]
        for record in records[0] + records[1]:
            record.pop("learning_seconds")
        models = [(f / "model.safetensors").read_bytes() for f in (whole, folder)]
        return models[0] == models[1] and records[0] == records[1]

    by_folder = cut_short("by-folder")
    assert run("--resume", by_folder) == 0
    assert same(by_folder)
    by_auto = cut_short("by-auto")
    assert run(*common, "--checkpoint-every", "5", "--output-dir", by_auto, "--resume", "auto") == 0
    assert same(by_auto)
    fresh = tmp_path / "fresh"
    assert run(*common, "--checkpoint-every", "5", "--output-dir", fresh, "--resume", "auto") == 0
    assert same(fresh)

    other = cut_short("other")
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    assert "batch size was 50 and is 20" in fails(capsys, "--resume", other, "--batch-size", "20")
    assert "data was" in fails(capsys, "--resume", other, "--max-train-samples", "200")
    assert before == {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    assert "holds checkpoints" in fails(capsys, "--output-dir", other)
    assert "has no checkpoint to go on from" in fails(capsys, "--resume", digits_without(whole, tmp_path))
    assert "--resume auto needs --output-dir" in fails(capsys, "--resume", "auto")
    assert "is not understood" in fails(capsys, "--checkpoint-every", "often", "--output-dir", tmp_path / "x")
    never = ["--checkpoint-every", "never"]
    assert "--keep has no effect" in fails(capsys, *never, "--keep", "3", "--output-dir", tmp_path / "x")
    assert "cannot go together" in fails(capsys, *common, "--output-dir", other, "--resume", "auto", "--overwrite")
    assert before == {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}


def test_checkpoints_come_every_ten_minutes_unless_they_are_not_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minutes = itertools.count(0, 3)  # at each look at the clock
    monkeypatch.setattr("f3triton.run.start.Checkpoints", partial(Checkpoints, clock=lambda: 60.0 * next(minutes)))
    common = [*FAST, "--quiet", "--epochs", "1", "--max-train-samples", "500"]
    assert run(*common, "--output-dir", tmp_path / "default") == 0
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "default" / "checkpoints").iterdir())
    assert steps == [5, 9]
    assert run(*common, "--checkpoint-every", "never", "--output-dir", tmp_path / "never") == 0
    assert not (tmp_path / "never" / "checkpoints").exists()


def test_resuming_removes_no_store_of_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = [*FAST, "--quiet", "--max-train-samples", "100", "--checkpoint-every", "1e"]
    assert run(*common, "--error-store", "./store", "--output-dir", "one") == 0
    config = json.loads(Path("one/config.json").read_text())
    assert config["options"]["error_store"] == str(tmp_path / "store")  # from wherever it is resumed
    before = {path: path.read_bytes() for path in Path("store").iterdir()}
    for _ in range(2):
        assert "store" in fails(capsys, *common, "--error-store", "./store", "--output-dir", "two", "--resume", "auto")
    assert before == {path: path.read_bytes() for path in Path("store").iterdir()}
    shutil.rmtree("one/checkpoints")  # as though it had been killed before its first one
    Path("one/summary.json").unlink()
    assert run(*common, "--error-store", "./store", "--output-dir", "one", "--resume", "auto") == 0
    monkeypatch.chdir("/")
    assert run("--resume", tmp_path / "one") == 0


def digits_without(whole: Path, tmp_path: Path) -> Path:
    """A copy of a run, without its checkpoints."""
    shutil.copytree(whole, tmp_path / "without", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "without"


def test_the_report_has_a_line_for_each_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Error, activations and speed of every run, and one line about what comes next."""
    assert run("--output-dir", tmp_path / "run", "--hidden", "16x2", "--epochs", 1, "--compare") == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("test:"))
    assert lines[start].split() == ["test:", "wrong", "activations", "steps/s"]
    found = [re.fullmatch(r"(\w+) +[\d.]+ %  +[\d.]+ KiB  +[\d,]+", line)[1] for line in lines[start + 1 : start + 4]]
    assert found == ["f3", "local", "bp"]
    assert [line for line in lines if line.startswith("next: ")] == lines[-1:]
