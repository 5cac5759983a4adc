"""The programs of docs/kernels.md run and learn, and `help` of every operation says all that is needed to call it."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from f3triton.kernels import SGD, State, Update, eager, library, reference

PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
LAYER, LOOP, BLOCK = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_a_layer() -> None:
    names: dict[str, object] = {}
    exec(LAYER, names)
    before = names["linear"].weight.clone()
    h = names["visit"](torch.randn(5, 784), torch.randn(5, 10), 1)
    assert h.shape == (5, 500)
    assert not torch.equal(before, names["linear"].weight)


def test_the_loop_learns_and_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(stop: str = "nothing") -> tuple[list[str], dict[str, torch.Tensor]]:
        said: list[str] = []

        def show(text: str) -> None:
            said.append(text)
            if stop in text:
                raise KeyboardInterrupt

        names: dict[str, object] = {"print": show}
        with contextlib.suppress(KeyboardInterrupt):
            exec(LOOP, names)
        return said, names["everything"](torch.tensor(0))

    (tmp_path / "whole").mkdir()
    (tmp_path / "in two").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    said, whole = run()
    assert float(said[-1].split()[-1].rstrip("%")) > 90
    monkeypatch.chdir(tmp_path / "in two")
    first, _ = run(stop="epoch 3")
    second, resumed = run()
    assert first + second == said
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=0, msg=name)


def test_the_block_learns_as_by_torchs_optimizer() -> None:
    names: dict[str, object] = {}
    exec(BLOCK, names)
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(2)))
    x, wanted = torch.randn(8, 10, 32), torch.randn(8, 10, 32)
    optimizer, losses = torch.optim.AdamW(blocks.parameters(), lr=1e-3), []
    for _ in names["losses"]:
        loss = nn.functional.mse_loss(blocks(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert names["losses"] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]


def test_help_says_formula_shapes_types_and_errors() -> None:
    rooms = [reference, eager, library]
    if importlib.util.find_spec("triton"):
        rooms.append(pytest.importorskip("f3triton.kernels.gpu.ops"))
    for room in rooms:
        for name in library.RETURNS:
            text = getattr(room, name).__doc__
            assert "See `reference" not in text, f"{room.__name__}.{name}"
            for part in ("`[^`]*=|<-|loss_gradient", r"\[M, |any shape", "type|float32|Returns None", "Raises ValueError"):
                assert re.search(part, text), f"{room.__name__}.{name}: nothing of {part}"


def test_words_that_are_unknown_are_refused_by_name() -> None:
    x, weight = torch.randn(4, 5), torch.randn(3, 5)
    for ops in (reference, eager, library):
        with pytest.raises(ValueError, match="activation 'softplus' is unknown; allowed: identity, tanh"):
            ops.linear_forward(x, weight, activation="softplus")
        for arguments in (("hinge", "delayed-error"), ("mse", "yesterday's")):
            with pytest.raises(ValueError, match=r"(loss|signal) .* is unknown; allowed"):
                ops.output_step(torch.randn(4, 3), torch.randn(4, 3), *arguments)
        with pytest.raises(ValueError, match="loss 'hinge' is unknown"):
            ops.head_step_(x, weight, None, torch.randn(4, 3), "hinge", State(()), None, Update(SGD(), 0.1, 1))
