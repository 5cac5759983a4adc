"""Errors at the stage itself, against autograd in float64."""

from __future__ import annotations

import copy
import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from test_train_script import fails, run
from test_trainer import problem, weights
from torch import Tensor, nn
from torch.nn import functional

import f3triton as f3
from f3triton.base.data import Visit
from f3triton.kernels import eager
from f3triton.learn.local import Local
from f3triton.learn.signal import Signal
from f3triton.learn.step import F3Learner
from f3triton.network.head import Head
from f3triton.network.updater import Arithmetic, Updater
from f3triton.run.checkpoint import Checkpoints, read

CPU = torch.device("cpu")
RULE = f3.SGD(lr=0.1)


def mlp(depth: int) -> f3.Sequential:
    torch.manual_seed(0)
    return f3.models.MLP([6, *[8] * depth, 3]).double()


def blocks(depth: int) -> f3.Sequential:
    torch.manual_seed(0)
    stages = [
        f3.Block(nn.Sequential(nn.Linear(6 if i == 0 else 8, 8), nn.LayerNorm(8), nn.GELU(), f3.Linear(8, 8)))
        for i in range(depth)
    ]
    return f3.Sequential(*stages, f3.Block(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)))).double()


def gpt(depth: int) -> f3.Sequential:
    torch.manual_seed(0)
    return f3.models.GPT(7, 5, depth - 1, 2, 8).double()


def losses(model: f3.Sequential, heads: list[Head], reader: list, x: Tensor, target: Tensor, reach: int) -> Tensor:
    """The sum of all readings' losses; a gradient goes back through `reach` stages, and what reads is not changed by it."""
    hidden, total = list(model.stages[:-1]), 0.0
    frozen = [copy.deepcopy(stage) for stage in reader]
    together = len(hidden) - max(len(reader), 1)
    for place in range(len(hidden)):
        # run the last stages of the window again from a detached input: the gradient ends there
        first = min(place, together) - reach + 1
        first = first if first > model.unread else 0
        if place < model.unread:
            continue
        h = x
        for number, stage in enumerate(hidden[: place + 1]):
            if number == first:
                h = h.detach()
            h = stage(h)
        if place < together:
            out = h
            for part in frozen or [heads[place]]:
                out = part(out)
            total = total + functional.cross_entropy(out.flatten(0, -2), target)
        last = h
    return total + functional.cross_entropy(model.stages[-1](last).flatten(0, -2), target)


