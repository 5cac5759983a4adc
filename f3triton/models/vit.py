"""The vision transformer of the paper's experiments, and the usual one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..base.seeds import first_weights
from ..base.words import EMBEDDINGS, POOLS
from ..network.block import Block
from ..network.feedback import Feedback
from ..network.linear import Kept, Linear
from ..network.sequential import Sequential
from ..network.stage import not_shared
from ..network.updater import Step
from .transformer import NOT_STORED, TransformerBlock, as_stage


class Embedding(nn.Module):
    """Images `[M, channels, height, width]` (or flattened) to tokens `[M, tokens, dim]`.

    `joint`: one linear layer from the whole image to all tokens, as the authors have it; `patch`: the same one for each patch.
    With `positions` a learned vector is added to each token.
    """

    def __init__(self, image: tuple[int, int, int], patch: int, dim: int, kind: str, positions: bool) -> None:
        super().__init__()
        self.image, self.patch, self.kind = image, patch, check_word("embedding", kind, EMBEDDINGS)
        channels, height, width = image
        self.tokens, pixels = (height // patch) * (width // patch), patch * patch * channels
        self.linear = Linear(pixels, dim) if kind == "patch" else Linear(pixels * self.tokens, dim * self.tokens)
        self.position = nn.Parameter(0.02 * torch.randn(self.tokens, dim)) if positions else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), *self.image)
        x = rearrange(x, "m c (h p) (w q) -> m (h w) (p q c)", p=self.patch, q=self.patch)
        tokens = self.linear(x) if self.kind == "patch" else self.linear(x.flatten(1)).view(len(x), self.tokens, -1)
        return tokens if self.position is None else tokens + self.position


class Readout(Linear):
    """A Linear stage on all tokens of `x [M, tokens, dim]`: all in one (`flatten`, `[M, tokens dim]`) or their `mean`."""

    def __init__(self, pool: str, *arguments: object, **settings: object) -> None:
        super().__init__(*arguments, **settings)
        self.pool = pool

    def _pooled(self, x: Tensor) -> Tensor:
        return x.flatten(1) if self.pool == "flatten" else x.mean(1)

    def compute(self, x: Tensor, activated: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return super().compute(self._pooled(x), activated)

    def learn(self, x: Tensor, row: Tensor, step: Step) -> Tensor:
        return super().learn(self._pooled(x), row, step)

    def keep(self, x: Tensor, step: Step, wants_input: bool = False) -> tuple[Tensor, Kept]:
        h, (rows, slope_from, _) = super().keep(x if x.dim() == 2 else self._pooled(x), step)
        return h, (rows, slope_from, x.shape)

    def at_input(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        if self.pool == "flatten" or len(shape) == 2:
            return gradient.view(shape)
        return (gradient / shape[1]).unsqueeze(1).expand(shape)


class ViT(Sequential):
    """A transformer on `image_size x image_size` images in square patches, with a head of two linear layers.

    With `embedding="joint"`, `pool="flatten"` and `activation="tanh"`, the defaults, it is the authors' network
    (arXiv 2304.13372): the first stage is the embedding with the first transformer block, then come `depth - 1` blocks and the
    two layers of the head. `feedback` is a law, or a list with a law or matrix for each stage but the last.

    The first weights come from `seed`, or from torch's global generator.

    Raises InputError for sizes that do not fit: patches that do not divide the image, heads that do not divide the dimension.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        channels: int,
        classes: int,
        patch_size: int = 7,
        depth: int = 4,
        heads: int = 8,
        dim: int = 32,
        head_dim: int | None = None,
        mlp_width: int = 128,
        activation: str = "tanh",
        norm: str = "layer",
        dropout: float = 0.0,
        embedding: str = "joint",
        positions: bool = False,
        pool: str = "flatten",
        granularity: str = "block",
        feedback: str | Feedback | Sequence[str | Feedback | Tensor] = "trinomial",
        feedback_shape: str = "full",
        seed: int | None = None,
    ) -> None:
        self.settings = {key: value for key, value in locals().items() if key not in NOT_STORED}
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        for name, value in (("image size", min(height, width)), ("channels", channels), ("classes", classes),
                            ("patch size", patch_size), ("depth", depth)):  # fmt: skip
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} of a ViT must be a whole number of at least 1, got {value!r}")
        if height % patch_size or width % patch_size:
            raise InputError(
                f"patches of {patch_size} pixels do not divide an image of {height}x{width}; choose another patch size"
            )
        check_word("pool", pool, POOLS)
        law = feedback if isinstance(feedback, str | Feedback) else "trinomial"
        with first_weights(seed):
            first = Embedding((channels, height, width), patch_size, dim, embedding, positions)
            blocks = [
                TransformerBlock(dim, heads, mlp_width, head_dim, activation, norm, dropout, False, law, feedback_shape)
                for _ in range(depth)
            ]
            modules: list[nn.Module] = [nn.Sequential(first, blocks[0]), *blocks[1:]]
            if granularity == "layer":
                modules = [first, *blocks]
            laws = [feedback] * (len(modules) + 1) if isinstance(feedback, str | Feedback) else list(feedback)
            if len(laws) != len(modules) + 1:
                raise InputError(
                    f"a ViT of {len(modules) + 2} stages needs {len(modules) + 1} feedback laws or matrices, got {len(laws)}"
                )
            stages = [as_stage(module, granularity, law, feedback_shape) for module, law in zip(modules, laws, strict=False)]
            if granularity == "layer":  # the embedding's only layer gets its exact gradient from its own output: the same thing
                stages[0] = Block(first, laws[0], feedback_shape)
            width_in = first.tokens * dim if pool == "flatten" else dim
            head = Readout(pool, width_in, width_in, activation, laws[-1], feedback_shape=not_shared(feedback_shape))
            super().__init__(*stages, head, Linear(width_in, classes))

    def config(self) -> dict[str, object]:
        """What `load` needs to build the same network again."""
        return {"model": "vit", **self.settings}
