"""The budget of a run: an MLP's is a closed formula, and any network's FLOPs are those that torch counts in a real step."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import f3triton as f3
from f3triton.base.precision import resolve_precision
from f3triton.kernels import eager, new_state
from f3triton.kernels.moments import MOMENTS
from f3triton.learn.signal import Signal, resolve_signal
from f3triton.models.build import build
from f3triton.run.budget import Budget, describe, estimate
from f3triton.run.dry_run import budget_of

METHODS = ("f3", "drtp", "dfa", "bp", "last-layer")
CLASSES, BATCH = 10, 8
SIZES = {"image_size": 8, "patch_size": 4, "depth": 2, "heads": 2, "dim": 16, "mlp_width": 24}
VIT = {"model": "vit", "channels": 1, "classes": CLASSES, **SIZES}
NETWORKS = {
    "mlp": {"model": "mlp", "sizes": [64, 50, 30, CLASSES]},
    "convnet": {"model": "convnet", "image": [1, 8, 8], "classes": CLASSES, "channels": [4], "hidden": [20], "kernel_size": 3},
    "vit": VIT,
    "vit, shared": {**VIT, "embedding": "patch", "pool": "mean", "feedback_shape": "shared"},
    "vit, layer by layer": {**VIT, "granularity": "layer"},
}


def shapes_need(network: dict[str, object], x: torch.Tensor, method: str, **settings: object) -> Budget:
    with torch.device("meta"):
        shapes = build(network)
    return estimate(shapes, x.to("meta"), f3.Adam(), resolve_signal(method, None), **settings)


def mlp_by_hand(sizes: list[int], batch: int, signal: Signal | None, width: int) -> tuple[int, dict[str, int]]:
    """FLOPs, and elements by purpose, of an MLP with biases and tanh, whose slope is taken from its output, under Adam.

    Products of a layer with K inputs and N outputs, M = `batch`: forward 2MKN, weight gradient 2MKN, feedback 2MCN, and in
    backpropagation the input gradient 2MKN but for the first layer.
    """
    layers = list(itertools.pairwise(sizes))
    weights, parameters = [k * n for k, n in layers], sum(k * n + n for k, n in layers)
    forward, feedback, taught = sum(2 * batch * weight for weight in weights), width * sum(sizes[1:-1]), parameters
    chunks = [min(k * n, max(k, eager.SCRATCH)) for k, n in layers]
    if signal is None:
        flops, feedback, gradients = 3 * forward - 2 * batch * weights[0], 0, parameters
        activations = sum(sizes) + max(sizes[1:])  # everything, and the gradient on its way
    elif signal.source == "none":
        flops, feedback, taught = forward + 2 * batch * weights[-1], 0, weights[-1] + sizes[-1]
        gradients = chunks[-1]
        activations = max(*(k + n for k, n in layers[:-1]), sizes[-2] + 2 * sizes[-1])  # hidden layers have no signal
    else:
        flops, gradients = 2 * forward + 2 * batch * feedback, max(chunks)
        one_layer = max(k + 2 * n for k, n in layers)  # input, output and signal
        activations = sum(sizes) + max(sizes[1:]) if signal.current else one_layer
    memory = {"weights": parameters, "moments": 2 * taught, "gradients": gradients, "feedback": feedback}
    return flops, memory | {"activations": batch * activations}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [[64, 500, 10], [7, 2000, 1000, 3], [5, 40, 30, 20, 10]])
def test_an_mlp_needs_what_the_formula_says(method: str, sizes: list[int]) -> None:
    found = shapes_need({"model": "mlp", "sizes": sizes}, torch.zeros(32, sizes[0]), method, error_bytes=5, data_bytes=6)
    flops, elements = mlp_by_hand(sizes, 32, resolve_signal(method, None), sizes[-1])
    assert found.flops == flops
    assert found.parameters == elements["weights"]
    assert found.memory == {name: 4 * count for name, count in elements.items()} | {"errors": 5, "data": 6}


def test_generated_feedback_takes_no_memory_and_errors_of_low_rank_less() -> None:
    sizes = [64, 500, 300, 10]
    network, x = {"model": "mlp", "sizes": sizes}, torch.zeros(32, 64)
    full, generated = shapes_need(network, x, "f3"), shapes_need({**network, "feedback_shape": "generated"}, x, "f3")
    assert full.memory["feedback"] == 4 * 10 * 800
    assert generated == replace(full, memory=full.memory | {"feedback": 0})
    low = shapes_need(network, x, "f3", rank=3)
    assert low.memory == full.memory | {"feedback": 4 * (3 * 800 + 10 * 3)}  # and the projection
    assert full.flops - low.flops == 2 * 32 * ((10 - 3) * 800 - 10 * 3)
    with pytest.raises(f3.InputError, match="rank"):
        shapes_need(network, x, "f3", rank=11)


def test_bytes_follow_the_precision() -> None:
    x, network = torch.zeros(32, 64), NETWORKS["mlp"]
    plain = shapes_need(network, x, "f3").memory
    factors = {"float64": (2, 2, 2), "bfloat16": (1, 1, 0.5), "bfloat16-weights": (0.5, 1, 0.5)}
    for word, (weights, moments, activations) in factors.items():
        found = shapes_need(network, x, "f3", types=resolve_precision(word, torch.device("cpu"), "f3")).memory
        wanted = {"weights": weights, "feedback": weights, "moments": moments, "activations": activations}
        assert {name: found[name] / plain[name] for name in wanted} == wanted, word


@pytest.mark.parametrize("word", MOMENTS)
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_moments_take_what_the_budget_says(network: dict[str, object], word: str) -> None:
    x = torch.zeros(32, *([64] if network["model"] == "mlp" else [1, 8, 8]))
    states = [new_state(p, f3.Adam(), moments=word) for p in build(network).parameters()]
    bytes_ = sum(t.nbytes for state in states for t in (*state.moments, *state.scales))
    assert shapes_need(network, x, "f3", moments=word).memory["moments"] == bytes_


def test_a_slope_from_the_input_keeps_that_as_well() -> None:
    tanh, gelu = (shapes_need({**NETWORKS["mlp"], "activation": word}, torch.zeros(1, 64), "f3") for word in ("tanh", "gelu"))
    assert gelu.memory["activations"] - tanh.memory["activations"] == 4 * 50


def flops_of_a_step(network: dict[str, object], data: f3.Dataset, method: str, rank: int | None) -> int:
    """What torch counts in a run of two steps less what it counts in one of one."""
    counts = []
    for steps in (1, 2):
        trainer = f3.Trainer(build(network), method=method, batch_size=BATCH, error_rank=rank, device="cpu")
        # Torch counts no fused attention on a CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            trainer.fit(data, 1, batches=lambda epoch, steps=steps: [torch.arange(BATCH)] * steps)
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_flops_are_those_of_a_real_step(name: str, method: str) -> None:
    rank = 3 if method in ("f3", "dfa") else None
    x = torch.randn(BATCH, *((64,) if name == "mlp" else (1, 8, 8)))
    data = f3.Dataset.from_tensors(x, torch.arange(BATCH) % CLASSES, classes=CLASSES)
    counted = flops_of_a_step(NETWORKS[name], data, method, rank)
    assert counted > 0
    assert shapes_need(NETWORKS[name], x, method, rank=rank).flops == counted


@pytest.mark.parametrize("shape", ["shared", "full"])
@pytest.mark.parametrize("method", ["f3", "dfa", "bp"])
def test_flops_of_a_language_model(method: str, shape: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    data, _ = f3.load_text(str(path), context=16)
    sizes = {"vocabulary": data.outputs, "context": 16, "depth": 2, "heads": 2, "dim": 16}
    network = {"model": "gpt", **sizes, "feedback_shape": shape}
    counted = flops_of_a_step(network, data, method, None)
    found = shapes_need(network, torch.zeros(BATCH, 16, dtype=torch.int64), method)
    assert found.flops == counted
    matrices = 0 if method == "bp" else data.outputs * 3 * 16 * (16 if shape == "full" else 1)  # of embedding and two blocks
    assert found.memory["feedback"] == 4 * matrices


def test_f3_needs_one_stage_and_the_others_all() -> None:
    def activations(method: str, depth: int) -> int:
        network = {**VIT, "depth": depth, "embedding": "patch"}
        return shapes_need(network, torch.zeros(BATCH, 1, 8, 8), method).memory["activations"]

    assert activations("f3", 3) == activations("f3", 12)
    for method in ("dfa", "bp"):
        steps = {activations(method, depth + 1) - activations(method, depth) for depth in (3, 6, 12)}
        assert len(steps) == 1
        assert min(steps) > activations("f3", 3) / 2


def test_the_budget_in_words() -> None:
    lines = describe(shapes_need({"model": "mlp", "sizes": [64, 500, 10]}, torch.zeros(50, 64), "f3", error_bytes=2048))
    assert lines[1].split() == ["1", "Linear", "64", "500", "32,500"]
    assert lines[-1].split()[0] == "total"
    assert next(line for line in lines if "errors" in line).split() == ["errors", "2.0", "KiB"]


def peak(run: Callable[[], object]) -> int:
    """The most bytes of tensors that were alive at a time, beyond those that were before: what torch's allocator tells."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def data_of(network: dict[str, object], samples: int, folder: Path) -> f3.Dataset:
    if network["model"] == "gpt":
        path = folder / f"{samples}.txt"
        path.write_text("".join(chr(48 + i * i % 61) for i in range(32 * samples + 1)))
        return f3.load_text(str(path), context=32, max_train_samples=samples)[0]
    shape = [64] if network["model"] == "mlp" else [1, 8, 8]
    return f3.Dataset.from_tensors(torch.randn(samples, *shape), torch.arange(samples) % CLASSES, classes=CLASSES)


