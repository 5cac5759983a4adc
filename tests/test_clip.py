"""Limited norms: every layer's gradient is the unlimited one, scaled; also where it is never formed."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import f3triton as f3
from f3triton.kernels import eager
from f3triton.network.clip import squared_norm
from f3triton.network.updater import Arithmetic, Updater, torch_optimizer
from f3triton.run.result import FitResult
from f3triton.run.tally import Diverged

CPU = torch.device("cpu")
LIMIT = 0.05


def limited(*gradients: torch.Tensor) -> list[torch.Tensor]:
    """What gradients with one norm are when it is at most LIMIT."""
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    return [gradient * min(1.0, LIMIT / max(norm.item(), 1e-300)) for gradient in gradients]


@pytest.mark.parametrize("rows", [1, 5, 200])  # by products of rows, or the gradient itself
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_the_gradient(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    delta, x = torch.randn(rows, 30).to(dtype), torch.randn(rows, 20).to(dtype)
    layer = nn.Linear(20, 30).double()
    (layer(x.double()) * delta.double()).sum().backward()
    weight, bias = layer.weight.grad.square().sum(), layer.bias.grad.square().sum()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.allclose(squared_norm(delta, x, True).double(), weight + bias, rtol=tolerance)
    assert torch.allclose(squared_norm(delta, x, False).double(), weight, rtol=tolerance)


@pytest.mark.parametrize("rows", [4, 200])
@pytest.mark.parametrize("rule", [f3.SGD(lr=0.1, momentum=0.9), f3.AdamW(lr=0.01)])
@pytest.mark.parametrize(
    "module", [nn.Linear(6, 5), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))]
)
def test_a_stage_equals_autograd_explicit_limits_and_the_rule(module: nn.Module, rule: object, rows: int) -> None:
    torch.manual_seed(0)
    module = copy.deepcopy(module).double()
    plain = isinstance(module, nn.Linear)
    stage = f3.Linear(6, 5).double() if plain else f3.Block(module)
    stage.load_state_dict(module.state_dict() if plain else copy.deepcopy(stage.state_dict()))
    twin = copy.deepcopy(module)
    x, error = torch.randn(rows, 6, dtype=torch.float64), torch.randn(rows, 3, dtype=torch.float64)
    stage.prepare(x[:1], 3, seed=1)
    work = Updater(stage, Arithmetic(rule, eager, CPU, clip_norm=LIMIT))
    optimizer = torch_optimizer(rule, list(twin.parameters()))
    for _ in range(3):
        stage.learn(x, error, work.begin(rule.lr))
        optimizer.zero_grad()
        (twin(x) * (error @ stage.feedback_matrix)).sum().backward()
        for part in twin.modules():
            own = list(part.parameters(recurse=False))
            for layer in [own] if isinstance(part, nn.Linear) and own else [[p] for p in own]:
                for p, gradient in zip(layer, limited(*(p.grad for p in layer)), strict=True):
                    p.grad = gradient
        optimizer.step()
    for ours, theirs in zip(stage.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


MLP = {"sizes": [6, 8, 7, 3]}
MIXED = {"method": "local", "local_head": "own"}


@pytest.mark.parametrize(
    "settings",
    [{"method": m} for m in ("f3", "drtp", "dfa", "last-layer", "fa", "bp")]
    + [MIXED, {**MIXED, "local_feedback": "random"}, {**MIXED, "reach": 2}, {"pipeline": "threads:2"}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_step_of_every_method_is_the_unlimited_one_scaled(settings: dict) -> None:
    """One step of SGD at a rate of 1 moves a parameter by its gradient."""
    torch.manual_seed(0)
    data = torch.randn(12, 6), torch.randint(3, (12,))
    common = f3.Settings(optimizer="sgd", lr=1.0, lr_schedule="constant", precision="float64", batch_size=12, **settings)

    def moved(limit: float | None) -> dict[str, torch.Tensor]:
        model = f3.models.MLP(**MLP, seed=1)
        trainer = f3.Trainer(model, settings=dataclasses.replace(common, clip_norm=limit))
        trainer.check(data, None, 1)
        before = copy.deepcopy(model.state_dict())
        trainer.fit(data, epochs=1)
        return {name: before[name] - after for name, after in model.state_dict().items()}

    gradients, found = moved(None), moved(LIMIT)
    largest = 0.0
    for name in [name for name in gradients if name.endswith("weight")]:
        names = [name, name.removesuffix("weight") + "bias"]
        largest = max(largest, gradients[name].norm().item())
        for own, expected in zip(names, limited(*(gradients[one] for one in names)), strict=True):
            assert torch.allclose(found[own], expected, rtol=1e-9, atol=1e-14), own
    assert largest > 2 * LIMIT  # else nothing was limited


def test_a_run_that_diverges_and_one_that_limits_save() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 8)
    x[7] *= 1e6
    data = x, x[:, :1].clamp(-3, 3)

    def train(limit: float | None) -> FitResult:
        model = f3.models.MLP([8, 16, 16, 1], activation="relu", seed=0)
        return f3.Trainer(model, optimizer="sgd", lr=0.1, clip_norm=limit).fit(data, epochs=20)

    with pytest.raises(Diverged):
        train(None)
    history = train(1.0).history
    assert history[-1]["train_loss"] < history[0]["train_loss"]