@pytest.mark.parametrize("reach", [1, 2, 4])
@pytest.mark.parametrize("make", [mlp, blocks, gpt])
@pytest.mark.parametrize("reading", ["own", 1, 2])
def test_a_step_is_autograd_on_detached_inputs(make: object, reading: str | int, reach: int) -> None:
    """Reach 1: every stage on a detached input; reach 4, the depth: backpropagation on the sum of the readings' losses."""
    model = make(4)
    token = make is gpt
    x = torch.randint(0, 7, (6, 5)) if token else torch.randn(6, 6, dtype=torch.float64)
    rows = 30 if token else 6
    target = functional.one_hot(torch.arange(rows) % (7 if token else 3)).double()
    shapes = []
    h = x
    for stage in model.stages[:-1]:
        h = stage(h)
        shapes.append(h.shape[1:])
    model.prepare(x[:1], target.shape[1], None, 5 if token else 1)
    if reading == "own":
        model.add_heads(shapes, target.shape[1], 5 if token else 1)
    else:
        model.read_by(reading)
    reader = list(model.stages)[-model.reading :] if model.reading else []
    twin = copy.deepcopy(model)
    updater = Updater(model, Arithmetic(RULE, eager, CPU))
    local = Local("cross-entropy", model, reach)
    learner = F3Learner(model, None, updater, "cross-entropy", Signal("local-error"), local=local)
    output, left = learner.learn(x, target, None, True, 0.1)
    assert left is None
    expected = twin(x)
    torch.testing.assert_close(output.a, expected.flatten(0, -2))
    total = losses(twin, list(twin.heads or []), list(twin.stages)[-reading:] if reader else [], x, target, reach)
    total.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        wanted = theirs if theirs.grad is None else theirs - 0.1 * theirs.grad
        torch.testing.assert_close(ours, wanted.detach(), rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
        assert theirs.grad is not None


@pytest.mark.parametrize("kind", ["normalised", "residual", "pooled"])
def test_a_linear_stage_inside_a_block_is_what_it_is_outside(kind: str) -> None:
    """A head with stages in front of its reading is updated by the gradient of what it says."""
    torch.manual_seed(0)
    if kind == "pooled":
        model, x = (
            f3.models.ViT(4, 1, 3, 2, depth=2, heads=2, dim=6, mlp_width=8, pool="mean").double(),
            torch.randn(6, 1, 4, 4),
        )
    else:
        residual = kind == "residual"
        model, x = f3.models.MLP([6, 8, 8, 8, 3], "tanh", norm="layer", residual=residual).double(), torch.randn(6, 6)
    x, target = x.double(), functional.one_hot(torch.arange(6) % 3).double()
    model.prepare(x[:1], 3, None)
    model.add_heads([list(stage.output_shape) for stage in model.stages[:-1]], 3, depth=1)
    step = Updater(model, Arithmetic(RULE, eager, CPU)).begin(0.1)
    for place, head in enumerate(model.heads):
        h = x
        for stage in model.stages[: place + 1]:
            h = stage(h)
        twin, h = copy.deepcopy(head), h.detach().requires_grad_()
        functional.cross_entropy(twin(h), target).backward()
        with torch.no_grad():
            got = Local("cross-entropy", model).gradient(place, h.detach(), target, step)
        torch.testing.assert_close(got, h.grad, rtol=1e-9, atol=1e-11)
        for ours, theirs in zip(head.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.detach(), (theirs - 0.1 * theirs.grad).detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("method", ["local", "f3"])
def test_normalised_stages_with_residuals(method: str, activation: str) -> None:
    """`h = x + norm(phi(x W^T + b))`: forward, and the gradient or the error signal through all of it."""
    torch.manual_seed(1)
    stage = f3.Linear(8, 8, activation, norm="layer", residual=True).double()
    stage.prepare(torch.zeros(1, 8, dtype=torch.float64), 3, 0)
    twin, x = copy.deepcopy(stage), torch.randn(5, 8, dtype=torch.float64)
    error, gradient = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    a = functional.linear(leaf, twin.weight, twin.bias)
    phi = {"relu": torch.relu, "gelu": functional.gelu, "tanh": torch.tanh}[activation](a)
    expected = leaf + functional.layer_norm(phi, (8,))
    seed = gradient if method == "local" else error @ stage.feedback_matrix
    (expected * seed).sum().backward()
    step = Updater(stage, Arithmetic(RULE, eager, CPU)).begin(0.1)
    if method == "f3":
        with torch.no_grad():
            h = stage.learn(x, error, step)
    else:
        with torch.no_grad():
            h, kept = stage.keep(x, step, wants_input=True)
            torch.testing.assert_close(stage.back(kept, gradient, step), leaf.grad)
            torch.testing.assert_close(stage.finish(kept, gradient, step, wants_input=True), leaf.grad)
    torch.testing.assert_close(h, expected.detach())
    for ours, theirs in zip(stage.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), (theirs - 0.1 * theirs.grad).detach())


# --- in training ------------------------------------------------------------------------------------------------------


def trained(model: f3.Sequential | None = None, epochs: int = 3, **settings: object) -> f3.Trainer:
    model = model or relu_mlp()
    settings = {"method": "local", "optimizer": f3.Adam(lr=0.01), "batch_size": 8, "device": "cpu", **settings}
    trainer = f3.Trainer(model, **settings)
    trainer.fit(problem(), epochs, problem())
    return trainer


def relu_mlp(depth: int = 3) -> f3.models.MLP:
    torch.manual_seed(0)
    return f3.models.MLP([6, *[16] * depth, 3], "relu", norm="layer")


@pytest.mark.parametrize(
    "settings",
    [{}, {"reach": 2}, {"local_feedback": "random"}, {"local_head_depth": 1}, {"reach": 3, "loss": "cross-entropy"}],
    ids=str,
)
def test_it_learns_and_the_same_again(settings: dict) -> None:
    one, two = trained(epochs=10, **settings), trained(epochs=10, **settings)
    assert torch.equal(weights(one.model), weights(two.model))
    assert one.result.history[-1]["test_error"] < 15
    assert one.learner.store is None
    for place in (1, 2, 3, "mean"):
        one.model.exit = place
        assert one.evaluate(problem())["test_error"] < 40
    assert not torch.equal(weights(one.model), weights(trained(epochs=10, seed=1, **settings).model))


def test_one_hidden_layer_is_backpropagation() -> None:
    """Its head is the network's output."""
    local = trained(relu_mlp(1), precision="float64")
    back = trained(relu_mlp(1), precision="float64", method="bp")
    torch.testing.assert_close(weights(local.model), weights(back.model), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("settings", [{}, {"reach": 2, "local_head_depth": 1}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, settings: dict) -> None:
    whole = trained(**settings)
    checkpoints = Checkpoints(tmp_path, 5, keep=100)
    trainer = f3.Trainer(relu_mlp(), method="local", optimizer=f3.Adam(lr=0.01), batch_size=8, device="cpu", **settings)
    trainer.fit(problem(), 3, problem(), checkpoints=checkpoints)
    for path in sorted(tmp_path.glob("step-*"))[:3]:
        again = f3.Trainer(relu_mlp(), method="local", optimizer=f3.Adam(lr=0.01), batch_size=8, device="cpu", **settings)
        again.fit(problem(), 3, problem(), resume=read(path))
        assert torch.equal(weights(again.model), weights(whole.model))


def test_a_shared_head_belongs_to_the_last_stage_only() -> None:
    """Reading the other stages changes nothing in it: it learns as in a network whose other stages have no error at all."""
    torch.manual_seed(0)
    model = f3.models.GPT(7, 5, 2, 2, 8)
    data = TextLike()
    learner = make(model, data, Local)
    before = {name: p.clone() for name, p in model.named_parameters()}
    x, target = data.fetch(torch.arange(4), torch.float32), data.one_hot(torch.arange(4), torch.float32)
    step = learner.updater.begin(0.1)
    learner.local.gradient(0, model.stages[0](x).detach(), target, step)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class TextLike:
    """Four windows of five tokens."""

    device, positions, outputs = CPU, 5, 7

    def __len__(self) -> int:
        return 4

    def fetch(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return (index[:, None] + torch.arange(5)) % 7

    def one_hot(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return functional.one_hot((self.fetch(index, dtype) + 1) % 7, 7).flatten(0, 1).to(dtype)


def make(model: f3.Sequential, data: TextLike, kind: type[Local]) -> F3Learner:
    index = torch.arange(len(data))
    model.prepare(data.fetch(index[:1], torch.float32), data.outputs, None, data.positions)
    model.read_by(1)
    updater = Updater(model, Arithmetic(RULE, eager, CPU))
    return F3Learner(model, data, updater, "cross-entropy", Signal("local-error"), local=kind("cross-entropy", model))


class Alive:
    """Counts the outputs of Linear stages that are in memory at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now: set[int] = set()
        self.most = 0
        original = f3.Linear.keep

        def keep(stage: f3.Linear, *arguments: object, **given: object) -> tuple:
            h, kept = original(stage, *arguments, **given)
            self.now.add(id(h))
            weakref.finalize(h, self.now.discard, id(h))
            self.most = max(self.most, len(self.now))
            return h, kept

        monkeypatch.setattr(f3.Linear, "keep", keep)


def test_activations_do_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for DFA, which shows that the count can see it."""
    alive = Alive(monkeypatch)

    def most(depth: int, **settings: object) -> int:
        trainer = trained(relu_mlp(depth), epochs=1, **settings)
        alive.now.clear()
        alive.most = 0
        trainer.learner.visit(Visit(torch.arange(8), torch.arange(8)), 0.01)
        return alive.most

    assert most(24, method="dfa") > 24
    for reach in (1, 2, 3):
        assert most(100, reach=reach) == most(6, reach=reach) <= reach + 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "f3", "reach": 2}, "reach 2 has no effect with the method 'f3'"),
        ({"method": "bp", "local_head": "own"}, "local head 'own' has no effect with the method 'bp'"),
        ({"reach": 0}, "reach must be a whole number of at least 1, got 0"),
        ({"local_head": "some"}, "local head 'some' is unknown; allowed: auto, own, shared"),
        ({"mask_target": True}, "mask target True has no effect with the method 'local'"),
        ({"error_rank": 2}, "error rank 2 has no effect with the method 'local'"),
        ({"local_head": "shared", "local_feedback": "random"}, "local feedback 'random' needs heads of the stages' own"),
        ({"error_dtype": "int8"}, "error dtype 'int8' has no effect where no error is kept"),
        ({"local_head": "shared", "local_head_depth": 3}, "shared heads: the last 4 stages can read the outputs"),
    ],
)
def test_settings_that_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(f3.InputError, match=message):
        trained(**settings)


def test_layers_taught_directly_are_refused() -> None:
    model = f3.models.ViT(8, 1, 3, 4, depth=1, heads=2, dim=8, mlp_width=8, granularity="layer")
    with pytest.raises(f3.InputError, match="granularity 'layer' does not go with local errors"):
        f3.Trainer(model, method="local", device="cpu").fit((torch.randn(9, 1, 8, 8), torch.arange(9) % 3), 1)


@pytest.mark.parametrize("kind", ["vit", "convnet"])
def test_other_networks(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "vit":
        model = f3.models.ViT(8, 1, 10, 4, depth=2, heads=2, dim=16, mlp_width=32, activation="gelu")
    else:
        model = f3.models.ConvNet((1, 8, 8), 10, [8, 16], 3, [32], "relu")
    train, _ = f3.load_dataset("digits", max_train_samples=600)
    images = train.inputs.reshape(-1, 1, 8, 8) / 16
    trainer = f3.Trainer(model, "cross-entropy", f3.Adam(lr=3e-3), method="local", device="cpu")
    first = trainer.fit((images, train.targets), 4, (images, train.targets)).history
    assert first[-1]["test_error"] < min(60, first[0]["test_error"])
    assert model.read == len(model.stages) - 2


# --- from the command line --------------------------------------------------------------------------------------------


def test_a_converted_model_learns_from_heads_of_its_own() -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)]
    model = nn.Sequential(*parts, nn.ReLU(), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10))
    train, test = (
        (part.inputs.view(-1, 1, 8, 8).float() / 16, part.targets) for part in f3.load_dataset(max_train_samples=600)
    )
    network = f3.convert(model, train[0][:2])
    trainer = f3.Trainer(network, "cross-entropy", f3.Adam(lr=5e-3), method="local", reach=2, device="cpu")
    assert trainer.fit(train, 5, test).history[-1]["test_error"] < 15
    assert network.exits == 3


