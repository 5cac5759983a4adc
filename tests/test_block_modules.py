"""Blocks against torch's own autograd and optimizers in float64; feedback shapes; layers that are taught directly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import f3triton as f3
from f3triton.kernels import eager
from f3triton.network.updater import Arithmetic, Step, Updater, torch_optimizer


class Twice(nn.Module):
    """One linear layer called twice, and another one whose weight the forward uses by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), f3.Linear(6, 6, "tanh"), nn.LayerNorm(6)
        self.c = nn.Linear(6, 6, bias=False)
        self.c.weight = self.b.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.c(self.b(self.a(torch.relu(self.a(x))))))


class Recomputed(nn.Module):
    """A block with activation checkpointing of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + checkpoint(self.inner, x, use_reentrant=False)


class Convolved(nn.Module):
    """Convolution and batch normalisation, one frozen layer, one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv1d(5, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.frozen, self.unused = nn.Linear(6, 6), nn.Linear(2, 2)
        self.frozen.weight.requires_grad_(False)
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.frozen(self.norm(self.convolution(x))))


class Elsewhere(nn.Module):
    """A forward that uses a layer's weight by itself too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(torch.tanh(functional.linear(self.b(functional.linear(x, self.a.weight)), self.a.weight)))


MODULES = {
    "elsewhere": Elsewhere,
    "transformer": lambda: f3.models.TransformerBlock(6, 2, 12, head_dim=5),
    "causal-rms": lambda: f3.models.TransformerBlock(6, 3, 12, activation="silu", norm="rms", causal=True),
    "plain": lambda: f3.models.TransformerBlock(6, 1, 12, activation="tanh", norm="none"),
    "torch-encoder": lambda: nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True),
    "twice": Twice,
    "recomputed": Recomputed,
    "convolved": Convolved,
}
RULES = {"adam": f3.Adam(lr=1e-2, weight_decay=0.1), "sgd": f3.SGD(lr=1e-2, momentum=0.9)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODULES)
def test_equals_autograd_and_the_optimizer(name: str, rule: str) -> None:
    torch.manual_seed(0)
    ours = f3.Block(MODULES[name]()).double()
    theirs = copy.deepcopy(ours.module)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch_optimizer(RULES[rule], parameters)
    updater = Updater(ours, Arithmetic(RULES[rule], eager, torch.device("cpu")))
    for _ in range(3):
        x, seed = torch.randn(4, 5, 6).double(), torch.randn(4, 5, 6).double()
        step = updater.begin(RULES[rule].lr)
        h, kept = ours.keep(x, step)
        expected = theirs(x)
        torch.testing.assert_close(h, expected, rtol=0, atol=1e-12)
        seed = seed[..., : h.shape[-1]][:, : h.shape[1]]
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(expected, parameters, seed, allow_unused=True), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
        ours.finish(kept, seed, step)
    for (key, one), other in zip(ours.module.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
    assert all(p.grad is None for p in ours.parameters())
    assert "forward" not in vars(getattr(ours.module, "linear1", ours.module))  # torch's own layers are as they were


@pytest.mark.parametrize("name", ["transformer", "torch-encoder"])
def test_no_weight_gradient_of_a_linear_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd never accumulates into a linear layer's weight, and every such layer goes through a fused operation, once."""
    ours = f3.Block(MODULES[name]())
    layers = [m for m in ours.modules() if isinstance(m, nn.Linear | f3.Linear) and type(m).__name__ == "Linear"]
    updater = Updater(ours, Arithmetic(f3.SGD(lr=0.1), eager, torch.device("cpu")))
    updated, applied = [], []
    for operation in ("linear_backward_update_", "outer_product_update_"):
        original = getattr(eager, operation)

        def spy(weight: torch.Tensor, *rest: object, original: object = original, **named: object) -> object:
            if not any(weight is other for other in updated):  # the one calls the other
                updated.append(weight)
            return original(weight, *rest, **named)

        monkeypatch.setattr(eager, operation, spy)
    step, apply = updater.begin(0.1), Step.apply
    monkeypatch.setattr(Step, "apply", lambda self, p, gradient: applied.append(p) or apply(self, p, gradient))
    h, kept = ours.keep(torch.randn(2, 4, 6), step)
    ours.finish(kept, torch.ones_like(h), step)
    assert len(layers) >= 2
    for layer in layers:
        assert sum(weight is layer.weight for weight in updated) == 1
        assert not any(p is layer.weight or p is layer.bias for p in applied)


