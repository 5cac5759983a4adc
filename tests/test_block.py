"""Stages of any module: a Block equals autograd and the rule, Layers what is done by hand; no weight gradient is made."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import f3triton as f3
from f3triton.kernels import eager
from f3triton.network.updater import Arithmetic, Updater, torch_optimizer

CPU = torch.device("cpu")


class Mixture(nn.Module):
    """Linear with and without bias, LayerNorm, convolution, BatchNorm, a bare parameter, one layer twice, one tied."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 2, 3, padding=1), nn.BatchNorm1d(2)
        self.first, self.twice = f3.Linear(6, 8, "tanh", bias=False), f3.Linear(8, 8, "gelu")
        self.layer_norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.randn(8))
        self.tied = f3.Linear(8, 8)
        self.also = nn.Linear(8, 8)
        self.also.weight = self.tied.weight
        self.last, self.checkpointed = f3.Linear(8, 5, "silu"), checkpointed

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.also(self.tied(self.layer_norm(self.twice(self.twice(self.first(x))))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        x = checkpoint(self.middle, x, use_reentrant=False) if self.checkpointed else self.middle(x)
        return self.last(x * self.scale)


def updater(module: nn.Module, rule: object) -> Updater:
    return Updater(module, Arithmetic(rule, eager, CPU))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("rule", [f3.SGD(lr=0.1, momentum=0.9), f3.AdamW(lr=0.01)])
def test_a_block_equals_autograd_and_the_rule(checkpointed: bool, rule: object) -> None:
    torch.manual_seed(0)
    block = f3.Block(Mixture(checkpointed)).double()
    twin = copy.deepcopy(block)
    x, error = torch.randn(7, 2, 6, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    block.eval().prepare(x[:1], 3, seed=1)
    block.train()
    twin.feedback_matrix = block.feedback_matrix
    work, optimizer = updater(block, rule), torch_optimizer(rule, list(twin.parameters()))
    for _ in range(3):
        h = block.learn(x, error, work.begin(rule.lr, 0.5))
        expected = twin(x)
        optimizer.zero_grad()
        (expected * (0.5 * error @ twin.feedback_matrix).view_as(expected)).sum().backward()
        optimizer.step()
        assert torch.allclose(h, expected, rtol=1e-10)
    for (name, ours), (_, theirs) in zip(block.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), name
        assert ours.grad is None
    for (name, ours), (_, theirs) in zip(block.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.allclose(ours.double(), theirs.double()), name


def test_no_weight_gradient_of_a_fused_linear_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the update where the gradient is formed, nothing of the weight's size is allocated in a step."""
    made = []

    def update(
        weight: torch.Tensor, bias: torch.Tensor | None, delta: torch.Tensor, x: torch.Tensor, *rest: object, **more: object
    ) -> None:
        made.append(tuple(weight.shape))

    def backward_update(
        weight: torch.Tensor, bias: torch.Tensor | None, delta: torch.Tensor, *rest: object, **more: object
    ) -> torch.Tensor:
        made.append(tuple(weight.shape))
        return delta @ weight

    monkeypatch.setattr(eager, "outer_product_update_", update)  # as a kernel would, they make no gradient
    monkeypatch.setattr(eager, "linear_backward_update_", backward_update)
    torch.manual_seed(0)
    block = f3.Block(nn.Sequential(f3.Linear(300, 400, "tanh"), nn.LayerNorm(400), f3.Linear(400, 300)))
    x, error = torch.randn(4, 300), torch.randn(4, 3)
    block.prepare(x, 3, seed=1)
    step = updater(block, f3.Adam()).begin(1e-3)
    sizes = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
            out = function(*args, **(kwargs or {}))
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                    sizes.append(tensor.numel())
            return out

    with Record():
        block.learn(x, error, step)
    assert made == [(300, 400), (400, 300)]
    assert sizes
    assert max(sizes) < 300 * 400


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = f3.LayerNorm(6), f3.Linear(6, 18, bias=False), f3.Linear(6, 6, "tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(torch.softmax(q @ k.transpose(1, 2), -1) @ v)


@pytest.mark.parametrize("shape", ["full", "shared"])
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("current", [False, True])
def test_layers_are_taught_at_their_own_outputs(shape: str, by_token: bool, current: bool) -> None:
    """Each layer's gradient is that of `sum(h * e B)` at its own output, with its input held fixed."""
    torch.manual_seed(0)
    stage = f3.Layers(Attends()).double()
    for layer in (stage.module.norm, stage.module.qkv, stage.module.out):
        layer.feedback_shape = shape
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    error = torch.randn(20 if by_token else 4, 3, dtype=torch.float64)
    stage.prepare(x[:1], 3, seed=1, positions=5 if by_token else 1)
    twin = copy.deepcopy(stage.module)

    def signal(layer: f3.Stage, h: torch.Tensor) -> torch.Tensor:
        rows = error.view(4, 5, 3) if by_token else error[:, None].expand(4, 5, 3)
        if shape == "shared":
            return rows @ layer.feedback_matrix
        matrices = layer.feedback_matrix.view(3, 5, -1)  # one for each token
        return torch.stack([rows[:, t] @ matrices[:, t] for t in range(5)], 1)

    loss = 0.0
    h = x
    normal = twin.norm(h)
    loss = loss + (normal * signal(stage.module.norm, normal)).sum()
    mixed = twin.qkv(normal.detach())
    loss = loss + (mixed * signal(stage.module.qkv, mixed)).sum()
    q, k, v = mixed.detach().chunk(3, -1)
    out = twin.out(torch.softmax(q @ k.transpose(1, 2), -1) @ v)
    loss = loss + (out * signal(stage.module.out, out)).sum()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    loss.backward()
    optimizer.step()

    step = updater(stage, f3.SGD(lr=0.01)).begin(0.01)
    with torch.no_grad():
        if current:
            y, kept = stage.keep(x, step)
            stage.teach(kept, error, step)
        else:
            y = stage.learn(x, error, step)
    assert torch.allclose(y, x + out)
    for (name, ours), (_, theirs) in zip(stage.module.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("shape", ["full", "shared"])
def test_a_signal_in_the_shape_of_images(shape: str) -> None:
    block = f3.Block(nn.Conv2d(1, 4, 3, padding=1), feedback_shape=shape)
    h = block.prepare(torch.randn(1, 1, 5, 5), 3, seed=1)
    error = torch.randn(6, 3)
    signal = block.error_signal(error, h.expand(6, -1, -1, -1))
    flat = error @ block.feedback_matrix
    assert torch.allclose(signal, flat.view(6, 4, 5, 5) if shape == "full" else flat[:, :, None, None].expand(6, 4, 5, 5))


def test_refusals() -> None:
    class Pair(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple:
            return super().forward(x), x

    class Growing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y if len(x) < 8 else torch.cat([y, y], 1)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = f3.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    data = torch.randn(20, 6), torch.arange(20) % 3
    for stage, message in (
        (f3.Block(Pair(6, 6)), "must return one tensor, but Pair returned a tuple"),
        (f3.Block(Growing(6, 6)), r"gave outputs of shape \[6\] a sample before, and now \[12\]"),
        (f3.Layers(nn.Linear(6, 6)), "parameter 'module.weight' is in no Linear or LayerNorm of f3triton"),
        (f3.Layers(Twice()), "called twice in one pass"),
    ):
        with pytest.raises(f3.InputError, match=message):
            f3.Trainer(f3.Sequential(stage, f3.Linear(6, 3)), device="cpu", batch_size=10).fit(data, 1)
    with pytest.raises(f3.InputError, match="Layers cannot be the last stage"):
        f3.Trainer(f3.Sequential(f3.Linear(6, 6), f3.Layers(f3.Linear(6, 3))), device="cpu").fit(data, 1)


@pytest.mark.parametrize("method", ["f3", "drtp", "dfa", "bp"])
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_a_vit_learns(method: str, granularity: str) -> None:
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(120) % 3
    x = torch.randn(3, 1, 8, 8, generator=generator)[y] + 0.3 * torch.randn(120, 1, 8, 8, generator=generator)
    torch.manual_seed(0)
    model = f3.models.ViT(8, 1, 3, 4, depth=2, heads=2, dim=8, mlp_width=16, granularity=granularity, dropout=0.1)
    trainer = f3.Trainer(model, "cross-entropy", f3.Adam(lr=3e-3), method=method, device="cpu", batch_size=20)
    history = trainer.fit((x, y), 15, (x, y)).history
    assert history[-1]["test_error"] < 5


def test_layers_never_enter_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: pytest.fail("autograd ran"))
    model = f3.Sequential(f3.Layers(f3.models.TransformerBlock(8, 2, 16)), f3.Block(nn.Flatten()), f3.Linear(32, 3))
    trainer = f3.Trainer(model, "cross-entropy", device="cpu", batch_size=10)
    trainer.fit((torch.randn(20, 4, 8), torch.arange(20) % 3), 2)
