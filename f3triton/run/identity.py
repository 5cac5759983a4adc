"""What a run is, as its checkpoints remember it: everything that its result depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from ..network.stage import Stage


def settings_of(trainer: Any, data: dict[str, object], epochs: int, eval_every: int) -> dict[str, object]:
    """Everything that the result depends on, as JSON has it.

    With a constant learning rate the number of epochs is not among them: more of them only go on. The device is not, and not
    how much is evaluated at once.
    """
    settings = trainer.settings.fixed() | {
        "network": repr(trainer.model),
        "network_config": json.loads(json.dumps(trainer.model.config())) if hasattr(trainer.model, "config") else None,
        "feedback": feedback_of(trainer.model),
        "eval_every": eval_every,
        "data": data,
    }
    return settings if trainer.lr_schedule == "constant" else settings | {"epochs": epochs}


def feedback_of(model: torch.nn.Module) -> list[str]:
    """The law of each stage's feedback matrix, or the hash of a given one, in the order of the stages."""
    found = []
    for stage in model.modules():
        if isinstance(stage, Stage):
            given = stage.feedback_law is None and stage.feedback_matrix is not None
            matrix = stage.feedback_matrix.double().cpu().contiguous().view(torch.uint8).numpy().data if given else b""
            found.append(f"given, {hashlib.sha256(matrix).hexdigest()[:16]}" if given else str(stage.feedback_law))
    return found