# --- layers taught directly -------------------------------------------------------------------------------------------


def test_layers_are_taught_at_their_own_outputs() -> None:
    """Against a twin, whose layers are found by hooks and updated by hand: no gradient passes from one to another."""
    torch.manual_seed(0)
    ours = f3.Layers(f3.models.TransformerBlock(6, 2, 9, head_dim=4, activation="tanh")).double()
    theirs = copy.deepcopy(ours.module)
    x, error = torch.randn(4, 5, 6).double(), torch.randn(4, 3).double()
    with torch.no_grad():
        ours.prepare(x[:1], 3, seed=7)
        matrices = {
            name: stage.feedback_matrix.double() for name, stage in ours.module.named_modules() if isinstance(stage, f3.Stage)
        }
    assert len({tuple(m.shape) for m in matrices.values()}) > 2
    assert len(matrices) == 6  # two norms, four linear layers

    inputs: dict[str, torch.Tensor] = {}
    for name in matrices:
        layer = theirs.get_submodule(name)
        layer.register_forward_hook(lambda _, args, __, name=name: inputs.__setitem__(name, args[0].detach()))
    expected = theirs(x)
    with torch.no_grad():
        for name, matrix in matrices.items():
            layer, came = theirs.get_submodule(name), inputs[name]
            signal = 0.5 * (error @ matrix).reshape(4, 5, -1)
            if isinstance(layer, f3.Linear):
                a = functional.linear(came, layer.weight, layer.bias)
                delta = signal * (1 - torch.tanh(a) ** 2 if layer.activation == "tanh" else 1.0)
                gradients = [torch.einsum("mtn,mtk->nk", delta, came), delta.sum((0, 1))]
            else:
                normal = (came - came.mean(-1, keepdim=True)) / (came.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
                gradients = [(signal * normal).sum((0, 1)), signal.sum((0, 1))]
            for parameter, gradient in zip((layer.weight, layer.bias), gradients, strict=True):
                if parameter is not None:
                    parameter -= 0.1 * gradient

    twin = copy.deepcopy(ours)

    def refuse(*_: object) -> None:
        raise AssertionError("autograd kept a tensor")

    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        updater = Updater(ours, Arithmetic(f3.SGD(lr=0.1), eager, torch.device("cpu")))
        step = updater.begin(0.1, 0.5)
        h = ours.learn(x, error, step)  # delayed signals: on the way
        later = Updater(twin, Arithmetic(f3.SGD(lr=0.1), eager, torch.device("cpu")))
        late = later.begin(0.1, 0.5)
        h2, kept = twin.keep(x, late)  # current signals: after the whole forward pass
        twin.teach(kept, error, late)
    torch.testing.assert_close(h, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(h2, expected, rtol=0, atol=1e-12)
    for (name, one), two, other in zip(ours.named_parameters(), twin.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(two, other, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_what_layers_cannot_teach_is_refused() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.a = nn.Parameter(torch.zeros(6)), f3.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x + self.position)

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = f3.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.a(x))

    with pytest.raises(f3.InputError, match=r"'module\.position' is in no"):
        fit(f3.Sequential(f3.Layers(Positions()), f3.Linear(6, 3)))
    with pytest.raises(f3.InputError, match="called twice"):
        fit(f3.Sequential(f3.Layers(Repeated()), f3.Linear(6, 3)))
    with pytest.raises(f3.InputError, match="cannot be the last stage"):
        fit(f3.Sequential(f3.Linear(6, 6), f3.Layers(f3.Linear(6, 3))))


# --- feedback shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "output", "rows", "formula"),
    [
        ("full", (4, 5, 6), 4, "mc,ctd->mtd"),  # an error a sample, a matrix for all tokens
        ("shared", (4, 5, 6), 4, "mc,cd->mtd"),
        ("full", (4, 5, 6), 20, "mtc,ctd->mtd"),  # an error a token, a matrix for each position
        ("shared", (4, 5, 6), 20, "mtc,cd->mtd"),
        ("full", (4, 5, 3, 2), 4, "mc,cdhw->mdhw"),  # images
        ("shared", (4, 5, 3, 2), 4, "mc,cd->mdhw"),
        ("shared", (4, 6), 4, "mc,cd->md"),
    ],
)
def test_feedback_shapes(shape: str, output: tuple[int, ...], rows: int, formula: str) -> None:
    stage = f3.Block(nn.Identity(), f3.Feedback("kaiming"), feedback_shape=shape)
    h, error = torch.randn(output).double(), torch.randn(rows, 3).double()
    stage.prepare(h[:1], 3, seed=5)
    matrix = stage.feedback_matrix.double()
    left, right = formula.split("->")[0].split(",")
    sizes = dict(zip(formula.split("->")[1], output, strict=True)) | {"c": 3}
    assert matrix.numel() == torch.Size([sizes[letter] for letter in right]).numel()
    tensors = [one.reshape([sizes[k] for k in letters]) for one, letters in ((error, left), (matrix, right))]
    letters = formula.split("->")[1]
    missing = [letter for letter in letters if letter not in left + right]
    tensors.append(torch.ones([sizes[letter] for letter in missing], dtype=torch.float64))
    expected = torch.einsum(f"{left},{right},{''.join(missing)}->{letters}", tensors[0], tensors[1], tensors[2])
    torch.testing.assert_close(stage.error_signal(error, h, 0.5), 0.5 * expected)


# --- Block as a stage -------------------------------------------------------------------------------------------------


def fit(model: f3.Sequential, method: str = "f3", x: torch.Tensor | None = None, **settings: object) -> f3.Trainer:
    """Two steps on twelve samples."""
    torch.manual_seed(0)
    x = torch.randn(12, 6) if x is None else x
    trainer = f3.Trainer(model, "cross-entropy", f3.SGD(lr=0.1), method=method, device="cpu", batch_size=6, **settings)
    trainer.fit((x, torch.arange(12) % 3), 1)
    return trainer


class Counted(nn.Module):
    """A module that counts its passes and records what batch normalisation sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.passes = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += self.training
        return self.drop(self.norm(self.a(x)))


@pytest.mark.parametrize("method", ["f3", "drtp", "dfa", "sdfa", "last-layer", "bp"])
def test_one_forward_pass_a_step(method: str) -> None:
    module = Counted()
    fit(f3.Sequential(f3.Block(module), f3.Linear(6, 3)), method)
    assert module.passes == 2
    assert module.norm.num_batches_tracked == 2


def test_dropout_drops_the_same_in_both_directions() -> None:
    torch.manual_seed(0)
    block = f3.Block(nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5)))
    updater = Updater(block, Arithmetic(f3.SGD(lr=1.0), eager, torch.device("cpu")))
    step = updater.begin(1.0)
    before = block.module[0].bias.detach().clone()
    h, kept = block.keep(torch.randn(1, 6), step)
    block.finish(kept, torch.ones_like(h), step)
    moved = (block.module[0].bias != before).detach()
    assert torch.equal(moved, h[0] != 0)
    assert 10 < moved.sum() < 40


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns(precision: str) -> None:
    model = f3.Sequential(f3.Block(f3.models.TransformerBlock(6, 2, 12)), f3.Block(nn.Flatten()), f3.Linear(30, 3))
    x = torch.randn(12, 5, 6)
    exact = copy.deepcopy(model)
    fit(model, x=x, precision=precision)
    fit(exact, x=x)
    for (name, one), other in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other[1], rtol=0.05, atol=0.05, msg=lambda text, name=name: f"{name}: {text}")


def test_errors_of_blocks() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    class Varying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x)[:, : 6 if len(x) == 1 else 5]

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x).detach()

    last = f3.Linear(6, 3)
    with pytest.raises(f3.InputError, match="stage 0: the module of a Block must return one tensor, but Pair returned a tuple"):
        fit(f3.Sequential(f3.Block(Pair()), last))
    with pytest.raises(f3.InputError, match=r"gave outputs of shape \[6\] a sample before, and now \[5\]"):
        fit(f3.Sequential(f3.Block(Varying()), last))
    with pytest.raises(f3.InputError, match="Detached in a Block cuts the gradient"):
        fit(f3.Sequential(f3.Block(Detached()), last))
    with pytest.raises(f3.InputError, match="needs more range than float16 has"):
        fit(f3.Sequential(f3.Linear(6, 6), f3.Block(nn.Linear(6, 3))), precision="float16")
    with pytest.raises(f3.InputError, match="feedback shape 'wide' is unknown; allowed: full, shared"):
        f3.Block(nn.Linear(6, 6), feedback_shape="wide")
    with pytest.raises(f3.InputError, match="4 heads do not divide the dimension 6"):
        f3.models.TransformerBlock(6, 4, 12)
    with pytest.raises(f3.InputError, match="norm 'batch' is unknown; allowed: layer, rms, none"):
        f3.models.TransformerBlock(6, 2, 12, norm="batch")
