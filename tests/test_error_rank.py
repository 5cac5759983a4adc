"""Errors in less than C numbers: times a fixed random matrix, and as unbiased samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import f3triton as f3
from f3triton.error_store import make_codec
from f3triton.error_store.codecs import ByPosition
from f3triton.network.feedback import error_projection

RANK = 3


def data(samples: int = 40, classes: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (samples,), generator=generator)


def fit(model: f3.Sequential, **settings) -> f3.Trainer:
    settings = {"precision": "float64", "batch_size": 8, "seed": 4, "loss": "cross-entropy", **settings}
    trainer = f3.Trainer(model, optimizer=f3.Adam(lr=1e-2), **settings)
    trainer.fit(data(), 6)
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mask_target": True},
        {"method": "dfa"},
        {"method": "drtp"},
        {"window": 16, "visits": 3},
        {"window": 16, "visits": 3, "first_visit": "target"},
    ],
)
def test_a_rank_is_another_law_computed_exactly(settings: dict) -> None:
    """Training with `e R` kept and `B'` equals training with `e` kept and `B = R B'`."""
    torch.manual_seed(0)
    short = f3.models.MLP([5, 9, 7, 6])
    start = {name: tensor.clone() for name, tensor in short.state_dict().items()}
    trainer = fit(short, error_rank=RANK, **settings)
    projection = error_projection(6, RANK, 4).double()
    matrices = [projection @ stage.feedback_matrix for stage in short.stages[:-1]]
    assert [list(stage.feedback_matrix.shape) for stage in short.stages[:-1]] == [[RANK, 9], [RANK, 7]]
    whole = f3.models.MLP([5, 9, 7, 6], feedback=matrices).double()
    whole.load_state_dict(start)
    other = fit(whole, **settings)
    for name, tensor in short.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.allclose(tensor, start[name].double())
    if trainer.learner.store is not None:
        assert trainer.learner.store.width == RANK
        rows = other.learner.store.rows
        if settings.get("mask_target"):
            rows = rows * torch.nn.functional.one_hot(data()[1], 6)
        torch.testing.assert_close(trainer.learner.store.rows, rows @ projection)


def test_a_rank_of_text(tmp_path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 6, encoding="utf-8")
    train, _ = f3.load_text(path, context=8)

    def gpt(matrices: dict[str, Tensor] | None = None) -> f3.models.GPT:
        torch.manual_seed(0)
        model = f3.models.GPT(train.outputs, 8, 1, 2, 8).double()
        for name, matrix in (matrices or {}).items():
            stage = model.get_submodule(name)
            stage.feedback_law, stage.feedback_matrix = None, matrix
        return model

    def learn(model: f3.models.GPT, **settings) -> f3.models.GPT:
        f3.Trainer(model, optimizer=f3.Adam(lr=1e-3), precision="float64", batch_size=5, seed=4, **settings).fit(train, 4)
        return model

    short = learn(gpt(), error_rank=RANK)
    projection = error_projection(train.outputs, RANK, 4).double()
    matrices = {f"stages.{i}": projection @ short.stages[i].feedback_matrix for i in (0, 1)}
    whole = learn(gpt(matrices))
    for name, tensor in short.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_a_projection_keeps_lengths() -> None:
    errors = torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    projected = errors @ error_projection(500, 64, 0)
    assert (projected.norm(dim=1) / errors.norm(dim=1)).mean() == pytest.approx(1, abs=0.05)
    assert not torch.equal(error_projection(500, 64, 0), error_projection(500, 64, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"error_rank": 6}, "error rank must be a whole number from 1 to 5 \\(of 6 outputs\\), got 6"),
        ({"error_rank": 0}, "from 1 to 5"),
        ({"error_rank": 2, "method": "bp"}, "error rank 2 has no effect with the method 'bp'"),
        ({"error_rank": 2, "method": "last-layer"}, "has no effect with the method 'last-layer'"),
        ({"error_rank": 4, "error_dtype": "top-2"}, "these rows have no classes"),
        ({"error_rank": 4, "error_dtype": "sampled-2"}, "these rows have no classes"),
        ({"error_dtype": "sampled-6"}, "must keep fewer entries than the 6"),
        ({"error_dtype": "sampled-1"}, "error dtype must be|error dtype 'sampled-1'"),
    ],
)
def test_what_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(f3.InputError, match=message):
        fit(f3.models.MLP([5, 9, 6]), **settings)


# --- sampled-K --------------------------------------------------------------------------------------------------------


def errors_of(rows: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`y* - softmax(a)` and `y*`, `[rows, classes]`."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.nn.functional.one_hot(torch.randint(classes, (rows,), generator=generator), classes).double()
    return target - torch.softmax(2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64), 1), target


@pytest.mark.parametrize("classes", [30, 40_000])
def test_sampled_rows_hold_the_target_and_k_minus_1_draws(classes: int) -> None:
    errors, target = errors_of(7, classes)
    codec = make_codec("sampled-5", classes, torch.float64)
    rows = codec.encode(errors, target, torch.arange(7))
    assert rows.shape == (7, codec.row_bytes) == (7, 5 * (2 if classes < 32768 else 4) + 8)
    back = codec.decode(rows)
    hit = target.bool()
    torch.testing.assert_close(back[hit], errors[hit].float().double())
    others = (back * ~hit).sum(1)
    torch.testing.assert_close(others, (errors * ~hit).sum(1), rtol=1e-6, atol=1e-6)  # the sum of the others is kept
    assert ((back != 0).sum(1) <= 5).all()
    assert torch.equal(codec.decode(codec.encode(target, target, torch.arange(7))), target)


def test_sampled_rows_are_unbiased() -> None:
    """The mean over many rows with the same error comes close to it, with signs of both kinds; the largest entries do not."""
    errors, target = errors_of(1, 25)
    errors = errors * torch.where(torch.arange(25) % 3 == 0, -1.0, 1.0) * (1 - target) + errors * target
    many, targets = errors.expand(20_000, -1), target.expand(20_000, -1)
    codec = make_codec("sampled-4", 25, torch.float64, seed=3)
    back = codec.decode(codec.encode(many, targets, torch.arange(20_000)))
    deviation = back.std(0) / 20_000**0.5
    assert ((back.mean(0) - errors[0]).abs() < 4.5 * deviation + 1e-6).all()
    top = make_codec("top-4", 25, torch.float64)
    assert (top.decode(top.encode(errors, target)) - errors).abs().max() > 0.01


def test_draws_follow_seed_row_and_content() -> None:
    errors, target = errors_of(64, 30)
    index = torch.arange(64)

    def rows(seed: int = 0, index: Tensor = index, errors: Tensor = errors) -> Tensor:
        return make_codec("sampled-4", 30, torch.float64, seed=seed).encode(errors, target, index)

    assert torch.equal(rows(), rows())
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = make_codec("sampled-4", 30, torch.float64).encode(errors[order], target[order], order)
    assert torch.equal(shuffled, rows()[order])  # where a sample stands in a batch does not matter
    for other in (rows(seed=1), rows(index=index + 64), rows(errors=errors * 1.001)):
        assert (other[:, :8] != rows()[:, :8]).any(1).float().mean() > 0.8


@pytest.mark.parametrize("word", ["float32", "int8", "ternary", "top-3", "sampled-4"])
def test_positions(word: str) -> None:
    """A row of many positions is their rows side by side, by the word that a file of rows has for it."""
    errors, target = errors_of(12, 10)
    each = make_codec(word, 10, torch.float32)
    codec = make_codec(f"{word}x4", 10, torch.float32)
    assert isinstance(codec, ByPosition)
    assert (codec.word, codec.row_bytes, codec.width) == (f"{word}x4", 4 * each.row_bytes, 10)
    index = torch.tensor([5, 0, 2])
    rows = codec.encode(errors.float(), target.float(), index)
    assert rows.shape[0] == 3
    numbers = torch.cat([torch.arange(4 * i, 4 * i + 4) for i in index])
    assert torch.equal(codec.decode(rows), each.decode(each.encode(errors.float(), target.float(), numbers)))
    with pytest.raises(f3.InputError, match="error dtype"):
        f3.Trainer(f3.models.MLP([5, 9, 6]), error_dtype=f"{word}x4")


@pytest.mark.parametrize("word", ["top-8", "sampled-8"])
def test_a_text_learns_from_few_entries(tmp_path, word: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 6, encoding="utf-8")
    train, _ = f3.load_text(path, context=8)
    torch.manual_seed(0)
    model = f3.models.GPT(train.outputs, 8, 1, 2, 16)
    trainer = f3.Trainer(model, optimizer=f3.Adam(lr=5e-3), batch_size=4, error_dtype=word, window="auto", visits=4)
    history = trainer.fit(train, 8).history
    assert trainer.learner.store.bytes_per_sample == 8 * {"top-8": 32, "sampled-8": 24}[word]
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.1


def test_files_keep_text(tmp_path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 6, encoding="utf-8")
    train, _ = f3.load_text(path, context=8)

    def learn(**settings) -> f3.models.GPT:
        torch.manual_seed(0)
        model = f3.models.GPT(train.outputs, 8, 1, 2, 8)
        f3.Trainer(model, batch_size=4, **settings).fit(train, 3)
        return model

    for more in ({}, {"error_dtype": "sampled-4"}, {"error_rank": 4}):
        here, there = learn(**more), learn(**more, error_store=tmp_path / f"errors{len(list(tmp_path.iterdir()))}")
        for a, b in zip(here.parameters(), there.parameters(), strict=True):
            assert torch.equal(a, b)