def test_a_run_and_its_exits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = tmp_path / "run"
    small = ["--method", "local", "--hidden", "32x3", "--epochs", 4, "--lr", "3e-3"]
    assert run(*small, "--output-dir", run_folder, "--compare") == 0
    out = capsys.readouterr().out
    assert "MLP 64-32-32-32-10, method local, signal local-error" in out
    summary = json.loads((run_folder / "summary.json").read_text())
    assert list(summary["exits"]) == ["1", "2", "3", "mean"]
    assert summary["exits"]["3"] == summary["test_error"]
    _, test = f3.load_dataset("digits")
    for place in (1, 2, 3, "mean"):
        network = f3.load(run_folder, exit=place)
        wrong = 100 - 100 * float((network(test.inputs).argmax(1) == test.targets).double().mean())
        assert wrong == pytest.approx(summary["exits"][str(place)])
        assert run("--evaluate", run_folder, "--exit", place) == 0
        told = float(re.search(r"test error (\S+) \(exit", capsys.readouterr().out)[1])
        assert told == summary["exits"][str(place)]
    for place in (0, 4, "first"):
        message = f"exit must be a stage from 1 to 3, or mean, got {place!r}"
        assert message in fails(capsys, "--evaluate", run_folder, "--exit", place)
    assert "--exit has no effect without --evaluate" in fails(capsys, "--exit", 1)