@pytest.mark.parametrize("changes", [{}, {"method": "bp"}, {"method": "local"}, {"moments": "int8"}], ids=str)
@pytest.mark.parametrize("model", ["mlp", "vit", "gpt"])
def test_the_peak_of_a_run_is_the_budget(model: str, changes: dict[str, object], tmp_path: Path) -> None:
    """Every tensor of a run, evaluations included; to a twentieth, though it is nearer to a two-hundredth."""
    network = NETWORKS[model] if model != "gpt" else {"model": "gpt", "context": 32, "depth": 2, "heads": 2, "dim": 32}
    network = {**network, "sizes": [64, 300, 200, CLASSES]} if model == "mlp" else network
    train, test = (data_of(network, samples, tmp_path) for samples in (600, 100))
    network = {**network, "vocabulary": train.outputs} if model == "gpt" else network
    settings = f3.Settings(**{"optimizer": f3.Adam(), "batch_size": 20, "device": "cpu", **changes})
    errors = 4 * 600 * train.positions * train.outputs if settings.keeps_errors else 0
    budget = budget_of(settings, network, (train, test), errors, rehearsed=True)
    with ThreadPoolExecutor(1) as fresh:  # a thread has the buffers of its earlier runs
        run = lambda: f3.Trainer(build(network), settings=settings).fit(train, 1, test)  # noqa: E731
        found = fresh.submit(peak, run).result()
    assert budget.total_bytes - budget.memory["data"] == pytest.approx(found, rel=0.05)
    assert min(budget.memory.values()) >= 0


