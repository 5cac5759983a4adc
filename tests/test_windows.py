"""Windows: the order of visits, what a first visit teaches, against F3 written out by hand; and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_train_script import fails, run
from test_trainer import mlp, problem, train, weights
from torch import nn

import f3triton as f3
from f3triton.base.data import Visit
from f3triton.visits.windows import WindowOrder, Windows, resolve_windows, steps_per_epoch

OWN = {"window": 24, "visits": 3}


def order(samples: int, batch: int, windows: Windows, epochs: int, seed: int = 0) -> list[list[torch.Tensor]]:
    """The batches of every epoch, as sample indices."""
    windowed = WindowOrder(samples, batch, windows, seed)
    return [[visit.index for visit in windowed.visits(epoch)] for epoch in range(epochs)]


@pytest.mark.parametrize(
    ("samples", "batch", "size", "visits"), [(60, 8, 20, 3), (61, 7, 7, 2), (50, 10, 80, 4), (33, 1, 5, 2)]
)
def test_every_window_is_visited_so_many_times_in_a_row(samples: int, batch: int, size: int, visits: int) -> None:
    epochs = order(samples, batch, Windows(size, visits), 2 * visits)
    steps = steps_per_epoch(samples, batch, Windows(size, visits))
    assert [len(epoch) for epoch in epochs] == [steps] * 2 * visits
    passes = []
    for start in (0, visits):
        everything = torch.cat([torch.cat(epoch) for epoch in epochs[start : start + visits]]).tolist()
        assert len(everything) == samples * visits
        seen = []
        while everything:
            length = min(size, samples - len(seen))
            parts = [everything[i * length : (i + 1) * length] for i in range(visits)]
            assert all(sorted(part) == sorted(parts[0]) for part in parts)
            assert length < 5 or len({tuple(part) for part in parts}) == visits  # a new order at each visit
            seen += parts[0]
            everything = everything[visits * length :]
        assert sorted(seen) == list(range(samples))
        passes.append(seen)
    assert passes[0] != passes[1]


def test_an_order_can_be_entered_anywhere() -> None:
    windowed = WindowOrder(61, 7, Windows(20, 3), 0)
    for epoch in range(4):
        whole = [described(visit) for visit in windowed.visits(epoch)]
        for skip in range(len(whole) + 1):
            assert [described(visit) for visit in windowed.visits(epoch, skip)] == whole[skip:]


def described(visit: Visit) -> tuple:
    return visit.index.tolist(), visit.row.tolist(), visit.teach


@pytest.mark.parametrize(("first_visit", "teaches"), [("skip", "nothing"), ("target", "target"), ("stale", "signal")])
def test_what_a_first_visit_teaches_and_where_rows_are(first_visit: str, teaches: str) -> None:
    windows = Windows(20, 3, first_visit)
    visits = [visit for epoch in range(3) for visit in WindowOrder(61, 7, windows, 0).visits(epoch)]
    first = [number % 9 < 3 for number in range(27)] + [True, False, False]  # three batches a visit, and one of the last window
    assert [visit.teach for visit in visits] == [teaches if is_first else "signal" for is_first in first]
    for visit in visits:
        if windows.local:
            assert int(visit.row.max()) < 20
        else:
            assert torch.equal(visit.row, visit.index)
    of_window = {int(i): int(r) for visit in visits[:9] for i, r in zip(visit.index, visit.row, strict=True)}
    assert sorted(of_window.values()) == (list(range(20)) if windows.local else sorted(of_window))
    assert {visit.teach for visit in WindowOrder(61, 7, windows, 0, delayed=False).visits(0)} == {"signal"}


@pytest.mark.parametrize("first_visit", ["skip", "target", "stale"])
@pytest.mark.parametrize("mask", [False, True])
def test_windows_by_hand(first_visit: str, mask: bool) -> None:
    model, (x, y) = mlp(5).double(), problem()
    x, target = x.double(), nn.functional.one_hot(y, 3).double()
    w0, b0, w1, b1 = (p.detach().clone() for p in model.parameters())
    trainer = f3.Trainer(model, "cross-entropy", f3.SGD(lr=0.05), lr_schedule="constant", precision="float64", device="cpu",
                         batch_size=8, first_visit=first_visit, mask_target=mask, **OWN)  # fmt: skip
    trainer.fit((x, y), 6)
    feedback, visited, errors = model[0].feedback_matrix, {}, target.clone()
    for number, epoch in enumerate(order(60, 8, Windows(24, 3), 6)):
        for index in epoch:
            first = [visited.setdefault((number // 3, int(i)), 0) == 0 for i in index]
            for i in index:
                visited[number // 3, int(i)] += 1
            assert len(set(first)) == 1
            e = target[index] if first[0] and first_visit == "target" else errors[index]
            a0 = x[index] @ w0.T + b0
            h = torch.tanh(a0)
            delta = ((e * target[index] if mask else e) @ feedback) * (1 - h**2)
            if not (first[0] and first_visit == "skip"):
                w0, b0 = w0 - 0.05 * delta.T @ x[index], b0 - 0.05 * delta.sum(0)
            out = torch.softmax(h @ w1.T + b1, -1)
            g = (out - target[index]) / len(index)
            w1, b1 = w1 - 0.05 * g.T @ h, b1 - 0.05 * g.sum(0)
            errors[index] = target[index] - out
    for got, expected in zip(model.parameters(), (w0, b0, w1, b1), strict=True):
        torch.testing.assert_close(got.detach(), expected)


def test_the_store_holds_one_window_unless_its_errors_are_stale() -> None:
    for first_visit, rows in (("skip", 24), ("target", 24), ("stale", 60)):
        assert train(mlp(), 3, first_visit=first_visit, **OWN).learner.store.rows.shape == (rows, 3)
    assert train(mlp(), 3, window=1000, visits=3).learner.store.rows.shape == (60, 3)


def test_same_seed_same_result() -> None:
    one, same, other = (train(mlp(), seed=seed, **OWN) for seed in (1, 1, 2))
    assert torch.equal(weights(one.model), weights(same.model))
    assert not torch.equal(weights(one.model), weights(other.model))


def test_steps_and_schedule_count_sample_visits() -> None:
    seen = []
    trainer = f3.Trainer(mlp(), optimizer=f3.Adam(lr=0.01), batch_size=8, device="cpu", window=20, visits=3)
    result = trainer.fit(problem(), 6, problem(), on_step=seen.append)
    assert sum(seen) == 6 * 60
    assert result.steps == 6 * 9  # three windows of three batches each
    assert [record["epoch"] for record in result.history] == [1, 2, 3, 4, 5, 6]
    assert result.history[-1]["lr"] < 0.01 * 0.01  # the cosine has come down to its end


@pytest.mark.parametrize("method", ["bp", "dfa", "drtp", "last-layer"])
def test_methods_that_keep_no_error_take_the_order(method: str) -> None:
    plain, windowed = train(mlp(), method=method), train(mlp(), method=method, **OWN)
    assert not torch.equal(weights(plain.model), weights(windowed.model))


def test_graphed_steps_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(mlp(), **OWN)
    make = f3.Trainer.__init__

    def with_graph(self: f3.Trainer, *arguments: object, **given: object) -> None:
        make(self, *arguments, **given)
        self.cuda_graph = "on"

    monkeypatch.setattr(f3.Trainer, "__init__", with_graph)
    graphed = train(mlp(), **OWN)
    assert graphed.learner.graphs["signal"].steps
    assert graphed.learner.graphs["nothing"].steps
    torch.testing.assert_close(weights(graphed.model), weights(plain.model), rtol=1e-5, atol=1e-7)


def test_auto_is_ten_batches() -> None:
    assert resolve_windows("auto", None, None, 50, True) == Windows(500, 5, "skip")
    assert resolve_windows("off", None, None, 50, True) is None


@pytest.mark.parametrize(
    ("settings", "epochs", "message"),
    [
        ({"window": 7, "visits": 2}, 2, "window must be a whole number of at least the batch size 8, auto or off, got 7"),
        ({"window": "wide"}, 2, "window 'wide' is unknown; allowed: auto, off or a number of samples"),
        ({"window": 16, "visits": 1}, 2, "visits must be a whole number of at least 2, got 1"),
        ({"window": 16, "visits": 2, "first_visit": "none"}, 2, "first visit 'none' is unknown; allowed: skip, target, stale"),
        ({"visits": 2}, 2, "visits 2 has no effect without windows"),
        ({"first_visit": "skip"}, 2, "first visit 'skip' has no effect without windows"),
        ({"window": 16, "method": "dfa", "first_visit": "skip"}, 2, "first visit 'skip' has no effect where no error is kept"),
        ({"window": 16, "visits": 4}, 6, "epochs must be a multiple of 4, got 6"),
    ],
)
def test_settings_that_are_refused(settings: dict, epochs: int, message: str) -> None:
    with pytest.raises(f3.InputError, match=message):
        train(mlp(), epochs, **settings)


def test_batches_of_ones_own_are_refused() -> None:
    trainer = f3.Trainer(mlp(), device="cpu", batch_size=8, **OWN)
    with pytest.raises(f3.InputError, match="batches of your own and windows cannot go together"):
        trainer.fit(problem(), 3, batches=lambda epoch: [torch.arange(8)])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--hidden", 16, "--window", 200, "--visits", 4]
    assert run(*small, "--epochs", 4, "--output-dir", tmp_path / "run", "--compare") == 0
    assert "windows of 200 visited 4 times, first visit skip" in capsys.readouterr().out
    assert run(*small, "--epochs", 8, "--dry-run") == 0
    out = capsys.readouterr().out
    assert re.search(r"errors +7.8 KiB", out)  # 200 rows of 10 values
    assert "steps 232, of 50 sample visits each, in 8 epochs" in out
    assert "epochs must be a multiple of 4, got 6" in fails(capsys, *small, "--epochs", 6, "--dry-run")
    assert "visits 3 has no effect without windows" in fails(capsys, "--visits", 3)
