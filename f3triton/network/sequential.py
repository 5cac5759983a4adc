"""Stages in order: a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..base.exceptions import InputError
from ..base.seeds import derived_seed
from .stage import Stage


class Sequential(nn.Module):
    """Stages in order. `forward` gives the last stage's output: logits for classification, values for regression.

    Raises InputError for an empty list, something that is not a stage, or a parameter shared by two stages.
    """

    def __init__(self, *stages: Stage) -> None:
        super().__init__()
        if not stages:
            raise InputError("a Sequential needs at least one stage, got none")
        owner: dict[nn.Parameter, int] = {}
        for position, stage in enumerate(stages):
            if not isinstance(stage, Stage):
                raise InputError(f"stage {position} is a {type(stage).__name__}; a Sequential takes Linear and Block stages")
            for parameter in stage.parameters():
                if owner.setdefault(parameter, position) != position:
                    raise InputError(f"stages {owner[parameter]} and {position} share a parameter; each must own its own")
        self.stages = nn.ModuleList(stages)

    def __getitem__(self, position: int) -> Stage:
        return self.stages[position]

    def __len__(self) -> int:
        return len(self.stages)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x

    @torch.no_grad()
    def prepare(
        self, example: Tensor, outputs: int, seed: int | None, positions: int = 1, error_width: int | None = None
    ) -> None:
        """Run `example [1, ...]` through, and draw every hidden stage's feedback matrix for the size of its output.

        Nothing is drawn where `seed` is None. `positions` is the number of predictions, each of `outputs` values, for a sample;
        an error has `error_width` entries, `outputs` by default.

        Raises InputError where an input does not fit a stage, or the last stage does not give such an output.
        """
        was_training = self.training
        self.eval()
        x = example
        for position, stage in enumerate(self.stages):
            try:
                taught = seed is not None and position < len(self) - 1
                own_seed = derived_seed(seed, "feedback", position) if taught else None
                x = stage.prepare(x, error_width or outputs, own_seed, positions)
            except InputError as error:
                raise InputError(f"stage {position}: {error}") from None
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise InputError(f"stage {position} cannot take an input of shape {list(x.shape)}: {reason}") from None
        self.train(was_training)
        shape, needed = list(x.shape[1:]), [outputs] if positions == 1 else [positions, outputs]
        if shape != needed:
            raise InputError(f"the last stage's output for a sample has shape {shape}; the data set needs {needed}")