def test_heads_that_are_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--method", "local", "--hidden", "16x2", "--epochs", 1, "--drop-heads"]
    assert run(*small, "--output-dir", tmp_path / "run") == 0
    assert not f3.load(tmp_path / "run").network.read
    assert "exit 1 has no effect" in fails(capsys, "--evaluate", tmp_path / "run", "--exit", 1)
    assert "--drop-heads has no effect" in fails(capsys, "--drop-heads")


def test_a_language_model_is_read_by_its_last_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    small = ["--text", text, "--method", "local", "--depth", 2, "--dim", 16, "--context", 16, "--epochs", 2, "--lr", "1e-2"]
    assert run(*small, "--output-dir", tmp_path / "run", "--tokens", 5) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["network"]["reading"] == 1
    assert list(summary["exits"]) == ["1", "2", "mean"]  # two blocks
    assert run("--evaluate", tmp_path / "run", "--exit", "mean") == 0
    for depth in (0, 1):
        own = ["--local-head", "own", "--local-head-depth", depth, "--output-dir", tmp_path / f"own-{depth}"]
        assert run(*small, *own, "--tokens", 5) == 0
        exits = json.loads((tmp_path / f"own-{depth}" / "summary.json").read_text())["exits"]
        assert list(exits) == ["1", "2", "mean"]
        for place in (1, "mean"):
            network = f3.load(tmp_path / f"own-{depth}", exit=place).network
            assert network(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 16, len(set(text.read_text())))
    budget = ["--dry-run", "--reach", 2]
    assert run(*small, *budget) == 0
    assert "FLOPs a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "broken",
    [
        {"exits": []},
        {"exits": {"shapes": [[16], [16]], "outputs": 10, "positions": 1}},
        {"exits": {"shapes": [[16]], "outputs": 10, "positions": 1, "depth": 0}},
        {"exits": {"shapes": [[16], [-1]], "outputs": 10, "positions": 1, "depth": 0}},
        {"exits": {"shapes": [[16], [16]], "outputs": True, "positions": 1, "depth": 0}},
        {"reading": 7},
        {"reading": "1"},
    ],
    ids=str,
)
def test_damaged_descriptions_are_refused(tmp_path: Path, broken: dict) -> None:
    assert run("--method", "local", "--hidden", "16x2", "--epochs", 1, "--output-dir", tmp_path / "run") == 0
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["network"] |= broken
    path.write_text(json.dumps(config))
    with pytest.raises(f3.InputError, match="network"):
        f3.load(tmp_path / "run")


