"""Images that change from visit to visit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_train_script import fails, run
from torch import Tensor

import f3triton as f3
from f3triton.data.augment import Augmentation


def by_hand(image: Tensor, up: int, left: int, mirrored: bool) -> Tensor:
    """`image [C, H, W]` moved down and right by so many pixels, pixel by pixel."""
    found = torch.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            source = row + up, (width - 1 - column if mirrored else column) + left
            if 0 <= source[0] < height and 0 <= source[1] < width:
                found[:, row, column] = image[:, source[0], source[1]]
    return found


@pytest.mark.parametrize(("kind", "views"), [("shift", 9), ("crop-flip", 18)])
def test_an_image_is_moved_by_an_eighth_of_its_side_and_mirrored(kind: str, views: int) -> None:
    image = torch.rand(2, 8, 9)
    seen = Augmentation(kind, (2, 8, 9), 3)(image.flatten().expand(400, -1), 5).view(-1, 2, 8, 9)
    possible = torch.stack(
        [
            by_hand(image, up, left, mirrored)
            for up in (-1, 0, 1)
            for left in (-1, 0, 1)
            for mirrored in (False, True)[: views // 9]
        ]
    )
    which = (seen[:, None] == possible[None]).flatten(2).all(-1)  # [400, views]
    assert (which.sum(1) == 1).all()
    assert which.any(0).all()


def test_what_is_drawn_depends_on_seed_and_visit_only() -> None:
    x = torch.rand(20, 1, 8, 8)
    view = Augmentation("crop-flip", (1, 8, 8), 0)
    first = view(x, 7)
    view(x, 8)
    torch.rand(3)
    assert torch.equal(view(x, 7), first)
    assert not torch.equal(view(x, 8), first)
    assert not torch.equal(Augmentation("crop-flip", (1, 8, 8), 1)(x, 7), first)


@pytest.mark.parametrize("method", ["f3", "local", "bp", "fa"])
def test_every_method_sees_the_same_views_and_a_resumed_run_goes_on_with_them(method: str, tmp_path: Path) -> None:
    def trained(augment: str, *, stop: int | None = None, **more: object) -> dict[str, Tensor]:
        torch.manual_seed(0)
        train = f3.load_dataset(max_train_samples=60)[0]
        trainer = f3.Trainer(f3.models.MLP([64, 8, 10]), batch_size=25, method=method, device="cpu", augment=augment)

        def halt(count: int) -> None:
            if trainer.result.steps == stop:
                raise KeyboardInterrupt

        trainer.fit(train, 2, on_step=halt, **more)
        return trainer.model.state_dict()

    whole = trained("shift")
    assert not torch.equal(whole["stages.0.weight"], trained("none")["stages.0.weight"])
    trained("shift", stop=4, checkpoints=f3.run.checkpoint.Checkpoints(tmp_path, 100))
    resumed = trained("shift", resume=f3.run.checkpoint.newest(tmp_path, print))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_rows_are_no_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("a,b,label\n" + "".join(f"{i},{i % 3},{'xy'[i % 2]}\n" for i in range(40)))
    assert "needs images" in fails(capsys, "--dataset", table, "--augment", "shift")
    out = tmp_path / "run"
    assert run("--output-dir", out, "--augment", "crop-flip", "--epochs", 1, "--hidden", 8, "--max-train-samples", 100) == 0
    assert json.loads((out / "config.json").read_text())["options"]["augment"] == "crop-flip"
