"""What was tried beside errors at the stage itself: losses and blends that others propose (`python -m bench.local tried`).

An idea changes the gradient that a stage gets from its own head, or what its head is, and nothing else. None of them is an
option of the library: the table of that task says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

import f3triton as f3
from f3triton.learn.local import Hearing, Local
from f3triton.network.stage import Stage
from f3triton.network.updater import Step
from f3triton.run.plan import add_readings

RECONSTRUCTION, SIMILARITY, BLEND = 0.3, 0.99, 0.3  # shares of what is added
TRUNK = 64  # units


class Remembering(Hearing):
    """A hearing that keeps the network's input for `Tried`, and with a reach of 2 may forget what each stage's own head said:
    then a stage hears the head behind the next one only."""

    def pass_through(self, place: int, stage: Stage, x: Tensor) -> Tensor:
        if place == 0:
            self.local.x = x
        h = super().pass_through(place, stage, x)
        if self.local.idea is following and place >= self.local.unread:
            self.heard[-1] = torch.zeros_like(self.heard[-1])
        return h


class Tried(Local):
    """Local errors, changed by an `idea`: `(local, place, h, target, own) -> gradient at h`, `own` being the plain one."""

    idea: Callable[[Tried, int, Tensor, Tensor, Tensor], Tensor]
    shape: torch.Size  # of an image

    def __init__(self, loss: str, model: f3.Sequential, *arguments: object) -> None:
        super().__init__(loss, model, *arguments)
        self.model, self.decoders, self.rate = model, {}, 0.0

    def begin(self, target: Tensor, step: Step) -> Hearing:
        return Remembering(self, target, step)

    def gradient(self, place: int, h: Tensor, target: Tensor, step: Step) -> Tensor:
        self.lr, self.rate = step.update.lr, max(self.rate, step.update.lr)
        return self.idea(self, place, h, target, super().gradient(place, h, target, step))


def similarity(local: Tried, place: int, h: Tensor, target: Tensor, own: Tensor) -> Tensor:
    """The cosines between samples should be those of their targets (Nokland and Eidnes, arXiv 1901.06656, without their extra
    convolution: of an image, each channel's deviation)."""

    def cosines(rows: Tensor) -> Tensor:
        rows = functional.normalize(rows - rows.mean(1, keepdim=True))
        return rows @ rows.t()

    def loss(h: Tensor) -> Tensor:
        return functional.mse_loss(cosines(h.flatten(2).std(2) if h.dim() == 4 else h), cosines(target))

    return (1 - SIMILARITY) * own + SIMILARITY * gradient_of(loss, h)


def reconstruction(local: Tried, place: int, h: Tensor, target: Tensor, own: Tensor) -> Tensor:
    """A 1 x 1 convolution should find the input again, less so the later the stage (InfoPro, Wang et al., arXiv 2101.10832)."""
    if h.dim() != 4:
        return own
    image = local.x.view(-1, *local.shape)
    if place not in local.decoders:
        decoder = torch.nn.Conv2d(h.shape[1], image.shape[1], 1)
        local.decoders[place] = decoder, torch.optim.Adam(decoder.parameters(), 1e-3)
    decoder, optimizer = local.decoders[place]
    small = functional.adaptive_avg_pool2d(image, h.shape[2:])
    optimizer.zero_grad()
    with torch.enable_grad():
        leaf = h.detach().requires_grad_()
        functional.mse_loss(decoder(leaf), small).backward()
    optimizer.step()
    return own + RECONSTRUCTION / (place + 1) * leaf.grad


def quieter(local: Tried, place: int, h: Tensor, target: Tensor, own: Tensor) -> Tensor:
    """What a stage says counts the less the earlier it stands; felt with a reach over 1 only, Adam takes out a factor."""
    return own * (place + 1) / (local.read + 1)


def fading(local: Tried, place: int, h: Tensor, target: Tensor, own: Tensor) -> Tensor:
    """The same, from nothing at the beginning: what early stages say falls as the learning rate does."""
    left = (place + 1) / (local.read + 1)
    return own * (left + (1 - left) * local.lr / local.rate)


def following(local: Tried, place: int, h: Tensor, target: Tensor, own: Tensor) -> Tensor:
    """Each stage is read through the next one, and that one's own head (with a reach of 2: see `Remembering`)."""
    return own


def blend(local: Tried, place: int, h: Tensor, target: Tensor, own: Tensor) -> Tensor:
    """In part the error that the sample left at the output at its last visit, as F3's, but through the stage's head."""
    index, errors = local.model.seen, local.model.errors
    head, left = local.heads[place], errors[index]  # [M, C], 0 before the first visit
    with torch.enable_grad():
        leaf = h.detach().requires_grad_()
        (stale,) = torch.autograd.grad(head.linear(head.normal_rows(leaf)), leaf, left / len(left))
    return (1 - BLEND) * own + BLEND * stale


def gradient_of(loss: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = h.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]


def remember(train: f3.Dataset, model: f3.Sequential) -> None:
    """Let a model know the samples of a step, and the errors `[samples, C]` that all left at its output (for `blend`)."""
    fetch, last = train.fetch, model.stages[-1]
    keep, model.errors = last.keep, torch.zeros(len(train), train.outputs)
    targets = functional.one_hot(train.targets, train.outputs)

    def fetched(index: Tensor, *arguments: object) -> Tensor:
        model.seen = index
        return fetch(index, *arguments)

    def kept(x: Tensor, *arguments: object, **named: object) -> object:
        a, what = keep(x, *arguments, **named)
        model.errors[model.seen] = torch.sigmoid(a) - targets[model.seen]
        return a, what

    train.fetch, last.keep = fetched, kept


def one_trunk(model: f3.Sequential, *arguments: object) -> None:
    """All heads end with the same two layers, which learn from each."""
    add_readings(model, *arguments)
    outputs = model.heads[0].linear.out_features
    trunk = nn.Sequential(nn.ReLU(), nn.Linear(TRUNK, TRUNK), nn.ReLU(), nn.Linear(TRUNK, outputs))
    for place, head in enumerate(model.heads):
        head.linear = nn.Linear(head.linear.in_features, TRUNK)
        model.heads[place] = f3.Block(nn.Sequential(head, trunk))


def one_block(model: f3.Sequential, *arguments: object) -> None:
    """The stage in front of the heads is the same one for all, and learns from each; the stages have outputs of one shape."""
    add_readings(model, *arguments)
    first, *others = list(model.heads)[model.unread :]
    for head in others:
        head.module[0] = first.module[0]


IDEAS = {
    "similarity": similarity,
    "reconstruction": reconstruction,
    "quieter": quieter,
    "fading": fading,
    "following": following,
    "blend": blend,
}
HEADS = {"one trunk": one_trunk, "one block": one_block}


@contextmanager
def changed(idea: str | None, train: f3.Dataset, model: f3.Sequential) -> Iterator[f3.Dataset]:
    """Runs inside learn by local errors that are changed by the idea of that name, from the training set that it gives."""
    if idea is None:
        yield train
        return
    if idea == "blend":
        train = copy.copy(train)
        remember(train, model)
    if idea in HEADS:
        change = mock.patch("f3triton.run.plan.add_readings", HEADS[idea])
    else:
        learner = type("Idea", (Tried,), {"idea": staticmethod(IDEAS[idea]), "shape": train.shape})
        change = mock.patch("f3triton.run.trainer.Local", learner)
    with change:
        yield train
