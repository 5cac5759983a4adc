"""Feedback matrices: every law by its definition, seeds, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import f3triton as f3
from f3triton.base.words import LAWS


def draw(law: str, outputs: int = 3, features: int = 8, seed: int = 0, **settings: object) -> torch.Tensor:
    return f3.Feedback(law, **settings).draw(outputs, features, seed)


@pytest.mark.parametrize("law", LAWS)
def test_shape_and_seed(law: str) -> None:
    outputs, features = (2, 9) if law == "cartesian-product" else (3, 8)
    one = draw(law, outputs, features, seed=1)
    assert one.shape == (outputs, features)
    assert one.is_contiguous()
    torch.rand(5)  # the global state must not matter
    assert torch.equal(one, draw(law, outputs, features, seed=1))


def test_random_laws_differ_by_seed_and_keep_their_range() -> None:
    for law, values in (("trinomial", {-1.0, 0.0, 1.0}), ("binomial", {0.0, 1.0})):
        matrix = draw(law, 10, 500)
        assert set(matrix.unique().tolist()) == values
        assert not torch.equal(matrix, draw(law, 10, 500, seed=1))
        counts = torch.stack([(matrix == value).float().mean() for value in values])
        assert (counts - 1 / len(values)).abs().max() < 0.03
    kaiming = draw("kaiming", 10, 400)
    assert kaiming.abs().max() <= 1 / math.sqrt(400)
    assert kaiming.std() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)
    line = draw("kaiming-repeat-line", 10, 400)
    assert torch.equal(line, line[:, :1].expand_as(line))
    assert 0.5 < line.abs().max() <= 1


def test_fixed_laws() -> None:
    eye = torch.eye(3)
    assert torch.equal(draw("identity-repeat-pm"), torch.cat([eye, -eye, eye[:, :2]], 1))
    assert torch.equal(draw("identity-repeat"), torch.cat([eye, eye, eye[:, :2]], 1))
    assert torch.equal(draw("identity-fill-zero"), torch.cat([eye, torch.zeros(3, 5)], 1))
    assert torch.equal(draw("identity-repeat-pm", features=2), eye[:, :2])
    assert torch.equal(draw("constant"), torch.ones(3, 8))
    assert draw("alternate-negative")[0].tolist() == [-1, 1] * 4
    assert draw("chunked-negative", features=5)[0].tolist() == [1, 1, -1, -1, -1]


def test_cartesian_product_has_every_combination_once() -> None:
    columns = draw("cartesian-product", 2, 9).T.tolist()
    assert sorted(columns) == sorted([a, b] for a in (-1, 0, 1) for b in (-1, 0, 1))
    assert draw("cartesian-product", 1, 2, values=(0.5, 2)).tolist() == [[0.5, 2]]


def test_values_and_scale() -> None:
    assert set(draw("discrete-uniform", 10, 100, values=(2, 5)).unique().tolist()) == {2.0, 5.0}
    assert torch.equal(draw("trinomial", scale=0.5), 0.5 * draw("trinomial"))
    assert torch.equal(draw("constant", scale="1/C"), torch.full((3, 8), 1 / 3))
    assert not draw("constant", scale="zeros").any()


def test_the_authors_names() -> None:
    assert f3.Feedback("kaiming_uniform").law == "kaiming"
    assert f3.Feedback("identity_repeat_pm").law == "identity-repeat-pm"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"law": "gaussian"}, "feedback 'gaussian' is unknown; allowed: kaiming"),
        ({"law": "kaiming", "values": (1, 2)}, "belong to discrete-uniform"),
        ({"law": "discrete-uniform", "values": ()}, "at least one"),
        ({"law": "discrete-uniform", "values": (math.nan,)}, "finite"),
        ({"scale": "1/N"}, "feedback scale '1/N' is unknown"),
        ({"scale": math.inf}, "must be a finite number"),
    ],
)
def test_refused(settings: dict, message: str) -> None:
    with pytest.raises(f3.InputError, match=message):
        f3.Feedback(**settings)


def test_a_law_that_does_not_fit_the_width() -> None:
    with pytest.raises(f3.InputError, match=r"3\^10 = 59049 units, got 500"):
        draw("cartesian-product", 10, 500)
    with pytest.raises(f3.InputError, match=r"3\^1000 units"):
        draw("cartesian-product", 1000, 500)


@pytest.mark.parametrize("law", ["trinomial", "binomial", "kaiming"])
def test_generated_entries_follow_their_law(law: str) -> None:
    generated = f3.Feedback(law, scale=2.0).generated(10, 5000, seed=3)
    matrix = generated.dense(torch.device("cpu"))
    assert torch.equal(matrix, generated.dense(torch.device("cpu")))
    assert not torch.equal(matrix, f3.Feedback(law, scale=2.0).generated(10, 5000, seed=4).dense(torch.device("cpu")))
    if law == "kaiming":
        bound = 2 / 5000**0.5
        assert matrix.abs().max() <= bound
        assert matrix.std() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert matrix.mean() == pytest.approx(0, abs=0.02 * bound)
    else:
        values = {"trinomial": [-2.0, 0.0, 2.0], "binomial": [0.0, 2.0]}[law]
        shares = [float((matrix == value).double().mean()) for value in values]
        assert shares == pytest.approx([1 / len(values)] * len(values), abs=0.01)
    rows = torch.corrcoef(matrix)  # the rows have nothing to do with one another
    assert (rows - torch.eye(10)).abs().max() < 0.07
    error = torch.randn(7, 10, dtype=torch.float64)
    assert torch.allclose(generated.project(error, chunk=999), error @ matrix.double(), rtol=1e-6)


@pytest.mark.parametrize("shape", ["full", "shared"])
def test_training_with_generated_feedback_equals_training_with_its_matrix(shape: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(60, 1, 8, 8, generator=generator), torch.arange(60) % 3

    def run(kind: str, feedback: object = "trinomial") -> f3.models.ConvNet:
        torch.manual_seed(0)
        model = f3.models.ConvNet((1, 8, 8), 3, [4, 6], 3, [16], feedback=feedback, feedback_shape=kind)
        for stage in model.stages[:-1]:
            stage.feedback_shape = kind if stage is model[0] or kind.endswith("generated") else "full"
        trainer = f3.Trainer(model, device="cpu", batch_size=20)
        if kind == shape:
            trainer.check((x, y), None, 1)
            for own, other in zip(model.stages[:-1], made.stages[:-1], strict=True):
                own.feedback_law, own.feedback_matrix = None, other.generated.dense(torch.device("cpu"))
        trainer.fit((x, y), 3)
        return model

    made = run(f"{shape}-generated" if shape == "shared" else "generated")
    assert all(stage.feedback_matrix is None for stage in made.stages)
    stored = run(shape)
    for one, other in zip(made.parameters(), stored.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_laws_that_cannot_be_generated() -> None:
    with pytest.raises(f3.InputError, match="'identity-repeat' cannot be generated"):
        f3.Feedback("identity-repeat").generated(3, 9, 0)
