"""Stages in order: a network."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from ..base.exceptions import InputError
from ..base.seeds import derived_seed, drawing
from .block import Block
from .feedback import Feedback
from .head import Head
from .linear import Linear
from .stage import Stage


class Sequential(nn.Module):
    """Stages in order. `forward` gives the last stage's output: logits for classification, values for regression.

    `heads`, where there are some, read the outputs of hidden stages (see `learn.local`), but for the first `unread` ones, which
    learn with the stage behind them: an embedding says nothing by itself. `exit` says from where `forward` answers: the last
    stage (None), a hidden one by its number among those that are read, from 1, or the `mean` of all.

    Raises InputError for an empty list, something that is not a stage, or a parameter shared by two stages.
    """

    exit: int | str | None = None
    unread = 0

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
        self.heads: nn.ModuleList | None = None
        self.reading = 0  # so many last stages read the earlier ones, in place of heads

    def __getitem__(self, position: int) -> Stage:
        return self.stages[position]

    def __len__(self) -> int:
        return len(self.stages)

    def of(self, place: int) -> nn.ModuleList:
        """All that belongs to the stage in that place: itself, and its head."""
        head = [] if self.heads is None or place >= len(self.heads) else [self.heads[place]]
        return nn.ModuleList([self.stages[place], *head])

    def forward(self, x: Tensor) -> Tensor:
        if self.exit == "mean":
            return torch.stack(list(self.answers(x))).mean(0)
        if self.exit is not None:
            return next(islice(self.answers(x), self.exit - 1, None))
        for stage in self.stages:
            x = stage(x)
        return x

    @property
    def read(self) -> int:
        """Hidden stages before this place, but for the `unread` ones, can be read by themselves; those behind them learn from
        the output."""
        if self.heads is not None:
            return len(self.heads)
        return len(self.stages) - 1 - self.reading if self.reading else 0

    @property
    def reading_depth(self) -> int:
        """So many stages are in front of each reading."""
        return self._heads_are["depth"] if self.heads is not None else max(0, self.reading - 1)

    @property
    def exits(self) -> int:
        """How many answers there are, the network's own among them."""
        return max(0, self.read - self.unread) + 1

    def answers(self, x: Tensor) -> Iterator[Tensor]:
        """What the output of each stage that can be read says by itself, in order, and then the network's output."""
        for place, stage in enumerate(self.stages):
            x = stage(x)
            if self.unread <= place < self.read:
                yield self.answer(place, x)
        yield x

    def answer(self, place: int, x: Tensor) -> Tensor:
        """What the output `x [M, ...]` of the stage in that place says by itself."""
        if self.heads is not None:
            return self.heads[place](x)
        for stage in self.stages[-self.reading :]:
            x = stage(x)
        return x

    def read_by(self, stages: int) -> None:
        """Let the last `stages`, the output among them, read the outputs of those before them.

        Raises InputError where there are no stages before them, or their outputs have other shapes than the readers' input.
        """
        hidden = list(self.stages[:-1])
        shapes = {tuple(stage.output_shape) for stage in hidden[self.unread : max(self.unread + 1, len(hidden) + 1 - stages)]}
        if stages > len(hidden) or len(shapes) > 1:
            needed = f"the last {stages} stages can read the outputs of the others only where all of these have one shape"
            raise InputError(f"shared heads: {needed}, got {sorted(map(list, shapes))}; use heads of the stages' own")
        self.reading = stages

    def add_heads(
        self,
        shapes: Sequence[Sequence[int]],
        outputs: int,
        positions: int = 1,
        depth: int = 0,
        law: str | Feedback | None = None,
        seed: int = 0,
    ) -> None:
        """Give every hidden stage but the last a head; `shapes` are those of all hidden stages' outputs a sample. See
        `head.Head`.

        With a `depth`, copies of the next so many hidden stages stand in front of each.
        """
        hidden, heads = list(self.stages[:-1]), []
        with drawing(torch.device("cpu"), seed, "heads"):
            heads += [nn.Identity() for _ in hidden[: min(self.unread, len(hidden) - 1)]]  # so that places are numbers
            for place in range(self.unread, len(hidden) - 1):
                between = [copy.deepcopy(stage) for stage in hidden[place + 1 : place + 1 + depth]]
                last = hidden[place + len(between)]
                normal = isinstance(last, Linear) and last.norm != "none" and not last.residual
                head = Head(torch.Size(shapes[place + len(between)]), outputs, positions, normal, law)
                head.draw(derived_seed(seed, "head feedback", place))
                heads.append(Block(nn.Sequential(*between, head)) if between else head)
        like = next(self.parameters())
        self.heads = nn.ModuleList(heads).to(like.device, like.dtype)
        self._heads_are = {
            "shapes": [list(shape) for shape in shapes],
            "outputs": outputs,
            "positions": positions,
            "depth": depth,
        }

    def readings(self) -> dict[str, object]:
        """What a description of the network needs beside its own settings to build its heads again; see `models.build`."""
        if self.heads is not None:
            return {"exits": self._heads_are}
        return {"reading": self.reading} if self.reading else {}

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
