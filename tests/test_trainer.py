"""The trainer: the methods against each other, repeatability, custom stages, what ends a run, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import f3triton as f3
from f3triton.kernels import eager
from f3triton.learn import step as engine
from f3triton.learn.cuda_graph import GraphedStep
from f3triton.learn.step import Output
from f3triton.run import tally
from f3triton.run.schedule import make_schedule
from f3triton.run.tally import Diverged


def problem(samples: int = 60, inputs: int = 6, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs `[N, K]` and class ids `[N]` that a network can learn."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, inputs, generator=generator)
    return x, (x @ torch.randn(inputs, classes, generator=generator)).argmax(-1)


def mlp(*hidden: int, seed: int = 0, **settings: object) -> f3.models.MLP:
    torch.manual_seed(seed)
    return f3.models.MLP([6, *(hidden or (16, 16)), 3], **settings)


def train(model: f3.Sequential, epochs: int = 3, **settings: object) -> f3.Trainer:
    trainer = f3.Trainer(model, **{"optimizer": f3.Adam(lr=0.01), "batch_size": 8, "device": "cpu", **settings})
    trainer.fit(problem(), epochs, problem())
    return trainer


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("method", ["f3", "drtp", "dfa", "sdfa", "bp", "last-layer"])
@pytest.mark.parametrize("loss", ["bce", "cross-entropy"])
def test_every_method_learns(method: str, loss: str) -> None:
    trainer = train(mlp(32), 30, method=method, loss=loss)
    first, last = trainer.result.history[0], trainer.result.history[-1]
    assert last["test_loss"] < 0.75 * first["test_loss"]
    assert last["test_error"] < 25
    assert trainer.result.steps == 30 * math.ceil(60 / 8)


@pytest.mark.parametrize("method", ["f3", "dfa", "bp"])
def test_same_seed_same_result(method: str) -> None:
    one, same, other = (train(mlp(), method=method, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(weights(one.model), weights(same.model))

    def without_time(trainer: f3.Trainer) -> list[dict]:
        return [{key: value for key, value in r.items() if key != "learning_seconds"} for r in trainer.result.history]

    assert without_time(one) == without_time(same)
    assert not torch.equal(weights(one.model), weights(other.model))


MODELS = [
    lambda **own: f3.models.MLP([64, 5, 10], **own),
    lambda **own: f3.models.ConvNet((1, 8, 8), 10, hidden=[5], **own),
    lambda **own: f3.models.ViT(8, 1, 10, patch_size=4, depth=1, heads=2, dim=8, mlp_width=8, **own),
    lambda **own: f3.models.GPT(7, 8, depth=1, heads=2, dim=8, **own),
]


@pytest.mark.parametrize("make", MODELS, ids=["mlp", "convnet", "vit", "gpt"])
def test_a_model_of_a_seed_is_the_same_whatever_was_drawn_before(make: Callable[..., f3.Sequential]) -> None:
    weights = [torch.cat([p.flatten() for p in make(seed=seed).parameters()]) for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.manual_seed(1)  # those of train.py --seed 1
    assert torch.equal(torch.cat([p.flatten() for p in make().parameters()]), weights[0])
    before = torch.get_rng_state()
    make(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(f3.InputError, match="seed"):
        make(seed="one")
    assert "seed" not in make(seed=1).config()


def test_a_run_in_python_can_be_repeated() -> None:
    train, test = f3.load_dataset("digits")
    losses = [
        f3.Trainer(f3.models.MLP([64, 16, 10], seed=1), seed=1, device="cpu").fit(train, 1, test).history[-1]["test_loss"]
        for _ in range(2)
    ]
    assert losses[0] == losses[1]


def test_the_first_epoch_of_f3_is_drtp_and_the_second_is_not() -> None:
    f3_one, drtp_one = train(mlp(), 1), train(mlp(), 1, method="drtp")
    assert torch.equal(weights(f3_one.model), weights(drtp_one.model))
    f3_two, drtp_two = train(mlp(), 2), train(mlp(), 2, method="drtp")
    assert not torch.equal(weights(f3_two.model), weights(drtp_two.model))


def test_the_store_holds_the_error_of_the_last_visit() -> None:
    model = mlp()
    trainer = f3.Trainer(model, "bce", f3.SGD(lr=0.0), device="cpu", batch_size=7)  # weights stay: errors are of now
    trainer.fit(problem(), 1)
    x, y = problem()
    with torch.no_grad():
        expected = nn.functional.one_hot(y, 3) - model(x).sigmoid()
    torch.testing.assert_close(trainer.learner.store.rows, expected)


@pytest.mark.parametrize("method", ["f3", "drtp", "dfa", "sdfa", "last-layer"])
def test_linear_stages_never_enter_autograd(method: str) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("autograd kept a tensor")

    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        train(mlp(), 1, method=method)
        with pytest.raises(AssertionError, match="autograd kept a tensor"):  # the hook does notice backpropagation
            train(mlp(), 1, method="bp")


def test_dfa_runs_forward_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = eager.linear_keep
    monkeypatch.setattr(eager, "linear_keep", lambda *a: calls.append(1) or original(*a))
    trainer = f3.Trainer(mlp(), "bce", method="dfa", device="cpu", batch_size=60)
    trainer.fit(problem(), 1)  # one step of three stages
    assert len(calls) == 3


def test_dfa_by_hand() -> None:
    model, (x, y) = mlp(5).double(), problem()
    x, target = x.double(), nn.functional.one_hot(y, 3).double()
    w0, b0, w1, b1 = (p.detach().clone().requires_grad_() for p in model.parameters())
    trainer = f3.Trainer(model, "cross-entropy", f3.SGD(lr=0.1), method="dfa", lr_schedule="constant", precision="float64",
                         device="cpu", batch_size=60, hidden_scale=0.25)  # fmt: skip
    trainer.fit((x, y), 1)
    h = torch.tanh(x @ w0.T + b0)
    a = h.detach() @ w1.T + b1
    top = torch.autograd.grad(nn.functional.cross_entropy(a, y), (w1, b1))
    e = target - torch.softmax(a.detach(), -1)
    below = torch.autograd.grad(h, (w0, b0), 0.25 * e @ model[0].feedback_matrix)
    for got, start, gradient in zip(model.parameters(), (w0, b0, w1, b1), (*below, *top), strict=True):
        torch.testing.assert_close(got.detach(), (start - 0.1 * gradient).detach())


def test_hidden_scale_mean_divides_by_the_batch() -> None:
    ends = [train(mlp(), 1, optimizer=f3.SGD(lr=0.1), hidden_scale=s, batch_size=10).model for s in ("mean", 0.1, 1.0)]
    torch.testing.assert_close(weights(ends[0]), weights(ends[1]))
    assert not torch.allclose(weights(ends[0]), weights(ends[2]))


def test_mask_multiplies_by_the_target() -> None:
    plain, masked = train(mlp(), 2), train(mlp(), 2, mask_target=True)
    assert not torch.equal(weights(plain.model), weights(masked.model))
    first = [train(mlp(), 1, mask_target=mask) for mask in (False, True)]  # the target masked by itself is the target
    assert torch.equal(weights(first[0].model), weights(first[1].model))


def test_last_layer_leaves_the_hidden_layers_alone() -> None:
    model, before = mlp(), mlp()
    train(model, method="last-layer")
    for stage, old in zip(model.stages[:-1], before.stages[:-1], strict=True):
        assert torch.equal(stage.weight, old.weight)
    assert not torch.equal(model[-1].weight, before[-1].weight)


@pytest.mark.parametrize("method", ["f3", "dfa", "bp"])
def test_a_block_of_a_linear_layer_equals_the_linear_stage(method: str) -> None:
    plain = mlp(16, 16)
    blocks = mlp(16, 16)
    inside = [nn.Sequential(nn.Linear(6, 16), nn.Tanh()), nn.Sequential(nn.Linear(16, 16), nn.Tanh()), nn.Linear(16, 3)]
    for module, stage in zip(inside, blocks.stages, strict=True):
        linear = module if isinstance(module, nn.Linear) else module[0]
        linear.load_state_dict(stage.state_dict())
    custom = f3.Sequential(*(f3.Block(module) for module in inside))
    one = train(plain.double(), method=method, precision="float64")
    other = train(custom.double(), method=method, precision="float64")
    torch.testing.assert_close(weights(one.model), weights(other.model), rtol=1e-9, atol=1e-11)


def test_a_custom_model_of_blocks_and_linear_stages() -> None:
    """Somebody's own modules: images in, BatchNorm and dropout inside, one plain stage at the end."""
    torch.manual_seed(0)
    images = torch.randn(40, 1, 6, 6)
    labels = (images.mean((1, 2, 3)) > 0).long()
    block = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1))
    model = f3.Sequential(f3.Block(block), f3.Linear(64, 16, "gelu"), f3.Linear(16, 2))
    before = weights(model)
    trainer = f3.Trainer(model, "cross-entropy", f3.Adam(lr=3e-3), batch_size=10, device="cpu")
    history = trainer.fit((images, labels), 30, (images, labels)).history
    assert history[-1]["test_loss"] < 0.75 * history[0]["test_loss"]
    assert (weights(model) != before).float().mean() > 0.9
    assert int(block[1].num_batches_tracked) == 30 * 4  # one update of the running statistics a step, none in evaluation


