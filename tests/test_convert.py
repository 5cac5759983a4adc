"""Models written by somebody else, cut into stages with no change to their code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import f3triton as f3


class Residual(nn.Module):
    """Two convolutions with batch normalisation, and what came in."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.short = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.short(x))


class ResNet(nn.Module):
    """A small residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1, self.layer2 = Residual(8, 8), Residual(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.head(x.mean((2, 3)))


class Attend(nn.Module):
    """Patches, learned positions, two encoder layers with skip connections, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.position = nn.Parameter(0.1 * torch.randn(8, 16))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.view(-1, 8, 8)) + self.position
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.encoder(x)
        return self.head(x.mean(1))


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[N, 1, 8, 8]` of three kinds."""
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(240) % 3
    patterns = torch.randn(3, 1, 8, 8, generator=generator)
    return patterns[y] + 0.5 * torch.randn(240, 1, 8, 8, generator=generator), y


@pytest.mark.parametrize(
    ("model", "cut"),
    [(ResNet, ["stem", "layer1", "layer2"]), (Attend, ["norm", "encoder"])],
    ids=["residual", "attention"],
)
@pytest.mark.parametrize("method", ["f3", "dfa"])
def test_trains_every_stage(model: type[nn.Module], cut: list[str], method: str) -> None:
    torch.manual_seed(1)
    theirs = model()
    before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    stages = f3.convert(theirs, images()[0][:2], cut, feedback_shape="shared")  # for the mean over tokens or pixels
    assert len(stages) == len(cut) + 1
    trainer = f3.Trainer(stages, "cross-entropy", f3.Adam(lr=3e-3), method=method, batch_size=24, device="cpu")
    history = trainer.fit(images(), 12, images()).history
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert history[-1]["test_error"] < 15
    for name, p in theirs.named_parameters():  # the user's own model has been trained
        assert not torch.equal(before[name], p), name
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(images()[0]), stages.eval()(images()[0]), atol=1e-5)


def test_running_statistics_are_those_of_torch() -> None:
    torch.manual_seed(1)
    theirs = ResNet()
    twin = copy.deepcopy(theirs)
    stages = f3.convert(theirs, images()[0][:2], ["stem", "layer1", "layer2"])
    trainer = f3.Trainer(stages, "cross-entropy", f3.SGD(lr=0.0), batch_size=24, device="cpu")
    trainer.fit(images(), 1, batches=lambda epoch: torch.arange(240).split(24))
    with torch.no_grad():
        for part in images()[0].split(24):
            twin.train()(part)
    assert theirs.stem[1].num_batches_tracked == 10
    for (name, ours), (_, want) in zip(theirs.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.allclose(ours, want, atol=1e-6), name


def test_a_sequential_needs_no_cuts() -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    stages = f3.convert(theirs, images()[0][:2])
    assert [type(stage).__name__ for stage in stages.stages] == ["Block", "Linear", "Linear"]
    assert stages[2].weight is theirs[6].weight
    history = (
        f3.Trainer(stages, "cross-entropy", f3.Adam(lr=3e-3), device="cpu", batch_size=24).fit(images(), 10, images()).history
    )
    assert history[-1]["test_error"] < 20


class Skip(nn.Module):
    """A connection over two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.a(x.flatten(1))
        return self.c(self.b(first) + first)


class Switches(Skip):
    """Something that only training does, not by a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(functional.dropout(self.a(x.flatten(1)), 0.5, self.training)))


class Flow(Skip):
    """Control flow on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x.flatten(1) if x.sum() > 0 else -x.flatten(1))))


class Pair(Skip):
    """Two results."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.a(x.flatten(1))
        return self.c(self.b(h)), x


class Tied(Skip):
    """One layer twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(self.a(x.flatten(1)))))


@pytest.mark.parametrize(
    ("model", "cut", "message"),
    [
        (Skip, ["b"], "'a' is used by 'add' across the cut after 'b'"),
        (Skip, ["a", "b"], "'a' is used by 'add' across the cut"),
        (Skip, ["nothing"], "cut 'nothing' is no submodule"),
        (Skip, ["c"], "nothing comes after the cut 'c'"),
        (Skip, None, "is no nn.Sequential"),
        (Switches, ["a"], "in training than in evaluation"),
        (Flow, ["a"], "cannot be followed"),
        (Pair, ["a"], "must return one tensor"),
        (Tied, ["a"], "called 2 times"),
    ],
)
def test_refusals(model: type[nn.Module], cut: list[str] | None, message: str) -> None:
    with pytest.raises(f3.InputError, match=message):
        f3.convert(model(), images()[0][:2], cut)


def test_a_block_with_skip_inside_is_fine() -> None:
    stages = f3.convert(Skip(), images()[0][:2], ["a"])
    assert len(stages) == 2
