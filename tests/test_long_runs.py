"""Long runs: memory, file descriptors and threads are as many at the end as they were near the beginning."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch

import f3triton as f3
from f3triton.run.checkpoint import Checkpoints

STEPS, SAMPLES, BATCH = 30_000, 2400, 8
GROWS = 2 << 20  # bytes: what an allocator may do, and not 100 bytes a step

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")]


def used() -> tuple[int, int, int]:
    """(bytes of memory, open descriptors, threads) of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.parametrize(
    "settings",
    [
        {"error_store": True},
        {"error_store": True, "window": 200, "visits": 5, "first_visit": "stale"},
        {"window": 200, "visits": 5},
        {"error_store": True, "window": 200, "visits": 5},
        {"stream": True, "window": 200, "visits": 5},
        {"text": True, "error_store": True},
        {"text": True, "window": 200, "visits": 5},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_nothing_grows(settings: dict[str, object], tmp_path: Path) -> None:
    own = {name: value for name, value in settings.items() if name not in ("text", "stream")}
    if own.pop("error_store", False):
        own["error_store"] = tmp_path / "errors"
    generator = torch.Generator().manual_seed(5)
    if "text" in settings:
        (tmp_path / "text").write_text("".join("abcdefgh"[i] for i in torch.randint(8, (SAMPLES * 5,), generator=generator)))
        train, test = f3.load_text(tmp_path / "text", context=4, max_train_samples=SAMPLES, max_test_samples=50)
        model: f3.Sequential = f3.models.GPT(train.outputs, 4, depth=1, heads=1, dim=4, dropout=0.1, seed=1)
    elif "stream" in settings:
        rows = ["a,b,y", *(f"{i % 7},{i % 5},{i % 3}" for i in range(SAMPLES * 5 // 4))]
        (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
        train, test = f3.stream_dataset(tmp_path / "rows.csv", shuffle_buffer=400)
        model = f3.models.MLP([train.in_features, 4, 3], seed=1)
    else:
        x = torch.randn(SAMPLES, 4, generator=generator)
        train = test = f3.Dataset.from_tensors(x, x[:, :3].argmax(-1))
        model = f3.models.MLP([4, 4, 3], seed=1)
    trainer = f3.Trainer(model, batch_size=BATCH, device="cpu", **own)
    found: list[tuple[int, int, int]] = []

    def look(samples: int) -> None:
        if trainer.result.steps in (STEPS // 3, STEPS):
            found.append(used())

    before = used()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1000)
    trainer.fit(train, STEPS * BATCH // len(train), test, eval_every=10, on_step=look, checkpoints=checkpoints)
    (memory, *others), (memory_then, *others_then) = found
    assert memory_then - memory < GROWS
    assert others_then == others
    assert list(used()[1:]) == list(before[1:])
