"""Diagnostics: the figures against cases that are known, and that looking changes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import f3triton as f3
from f3triton.run.diagnostics import Diagnostics, angle, draw, effective_rank, separability, summary_lines


def problem(samples: int = 200) -> f3.Dataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 6, generator=generator)
    return f3.Dataset.from_tensors(x, (x @ torch.randn(6, 3, generator=generator)).argmax(-1), classes=3)


def run(model: f3.Sequential, epochs: int = 3, look: bool = True, **settings: object) -> tuple[f3.Trainer, Diagnostics]:
    trainer = f3.Trainer(model, "cross-entropy", f3.Adam(lr=0.01), device="cpu", batch_size=20, **settings)
    diagnostics = Diagnostics(trainer, problem(), samples=100)
    trainer.fit(problem(), epochs, problem(), on_record=diagnostics if look else None)
    return trainer, diagnostics


def mlp(*hidden: int, **settings: object) -> f3.models.MLP:
    torch.manual_seed(0)
    return f3.models.MLP([6, *(hidden or (16, 12)), 3], **settings)


def test_angles_of_known_vectors() -> None:
    x = torch.tensor([1.0, 0.0])
    assert angle(x, x) == pytest.approx(0, abs=1e-6)
    assert angle(x, -x) == pytest.approx(180)
    assert angle(x, torch.tensor([0.0, 3.0])) == pytest.approx(90)
    assert angle(x, torch.zeros(2)) is None


def test_effective_rank_of_known_matrices() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.outer(torch.rand(5), torch.rand(4))) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.zeros(3, 3)) == 0


def test_separability_of_what_is_separable_and_what_is_not() -> None:
    target = nn.functional.one_hot(torch.arange(400) % 4).float()
    noise = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    assert separability(target @ torch.randn(4, 8) + 0.01 * noise, target) == 100
    assert separability(noise, target) < 45


@pytest.mark.parametrize("settings", [{}, {"method": "dfa"}, {"window": 100, "visits": 3}, {"method": "bp"}])
def test_looking_changes_nothing(settings: dict) -> None:
    epochs = 6
    seen, unseen = (run(mlp(), epochs, look, **settings)[0].model for look in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(seen.parameters(), unseen.parameters(), strict=True))


def test_dfa_with_the_weights_behind_as_feedback_has_no_angle() -> None:
    """With B = -W_out the update of the one hidden layer is the true gradient, summed over the batch instead of its mean."""
    torch.manual_seed(0)
    model = f3.models.MLP([6, 16, 3], feedback=[torch.zeros(3, 16)])
    trainer = f3.Trainer(model, "cross-entropy", f3.SGD(lr=0.0), method="dfa", device="cpu", batch_size=20)
    model[0].feedback_matrix = -model[1].weight.detach().clone()
    diagnostics = Diagnostics(trainer, problem(), samples=100)
    trainer.fit(problem(), 1, problem(), on_record=diagnostics)
    stage = diagnostics.records[0]["stages"][0]
    assert stage["angle"] == pytest.approx(0, abs=0.1)
    assert stage["weights_angle"] == pytest.approx(0, abs=0.1)
    assert stage["norm_ratio"] == pytest.approx(100, rel=1e-3)


def test_figures_of_f3() -> None:
    _, diagnostics = run(mlp(), 4)
    assert [record["epoch"] for record in diagnostics.records] == [1, 2, 3, 4]
    assert "error_cosine" not in diagnostics.records[0]  # the first visit taught by targets
    last = diagnostics.records[-1]
    assert -1 <= last["error_cosine"] <= 1
    assert 0 <= last["sign_flips"] <= 1
    for stage in last["stages"][:-1]:
        assert 0 < stage["angle"] < 180
        assert 1 <= stage["rank"] <= 3 + 1e-6
        assert stage["moved"] > 0
    assert not diagnostics.warnings
    assert any("angle" in line for line in summary_lines(diagnostics))


def test_a_stage_without_update_is_warned_of() -> None:
    _, diagnostics = run(mlp(16, 12, feedback=["trinomial", f3.Feedback("constant", scale=0.0)]), 2)
    assert {text.split(" received")[0] for text in diagnostics.warnings} == {"stage 2"}


def test_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = f3.Sequential(f3.Block(nn.Sequential(nn.Linear(6, 16), nn.Tanh())), f3.Linear(16, 8, "tanh"), f3.Linear(8, 3))
    _, diagnostics = run(model, 2)
    stages = diagnostics.records[-1]["stages"]
    assert stages[0]["angle"] is not None
    assert "weights_angle" in stages[1]
    diagnostics.save(tmp_path)
    saved = json.loads((tmp_path / "diagnostics.json").read_text())
    assert len(saved["records"]) == 2
    assert (tmp_path / "diagnostics.png").stat().st_size > 10_000
    draw([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert all(math.isfinite(stage["moved"]) for stage in stages)


def test_text_and_errors_of_lower_rank(tmp_path: Path) -> None:
    """A reduced error teaches in the direction of the law `R B'` that it stands for."""
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 6, encoding="utf-8")
    train, _ = f3.load_text(path, context=8)
    for rank in (None, 5):
        torch.manual_seed(0)
        model = f3.models.GPT(train.outputs, 8, 1, 2, 8)
        trainer = f3.Trainer(model, batch_size=4, error_rank=rank)
        diagnostics = Diagnostics(trainer, train, samples=6)
        trainer.fit(train, 3, on_record=diagnostics)
        last = diagnostics.records[-1]
        assert 0 < last["error_cosine"] < 1.001
        assert all(0 < stage["angle"] < 180 for stage in last["stages"][:-1])
        assert all(stage["rank"] <= 6 for stage in last["stages"][:-1])
    trainer, diagnostics = run(mlp(20), error_rank=2)
    assert all(stage["rank"] <= 2 + 1e-6 for stage in diagnostics.records[-1]["stages"][:-1])
    matrix = trainer.learner.signal.projection @ trainer.model[0].feedback_matrix
    found = angle(-matrix.flatten(), trainer.model[1].weight.detach().flatten())
    assert diagnostics.records[-1]["stages"][0]["weights_angle"] == pytest.approx(found)


def test_local_errors_with_one_hidden_layer_are_the_true_gradient() -> None:
    _, diagnostics = run(mlp(16), method="local")
    for record in diagnostics.records:
        assert record["stages"][0]["angle"] == pytest.approx(0, abs=1e-3)
        assert record["stages"][0]["norm_ratio"] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"reach": 2}, {"local_feedback": "random"}, {"local_head_depth": 1}])
def test_what_each_stage_says_and_how_its_update_points(settings: dict) -> None:
    trainer, diagnostics = run(mlp(16, 16, 16, norm="layer"), method="local", **settings)
    data = problem()
    x, target = data.inputs[diagnostics.index], data.targets[diagnostics.index]
    stages = diagnostics.records[-1]["stages"]
    for stage, a in zip([stages[0], stages[1], stages[3]], trainer.model.answers(x), strict=True):
        assert stage["readable"] == pytest.approx(100 * float((a.argmax(1) == target).double().mean()))
    assert stages[1]["adds"] == pytest.approx(stages[1]["readable"] - stages[0]["readable"])
    assert 0 < stages[0]["angle"] < 90
    assert stages[2]["angle"] == pytest.approx(0, abs=1e-3)  # hears the output only
    if settings == {}:  # by hand, with the first stage's own head
        model = trainer.model
        loss = nn.functional.cross_entropy(model.heads[0](model.stages[0](x)), target)
        own = torch.autograd.grad(loss, list(model.stages[0].parameters()))
        exact = torch.autograd.grad(nn.functional.cross_entropy(model(x), target), list(model.stages[0].parameters()))
        flat = (torch.cat([g.flatten() for g in one]) for one in (own, exact))
        assert stages[0]["angle"] == pytest.approx(angle(*flat), abs=1e-3)
    (line,) = (line for line in summary_lines(diagnostics) if line.startswith("right by each stage's own head"))
    assert line.count("(") == 3
    assert "(+" in line or "(-" in line