@pytest.mark.parametrize(("sizes", "reach"), [("64x3", 1), ("64x3", 2), ("32x5", 3)])
def test_flops_are_those_of_the_formula(capsys: pytest.CaptureFixture[str], sizes: str, reach: int) -> None:
    width, depth = map(int, sizes.split("x"))
    assert run("--method", "local", "--hidden", sizes, "--dry-run", "--reach", reach) == 0
    told = int(re.search(r"FLOPs a step ([\d,]+)", capsys.readouterr().out)[1].replace(",", ""))
    layers = [(64, width), *[(width, width)] * (depth - 1), (width, 10)]
    products = sum(4 * 50 * k * n for k, n in layers)  # forward, and the weight's gradient
    heads = 6 * 50 * width * 10 * (depth - 1)
    passes = sum(min(reach - 1, depth - place) for place in range(1, depth))  # back through a hidden stage
    back = passes * 2 * 50 * width * width + 2 * 50 * width * 10  # and the output's own
    assert told == products + heads + back


def test_a_local_run_that_diverges_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert run("--method", "local", "--hidden", "8x2", "--epochs", 1, "--lr", 1e30, "--output-dir", folder) == 2
    assert "the loss became" in capsys.readouterr().err
    assert json.loads((folder / "summary.json").read_text())["status"] == "diverged"
