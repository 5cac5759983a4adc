"""F3 written a second time, with autograd and torch.optim as the authors' experiments have it, against the trainer in float64.

Networks end in their own sigmoid under `bce`; the graph is cut after every hidden layer, and each piece runs backward from
`error @ B`. Nothing here uses the library's operations.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import f3triton as f3

SAMPLES, INPUTS, WIDTH = 22, 7, 12
LOSSES = {
    "bce": functional.binary_cross_entropy,
    "cross-entropy": functional.cross_entropy,
    "mse": functional.mse_loss,
}


def second_opinion(
    weights: list[tuple[torch.Tensor, torch.Tensor]],
    feedback: list[torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    batches: list[torch.Tensor],
    signal: str,
    link: str,
    mask: bool,
    loss_name: str,
    optimizer: str,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The parameters and the store after all batches."""
    layers = nn.ModuleList()
    for weight, bias in weights:
        layer = nn.Linear(*weight.T.shape).double()
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    settings = {"sgd": lambda p: torch.optim.SGD(p, lr=0.05), "adam": lambda p: torch.optim.Adam(p, lr=0.01)}
    opt, loss_function = settings[optimizer](layers.parameters()), LOSSES[loss_name]
    store = y.clone()
    on_top = {"identity": lambda o: o, "softmax": lambda o: torch.softmax(o, 1), "sigmoid": torch.sigmoid}[link]

    def forward(h: torch.Tensor, error: torch.Tensor | None) -> torch.Tensor:
        for layer, b in itertools.zip_longest(layers, feedback):
            h = layer(h)
            if b is not None:
                h = torch.tanh(h)
                if error is not None:
                    h = cut(h, error @ b)
        return torch.sigmoid(h) if loss_name == "bce" else h

    def cut(h: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        pieces.append((h, gradient))
        return h.detach()

    for index in batches:
        pieces: list[tuple[torch.Tensor, torch.Tensor]] = []
        target = y[index]
        if signal == "target":
            error = target
        elif signal == "current-error":
            with torch.no_grad():
                error = target - on_top(forward(x[index], None))
        elif signal == "none":
            error = torch.zeros_like(target)
        else:
            error = store[index]
        if mask:
            error = error * target
        opt.zero_grad()
        output = forward(x[index], error)
        loss_function(output, target).backward()
        for h, gradient in pieces:
            h.backward(gradient)
        opt.step()
        if signal == "delayed-error":
            store[index] = (target - on_top(output)).detach()
        elif signal == "delayed-loss":
            leaf = output.detach().requires_grad_()
            loss_function(on_top(leaf), target).backward()
            store[index] = -leaf.grad
    return [p.detach() for p in layers.parameters()], store


CASES = [
    # signal, link, mask, loss, optimizer, depth, outputs, feedback
    ("delayed-error", "identity", False, "bce", "adam", 2, 5, "trinomial"),
    ("delayed-error", "identity", True, "bce", "sgd", 1, 5, "kaiming"),
    ("delayed-error", "softmax", False, "bce", "adam", 2, 5, "trinomial"),
    ("delayed-error", "sigmoid", False, "bce", "sgd", 2, 5, "binomial"),
    ("delayed-error", "softmax", False, "cross-entropy", "adam", 2, 5, "kaiming"),
    ("delayed-error", "sigmoid", True, "cross-entropy", "sgd", 2, 5, "trinomial"),
    ("delayed-error", "identity", False, "cross-entropy", "sgd", 2, 5, "trinomial"),
    ("delayed-error", "identity", False, "mse", "sgd", 2, 2, "trinomial"),
    ("delayed-error", "identity", False, "bce", "adam", 10, 5, "identity-repeat-pm"),
    ("delayed-loss", "identity", False, "bce", "adam", 2, 5, "trinomial"),
    ("delayed-loss", "identity", True, "bce", "adam", 3, 5, "trinomial"),
    ("delayed-loss", "softmax", False, "bce", "adam", 2, 5, "trinomial"),
    ("delayed-loss", "softmax", False, "cross-entropy", "adam", 2, 5, "trinomial"),
    ("delayed-loss", "identity", False, "mse", "sgd", 1, 2, "kaiming-repeat-line"),
    ("target", "identity", False, "bce", "sgd", 2, 5, "chunked-negative"),
    ("current-error", "identity", False, "bce", "adam", 2, 5, "trinomial"),
    ("current-error", "softmax", True, "cross-entropy", "adam", 2, 5, "alternate-negative"),
    ("none", "identity", False, "bce", "adam", 2, 5, "constant"),
]


@pytest.mark.parametrize(("signal", "link", "mask", "loss", "optimizer", "depth", "outputs", "feedback"), CASES)
def test_same_trajectory(
    signal: str, link: str, mask: bool, loss: str, optimizer: str, depth: int, outputs: int, feedback: str
) -> None:
    generator = torch.Generator().manual_seed(depth)
    x = torch.randn(SAMPLES, INPUTS, dtype=torch.float64, generator=generator)
    if loss == "mse":
        y = torch.randn(SAMPLES, outputs, dtype=torch.float64, generator=generator)
    else:
        y = functional.one_hot(torch.arange(SAMPLES) % outputs, outputs).double()
    order = [torch.randperm(SAMPLES, generator=generator).split(5) for _ in range(4)]  # the last batch has two samples

    torch.manual_seed(3)
    model = f3.models.MLP([INPUTS, *[WIDTH] * depth, outputs], "tanh", feedback)
    start = [(stage.weight.detach().double(), stage.bias.detach().double()) for stage in model.stages]
    rule = f3.SGD(lr=0.05) if optimizer == "sgd" else f3.Adam(lr=0.01)
    trainer = f3.Trainer(model, loss, rule, signal=signal, link=link, mask_target=mask, lr_schedule="constant", batch_size=5,
                         precision="float64", device="cpu")  # fmt: skip
    trainer.fit((x, y), 4, batches=lambda epoch: order[epoch])

    matrices = [f3.Feedback(feedback).draw(outputs, WIDTH, 0).double()] * depth
    if signal != "none":
        matrices = [stage.feedback_matrix for stage in model.stages[:-1]]
    batches = [index for epoch in order for index in epoch]
    expected, store = second_opinion(start, matrices, x, y, batches, signal, link, mask, loss, optimizer)
    for got, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(got.detach(), wanted, rtol=1e-9, atol=1e-11)
    if signal.startswith("delayed"):
        torch.testing.assert_close(trainer.learner.store.rows, store, rtol=1e-9, atol=1e-11)