def test_bfloat16_keeps_float32_weights_and_learns() -> None:
    for method in ("f3", "dfa", "bp"):
        trainer = train(mlp(32), 30, method=method, precision="bfloat16")
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        assert trainer.result.history[-1]["test_error"] < 25


@pytest.mark.parametrize("precision", ["float16", "bfloat16-weights"])
def test_half_precision_learns(precision: str) -> None:
    for method in ("f3", "dfa", "last-layer"):
        rows = [train(mlp(32), 30, method=method, precision=precision) for _ in range(2)]
        assert rows[0].result.history[-1]["test_error"] < (25 if method != "last-layer" else 60)
        assert torch.equal(weights(rows[0].model), weights(rows[1].model))
        wanted = torch.bfloat16 if precision == "bfloat16-weights" else torch.float32
        assert {p.dtype for p in rows[0].model.parameters()} == {wanted}


@pytest.mark.parametrize("settings", [{}, {"method": "dfa"}, {"method": "last-layer"}, {"lr_schedule": "constant"}], ids=str)
def test_a_graphed_step_is_the_step(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured on CUDA runs here as it is: the same tensors, read and written in place, and a short last batch."""
    plain = train(mlp(), **settings)
    calls = []
    monkeypatch.setattr("f3triton.run.tally.KEPT_OUTPUTS", 60)  # few slots, so that they are used again
    original = f3.Trainer.__init__

    def with_graph(self: f3.Trainer, *arguments: object, **given: object) -> None:
        original(self, *arguments, **given)
        self.cuda_graph = "on"

    monkeypatch.setattr(f3.Trainer, "__init__", with_graph)
    monkeypatch.setattr(engine, "GraphedStep", lambda *a: calls.append(GraphedStep(*a)) or calls[-1])
    graphed = train(mlp(), **settings)
    assert calls[0].steps == 3 * (60 // 8)  # the epoch's last batch has four samples
    torch.testing.assert_close(weights(graphed.model), weights(plain.model), rtol=1e-5, atol=1e-7)
    for one, other in zip(graphed.result.history, plain.result.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["train_error"] == other["train_error"]


def test_feedback_in_int8_is_kept_and_equal() -> None:
    matrix = f3.Feedback("trinomial").draw(3, 16, seed=1)
    whole, floats = train(mlp(16, feedback=[matrix.to(torch.int8)])), train(mlp(16, feedback=[matrix]))
    assert whole.model[0].feedback_matrix.dtype == torch.int8
    assert torch.equal(weights(whole.model), weights(floats.model))


def test_regression_reports_both_units() -> None:
    x, _ = problem()
    y = x[:, :1] * 2 + 0.1
    trainer = f3.Trainer(f3.models.MLP([6, 32, 1]), optimizer=f3.Adam(lr=0.01), batch_size=8, device="cpu")
    last = trainer.fit((x, y), 40, (x, y)).history[-1]
    assert last["test_mse"] < 0.2
    assert last["test_mse_in_units"]["0"] == pytest.approx(last["test_mse"])  # plain tensors are in their own units
    assert trainer.evaluate((x, y))["test_mse"] == last["test_mse"]


def test_batches_of_ones_own() -> None:
    seen = []
    order = [torch.tensor([0, 1, 2]), torch.tensor([5])]
    f3.Trainer(mlp(), device="cpu").fit(problem(), 2, batches=lambda epoch: order, on_step=seen.append)
    assert seen == [3, 1, 3, 1]


# --- what ends a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["f3", "bp"])
def test_divergence_names_the_step(method: str) -> None:
    x, _ = problem()
    trainer = f3.Trainer(mlp(), optimizer=f3.SGD(lr=1e20), method=method, lr_schedule="constant", device="cpu", batch_size=8)
    with pytest.raises(Diverged, match=r"at step [2-5]; try a smaller learning rate") as caught:
        trainer.fit((x, torch.randn(60, 3)), 5)
    assert 2 <= caught.value.step <= 5


def test_interrupt_keeps_a_last_evaluation() -> None:
    done = []

    def stop(samples: int) -> None:
        done.append(samples)
        if len(done) == 12:  # in the second epoch of eight steps
            raise KeyboardInterrupt

    trainer = f3.Trainer(mlp(), device="cpu", batch_size=8)
    result = trainer.fit(problem(), 5, problem(), on_step=stop)
    assert result.status == "interrupted"
    assert [record["step"] for record in result.history] == [8, 12]
    assert result.history[-1]["epoch"] == 1.5
    assert "test_loss" in result.history[-1]


# --- schedules and refusals -------------------------------------------------------------------------------------------


def test_schedules() -> None:
    cosine, linear = make_schedule("cosine", 2.0, 10), make_schedule("linear", 2.0, 10, 2)
    assert cosine(1) == 2.0
    assert cosine(6) == pytest.approx(1.0)
    assert 0 < cosine(10) < 0.1
    assert [linear(step) for step in (1, 2, 3, 10)] == pytest.approx([1.0, 2.0, 2.0, 0.25])
    assert (linear(11), linear(50), cosine(50)) == (0.0, 0.0, 0.0)  # more batches than were announced
    assert {make_schedule("constant", 2.0, 10)(step) for step in range(1, 11)} == {2.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "drtp", "signal": "delayed-error"}, "method 'drtp' has the signal 'target'"),
        ({"method": "bp", "signal": "target"}, "method 'bp' has no signal"),
        ({"method": "hebb"}, "method 'hebb' is unknown; allowed: f3, drtp"),
        ({"signal": "error"}, "signal 'error' is unknown"),
        ({"link": "tanh"}, "link 'tanh' is unknown"),
        ({"loss": "hinge"}, "loss 'hinge' is unknown"),
        ({"optimizer": "rmsprop"}, "optimizer 'rmsprop' is unknown; allowed: sgd, adam, adamw"),
        ({"batch_size": 0}, "batch size must be a whole number of at least 1 and below"),
        ({"hidden_scale": math.nan}, "hidden scale"),
        ({"lr_schedule": "step"}, "lr schedule 'step' is unknown"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"precision": "int4"}, "precision 'int4' is unknown"),
        ({"precision": "tf32"}, "needs a CUDA device"),
        ({"precision": "float16", "method": "bp"}, "precision 'float16' needs a scaled loss, which method 'bp' has not"),
        ({"precision": "bfloat16-weights", "method": "bp"}, "needs stochastic rounding, which method 'bp' has not"),
        ({"moments": "int4"}, "moments 'int4' is unknown; allowed: float32, bfloat16, int8"),
        ({"moments": "int8", "method": "bp"}, "moments 'int8' do not go with the method 'bp'"),
        ({"moments": "int8", "optimizer": "sgd"}, "moments 'int8' do not go with the rule SGD"),
        ({"moments": "bfloat16", "precision": "float64"}, "moments 'bfloat16' do not go with the precision 'float64'"),
        ({"cuda_graph": "on"}, "cuda graph 'on' needs a CUDA device"),
        ({"cuda_graph": "perhaps"}, "cuda graph 'perhaps' is unknown; allowed: auto, on, off"),
        ({"backend": "numpy"}, "backend 'numpy' is unknown"),
    ],
)
def test_refused_settings(settings: dict, message: str) -> None:
    with pytest.raises(f3.InputError, match=message):
        f3.Trainer(mlp(), **{"device": "cpu", **settings})


def test_refused_fits() -> None:
    x, y = problem()
    trainer = f3.Trainer(mlp(), device="cpu")
    with pytest.raises(f3.InputError, match="epochs must be a whole number of at least 1, got 0"):
        trainer.fit((x, y), 0)
    with pytest.raises(f3.InputError, match=r"stage 0: a Linear stage needs an input of shape \[batch, 6\], got \[1, 4\]"):
        trainer.fit((x[:, :4], y), 1)
    with pytest.raises(f3.InputError, match=r"shape \[3\]; the data set needs \[4\]"):
        trainer.fit((x, y.clone().fill_(3)), 1)
    with pytest.raises(f3.InputError, match="warmup steps must be between 0 and the run's 2 steps, got 9"):
        f3.Trainer(mlp(), device="cpu", warmup_steps=9).fit((x, y), 1)
    with pytest.raises(f3.InputError, match="mask target needs one-hot targets"):
        f3.Trainer(f3.models.MLP([6, 4, 1]), mask_target=True, device="cpu").fit((x, x[:, :1]), 1)
    with pytest.raises(f3.InputError, match="loss 'bce' needs classes"):
        f3.Trainer(f3.models.MLP([6, 4, 1]), "bce", device="cpu").fit((x, x[:, :1]), 1)
    with pytest.raises(f3.InputError, match="the last stage has the activation 'sigmoid'"):
        f3.Trainer(f3.Sequential(f3.Linear(6, 3, "sigmoid")), device="cpu").fit((x, y), 1)


def test_a_fit_that_was_refused_is_refused_again() -> None:
    """And is not what was asked for before."""
    data, trainer = problem(), f3.Trainer(mlp(), device="cpu")
    trainer.fit(data, 1)
    for _ in range(2):
        with pytest.raises(f3.InputError, match="epochs must be a whole number of at least 1, got 0"):
            trainer.fit(data, 0)
    assert trainer.fit(data, 2).epochs == 2


def test_data_that_was_refused_is_refused_again() -> None:
    x, y = problem()
    trainer = f3.Trainer(mlp(), device="cpu")
    trainer.fit((x, y), 1)
    wrong = x[:, :4], y
    for _ in range(2):  # never the data of an earlier fit instead
        with pytest.raises(f3.InputError, match=r"shape \[batch, 6\], got \[1, 4\]"):
            trainer.fit(wrong, 1)


def test_arrays_that_changed_in_place_are_read_again() -> None:
    x, y = problem()
    data = x.double().numpy(), y.numpy()
    trainer, other = (f3.Trainer(mlp(), device="cpu", seed=0) for _ in range(2))
    trainer.fit(data, 1)
    other.fit(data, 1)
    data[0][:] *= -1
    changed = (data[0].copy(), data[1])
    assert trainer.fit(data, 1).history[-1]["train_loss"] == other.fit(changed, 1).history[-1]["train_loss"]


def test_refused_models() -> None:
    with pytest.raises(f3.InputError, match="at least one stage"):
        f3.Sequential()
    with pytest.raises(f3.InputError, match="stage 0 is a Linear; a Sequential takes Linear and Block stages"):
        f3.Sequential(nn.Linear(2, 2))
    shared = nn.Linear(3, 3)
    with pytest.raises(f3.InputError, match="stages 0 and 1 share a parameter"):
        f3.Sequential(f3.Block(shared), f3.Block(shared))
    with pytest.raises(f3.InputError, match=r"whole numbers of at least 1, got \[6, 0, 3\]"):
        f3.models.MLP([6, 0, 3])
    with pytest.raises(f3.InputError, match=r"feedback matrix has shape \[2, 2\]; this stage needs \[3, 4\]"):
        f3.Trainer(f3.models.MLP([6, 4, 3], feedback=[torch.ones(2, 2)]), device="cpu").fit(problem(), 1)
    with pytest.raises(f3.InputError, match="needs an f3triton Sequential"):
        f3.Trainer(nn.Linear(2, 2))


class Detaching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).detach()


def test_a_block_that_cuts_its_own_gradient_is_named() -> None:
    with pytest.raises(f3.InputError, match="Detaching in a Block cuts the gradient"):
        train(f3.Sequential(f3.Block(Detaching()), f3.Linear(4, 3)), 1)


@pytest.mark.parametrize("kept", [1 << 20, 100])
def test_batches_counted_together_are_counted_one_by_one(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "KEPT_OUTPUTS", kept)
    monkeypatch.setattr(tally, "CHECK_EVERY", 7)
    losses, hits = torch.rand(20 * 6), torch.rand(20 * 6) < 0.5
    found = []
    for parts in ([1] * 20, [3, 8, 9], [20], [5, 1, 14]):
        counted, done = tally.Tally("bce", 5, torch.device("cpu")), 0
        for batches in parts:
            rows = slice(6 * done, 6 * (done + batches))
            done += batches
            counted.add(Output(None, None, losses[rows], hits[rows]), done, batches)
        tensors, numbers = counted.state()
        found.append(({name: tensor.tolist() for name, tensor in tensors.items()}, numbers))
        assert counted.figures(20).correct == int(hits.sum())
    assert all(other == found[0] for other in found)
    losses[6 * 11 + 2] = float("nan")
    with pytest.raises(tally.Diverged, match="nan at step 12;"):
        tally.Tally("bce", 5, torch.device("cpu")).add(Output(None, None, losses, hits), 20, 20)