@pytest.mark.parametrize("method", ["f3", "bp", "local"])
def test_memory_is_the_budget_of_a_model(method: str) -> None:
    model, x = f3.models.MLP([64, 500, 10], seed=1), torch.zeros(50, 64)
    before = list(model.state_dict())
    found = f3.memory(model, x, method, samples=100, optimizer="adam")
    if method != "local":
        expected = shapes_need({"model": "mlp", "sizes": [64, 500, 10]}, x, method).memory
        expected |= {"errors": 100 * 10 * 4 if method == "f3" else 0}
        assert 0 < found["gradients"] <= expected["gradients"]  # of backpropagation, activations are gone before all are there
        same = expected.keys() - {"data", "gradients"}
        assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert "data" not in found
    assert found["activations"] > 0
    assert list(model.state_dict()) == before
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_memory_of_a_plain_module_counts_one_stage() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    assert f3.memory(plain, torch.zeros(4, 8), "bp")["weights"] == 4 * (8 * 16 + 16 + 16 * 3 + 3)


def test_without_the_private_parts_of_torch_there_is_the_budget_by_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = f3.models.MLP([20, 30, 4]), torch.zeros(8, 20)
    whole = f3.memory(model, x, samples=100)
    monkeypatch.setitem(sys.modules, "f3triton.run.rehearsal", None)  # as where what it imports is not there
    plain = f3.memory(model, x, samples=100)
    assert "rest" in whole
    assert "rest" not in plain
    assert {name: whole[name] for name in ("weights", "moments", "feedback", "errors")} == {
        name: plain[name] for name in ("weights", "moments", "feedback", "errors")
    }
