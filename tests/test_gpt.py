"""Language models: GPT against a second formulation under autograd, error rows by token, and what a model may see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import f3triton as f3
from f3triton.data.text import TextDataset
from f3triton.network.linear import Linear
from f3triton.network.norm import LayerNorm

TEXT = "the quick brown fox jumps over the lazy dog; " * 4
CONTEXT = 8


@pytest.fixture
def data(tmp_path) -> tuple[TextDataset, TextDataset]:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return f3.load_text(path, context=CONTEXT, test_fraction=0.3)


def make(data: TextDataset, **settings) -> f3.models.GPT:
    torch.manual_seed(0)
    return f3.models.GPT(data.outputs, data.positions, **{"depth": 2, "heads": 2, "dim": 8, "mlp_width": 12, **settings})


def train(model: f3.models.GPT, data: TextDataset, epochs: int = 3, **settings) -> f3.Trainer:
    settings = {"precision": "float64", "batch_size": 3, "lr_schedule": "constant", **settings}
    trainer = f3.Trainer(model, optimizer=settings.pop("optimizer", f3.SGD(lr=0.05)), **settings)
    trainer.fit(data, epochs)
    return trainer


class SecondFormulation:
    """The same network from its tensors alone: one surrogate loss `sum(h * e B)` a stage, and cross-entropy at the head."""

    def __init__(self, model: f3.models.GPT, depth: int, heads: int, layer: bool, normalised: bool) -> None:
        self.normalised = normalised
        self.p = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.state_dict().items()}
        self.feedback = {
            name: module.feedback_matrix.clone()
            for name, module in model.named_modules()
            if getattr(module, "feedback_matrix", None) is not None
        }
        self.depth, self.heads, self.layer = depth, heads, layer
        self.surrogates: list[Tensor] = []

    def taught(self, name: str, h: Tensor, error: Tensor | None) -> Tensor:
        """Teach the output `h [M, T, N]` of a stage, and let nothing go further back."""
        if error is None:
            return h
        matrix = self.feedback[name]  # [C, N], or [C, T N]
        m, t, n = h.shape
        e = error.view(m, t, -1)
        if matrix.shape[1] == n:
            signal = torch.einsum("mtc,cn->mtn", e, matrix)
        else:
            signal = torch.einsum("mtc,ctn->mtn", e, matrix.view(-1, t, n))
        self.surrogates.append(((functional.layer_norm(h, (n,)) if self.normalised else h) * signal).sum())
        return h.detach()

    def norm(self, name: str, x: Tensor, error: Tensor | None) -> Tensor:
        x = x.detach() if self.layer and error is not None else x
        z = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return self.taught(name, z * self.p[f"{name}.weight"] + self.p[f"{name}.bias"], error if self.layer else None)

    def linear(self, name: str, x: Tensor, error: Tensor | None, activation=lambda a: a) -> Tensor:
        x = x.detach() if self.layer and error is not None else x
        a = x @ self.p[f"{name}.weight"].T
        if f"{name}.bias" in self.p:
            a = a + self.p[f"{name}.bias"]
        return self.taught(name, activation(a), error if self.layer else None)

    def block(self, name: str, x: Tensor, error: Tensor | None) -> Tensor:
        m, t, d = x.shape
        qkv = self.linear(f"{name}.attention.qkv", self.norm(f"{name}.norm1", x, error), error)
        q, k, v = (part.view(m, t, self.heads, -1).transpose(1, 2) for part in qkv.split(d, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(m, t, d)
        x = x + self.linear(f"{name}.attention.out", attended, error)
        h = self.linear(f"{name}.rise", self.norm(f"{name}.norm2", x, error), error, functional.gelu)
        return x + self.linear(f"{name}.fall", h, error)

    def step(self, ids: Tensor, targets: Tensor, error: Tensor, lr: float) -> Tensor:
        """One SGD step; returns the new error rows `[M T, C]`."""
        self.surrogates = []
        table = self.p.get("stages.0.weight", self.p[f"stages.{self.depth + 1}.module.1.weight"].detach())
        x = self.taught("stages.0", table[ids] + self.p["stages.0.position"], error)
        for i in range(1, self.depth + 1):
            x = self.block(f"stages.{i}.module", x, error)
            x = x.detach() if self.layer else self.taught(f"stages.{i}", x, error)
        logits = self.linear(f"stages.{self.depth + 1}.module.1", self.norm(f"stages.{self.depth + 1}.module.0", x, None), None)
        logits = logits.flatten(0, 1)
        (functional.cross_entropy(logits, targets.flatten()) + sum(self.surrogates)).backward()
        with torch.no_grad():
            for p in self.p.values():
                p -= lr * p.grad
                p.grad = None
        return functional.one_hot(targets.flatten(), logits.shape[1]).double() - logits.detach().softmax(-1)


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("feedback_shape", ["shared", "full"])
@pytest.mark.parametrize("feedback_at", ["output", "normalised"])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_a_second_formulation(data, granularity: str, feedback_shape: str, feedback_at: str, tied: bool) -> None:
    train_set = data[0]
    settings = {"granularity": granularity, "feedback_shape": feedback_shape, "feedback_at": feedback_at, "tied": tied}
    model = make(train_set, **settings)
    trainer = f3.Trainer(model, optimizer=f3.SGD(lr=0.05), precision="float64", lr_schedule="constant", hidden_scale=0.01)
    trainer.check(train_set, None, 1)
    second = SecondFormulation(model, 2, 2, granularity == "layer", feedback_at == "normalised")
    second.feedback = {name: 0.01 * matrix for name, matrix in second.feedback.items()}
    batches = [torch.tensor(b) for b in ([0, 5, 3], [2, 1], [4, 6, 7])]
    trainer.fit(train_set, 3, batches=lambda epoch: batches)
    errors = functional.one_hot(train_set.targets.long(), train_set.outputs).double()  # [N, T, C]
    for index in batches * 3:
        ids, targets = train_set.inputs[index].long(), train_set.targets[index].long()
        errors[index] = second.step(ids, targets, errors[index].flatten(0, 1), 0.05).view(len(index), CONTEXT, -1)
    start = make(train_set, **settings).double().state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, second.p[name].detach(), rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(tensor, start[name]), f"{name} has not learned"
    torch.testing.assert_close(trainer.learner.store.rows.view(errors.shape), errors, atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", ["f3", "dfa", "bp", "last-layer"])
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_learns(data, method: str, granularity: str) -> None:
    model = make(data[0], granularity=granularity, dim=16)
    trainer = f3.Trainer(model, optimizer=f3.Adam(lr=5e-3), method=method, batch_size=4, lr_schedule="constant")
    history = trainer.fit(data[0], 12, data[1]).history
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.2
    assert history[-1]["test_bits_per_character"] == pytest.approx(history[-1]["test_loss"] / math.log(2))
    assert history[-1]["test_perplexity"] == pytest.approx(math.exp(history[-1]["test_loss"]))


def test_the_future_is_not_seen(data) -> None:
    model = make(data[0]).double().eval()
    ids = data[0].fetch(torch.arange(3))
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % data[0].outputs
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()
    torch.testing.assert_close(model(ids[:, :5]), before[:, :5])  # a shorter text is a text


def test_evaluation_is_the_mean_over_all_tokens(data) -> None:
    model = make(data[0])
    trainer = f3.Trainer(model, precision="float64", eval_batch_size=4 * CONTEXT)  # windows do not divide into fours
    index = torch.arange(len(data[0]))
    assert len(index) % 4
    logits = model(data[0].fetch(index)).flatten(0, 1).detach()
    expected = functional.cross_entropy(logits, data[0].targets.long().flatten())
    assert trainer.evaluate(data[0])["test_loss"] == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("window", [6, 10])
def test_windows_of_text(data, window: int) -> None:
    model = make(data[0], dim=16)
    trainer = f3.Trainer(model, optimizer=f3.Adam(lr=5e-3), batch_size=2, window=window, visits=3)
    history = trainer.fit(data[0], 6).history
    assert trainer.learner.store.rows.shape == (window * CONTEXT, data[0].outputs)
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_dropout_masks_what_is_learned() -> None:
    from f3triton.models.gpt import TokenEmbedding
    from f3triton.network.updater import Arithmetic, Updater

    stage = TokenEmbedding(5, 3, 4, 0.5, torch.eye(5, 4), "shared").double()
    stage.prepare(torch.zeros(1, 3, dtype=torch.int64), 5, 0, 3)
    ids, error = torch.tensor([[0, 1, 0]]), torch.ones(3, 5, dtype=torch.float64)
    before = stage.weight.detach().clone()
    step = Updater(stage, Arithmetic(f3.SGD(lr=1.0), f3.kernels.eager, torch.device("cpu"))).begin(1.0)
    torch.manual_seed(0)
    with torch.no_grad():
        h, kept = stage.keep(ids, step)
        mask = kept[2]
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        torch.testing.assert_close(h, (before[ids] + stage.position) * mask)
        stage.teach(kept, error, step)
    moved = before - stage.weight  # the sum of the signals at a token's places
    torch.testing.assert_close(moved[0], mask[0, 0] + mask[0, 2])
    torch.testing.assert_close(moved[1], mask[0, 1])
    assert not moved[2:].any()


def test_a_tied_head_is_one_tensor(data) -> None:
    free, tied = make(data[0]), make(data[0], tied=True)
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == data[0].outputs * 8
    head = tied.stages[-1].module[1]
    assert tied.stages[0].vectors() is head.weight
    out = tied.stages[0](torch.tensor([[1]]))
    torch.testing.assert_close(out[0, 0], head.weight[1] + tied.stages[0].position[0])
    tied(data[0].fetch(torch.tensor([0]))).sum().backward()  # backpropagation reaches it from both ends
    once = head.weight.grad.clone()
    head.weight.grad = None
    logits = tied.stages[-1](tied.stages[2](tied.stages[1](tied.stages[0](data[0].fetch(torch.tensor([0]))).detach())))
    logits.sum().backward()
    assert not torch.allclose(once, head.weight.grad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "3 heads do not divide the dimension 8"),
        ({"context": 1}, "context of a GPT must be a whole number of at least 2"),
        ({"depth": 0}, "depth of a GPT must be"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"granularity": "word"}, "granularity"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(f3.InputError, match=message):
        f3.models.GPT(10, **{"context": 8, "depth": 2, "heads": 2, "dim": 8, **settings})


def test_bad_data(data) -> None:
    model = make(data[0])
    with pytest.raises(f3.InputError, match="9 tokens are more than the context 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(f3.InputError, match=r"a token id is outside 0..27, the model's vocabulary"):
        model(torch.full((1, 3), 28))
    with pytest.raises(f3.InputError, match="needs token ids"):
        f3.Trainer(model).check((torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])), None, 1)
    with pytest.raises(f3.InputError, match="loss 'bce' does not go with language-modeling"):
        f3.Trainer(model, loss="bce").check(data[0], None, 1)
    other = f3.models.GPT(data[0].outputs + 1, CONTEXT, 1, 2, 8)
    with pytest.raises(f3.InputError, match="the data set needs"):
        f3.Trainer(other).check(data[0], None, 1)


def test_layers_inside_are_ours(data) -> None:
    model = make(data[0], granularity="layer")
    assert sum(isinstance(module, Linear) for module in model.modules()) == 2 * 4 + 1
    assert sum(isinstance(module, LayerNorm) for module in model.modules()) == 2 * 2 + 1
