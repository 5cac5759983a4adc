"""A causal transformer over tokens: a language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..base.seeds import first_weights
from ..base.words import FEEDBACK_AT
from ..network.block import Block
from ..network.feedback import Feedback
from ..network.linear import Linear
from ..network.norm import LayerNorm
from ..network.sequential import Sequential
from ..network.stage import Stage
from ..network.updater import Step
from .transformer import NOT_STORED, TransformerBlock, as_stage


class TokenEmbedding(Stage):
    """Token ids int64 `[M, t]` to vectors `[M, t, dim]`: a learned one for each token plus a learned one for each position.

    With a `tied` layer the tokens' vectors are the rows of its weight `[vocabulary, dim]`, which this stage reads and does not
    update. Without autograd: a token's gradient is the sum of the signals at its places. What is kept for teaching are the ids
    `[M, t]`, the output `[M, t, dim]`, and the mask of its dropout in the same shape, or None. Raises InputError for more
    tokens than `context`.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        dim: int,
        dropout: float,
        feedback: str | Feedback | Tensor,
        feedback_shape: str,
        tied: Linear | None = None,
    ) -> None:
        super().__init__(feedback, feedback_shape)
        self.vocabulary, self.context, self.dropout = vocabulary, context, dropout
        self.weight = None if tied is not None else nn.Parameter(dim**-0.5 * torch.randn(vocabulary, dim))
        self.position = nn.Parameter(dim**-0.5 * torch.randn(context, dim))
        self._tied = () if tied is None else (tied,)  # in a tuple it is no part of this stage
        self.tied = tied is not None

    def vectors(self) -> Tensor:
        """Those of the tokens, `[vocabulary, dim]`."""
        return self._tied[0].weight if self._tied else self.weight

    def compute(self, x: Tensor) -> Tensor:
        return functional.dropout(self._embed(x), self.dropout, self.training)

    def _embed(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.is_floating_point():
            raise InputError(f"a TokenEmbedding needs token ids [batch, tokens], got {x.dtype} of shape {list(x.shape)}")
        if x.shape[1] > self.context:
            raise InputError(f"{x.shape[1]} tokens are more than the context {self.context} of the model")
        try:
            tokens = functional.embedding(x, self.vectors())
        except IndexError:  # a GPU has no time to look
            raise InputError(f"a token id is outside 0..{self.vocabulary - 1}, the model's vocabulary") from None
        return tokens + self.position[: x.shape[1]]

    def keep(self, x: Tensor, step: Step, wants_input: bool = False) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
        h, mask = self._embed(x), None
        self.check_shape(h)
        if self.dropout and self.training:
            mask = functional.dropout(torch.ones_like(h), self.dropout)
            h = h * mask
        return h, (x, h, mask)

    def teach(self, kept: tuple[Tensor, Tensor, Tensor | None], row: Tensor, step: Step) -> None:
        h = kept[1]
        self.finish(kept, self.error_signal(row, h, step.scale), step)

    def finish(
        self, kept: tuple[Tensor, Tensor, Tensor | None], gradient: Tensor, step: Step, wants_input: bool = False
    ) -> None:
        if kept[2] is not None:
            gradient = gradient * kept[2]
        if self.weight is not None:  # autograd's own, which is deterministic on every device
            of_tokens = torch.ops.aten.embedding_dense_backward(gradient.contiguous(), kept[0], self.vocabulary, -1, False)
            step.apply(self.weight, of_tokens.to(self.weight.dtype))
        of_positions = torch.zeros_like(self.position)
        of_positions[: gradient.shape[1]] = gradient.sum(0)
        step.apply(self.position, of_positions)


class GPT(Sequential):
    """Embedding, `depth` pre-norm causal transformer blocks, and a head: normalisation and one linear layer to the vocabulary.

    Takes token ids int64 `[M, t]`, t at most `context`, and gives logits `[M, t, vocabulary]` of the next tokens. Every token
    has its own error row. With `feedback_shape` `shared` all positions share a feedback matrix `[vocabulary, dim]`; with `full`
    each has its own.

    `tied`: the head's weight is the tokens' embedding too. The head owns it, and its exact gradient is all that it learns from;
    the embedding reads it, and learns positions only. So the first stage depends on the last one.

    `feedback_at`: see `Stage`. At the outputs themselves the residual stream grows without bounds, and little is learned.
    Token vectors begin with a length of about 1, and every block as the identity.

    `mlp_width` is 4 `dim` by default. The first weights come from `seed`, or from torch's global generator. Raises InputError
    for sizes below 1, or heads that do not divide the dimension.
    """

    unread = 1  # the embedding

    def __init__(
        self,
        vocabulary: int,
        context: int = 64,
        depth: int = 4,
        heads: int = 4,
        dim: int = 128,
        head_dim: int | None = None,
        mlp_width: int | None = None,
        activation: str = "gelu",
        dropout: float = 0.0,
        tied: bool = False,
        granularity: str = "block",
        feedback: str | Feedback = "trinomial",
        feedback_shape: str = "shared",
        feedback_at: str = "normalised",
        seed: int | None = None,
    ) -> None:
        self.settings = {key: value for key, value in locals().items() if key not in NOT_STORED}
        for name, value in (("vocabulary", vocabulary), ("context", context), ("depth", depth), ("dim", dim)):
            if not isinstance(value, int) or value < 1 + (name in ("vocabulary", "context")):
                least = "2" if name in ("vocabulary", "context") else "1"
                raise InputError(f"{name} of a GPT must be a whole number of at least {least}, got {value!r}")
        self.context = context
        with first_weights(seed):
            blocks = [
                TransformerBlock(
                    dim, heads, mlp_width or 4 * dim, head_dim, activation, "layer", dropout, True, feedback, feedback_shape
                )
                for _ in range(depth)
            ]
            for block in blocks:
                for last in (block.attention.out, block.fall):
                    if isinstance(last, Linear):
                        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
            head = Linear(dim, vocabulary, bias=False)
            nn.init.normal_(head.weight, std=dim**-0.5 if tied else 0.02)
            embedding = TokenEmbedding(vocabulary, context, dim, dropout, feedback, feedback_shape, head if tied else None)
            stages = [as_stage(block, granularity, feedback, feedback_shape) for block in blocks]
            super().__init__(embedding, *stages, Block(nn.Sequential(LayerNorm(dim), head)))
        check_word("feedback at", feedback_at, FEEDBACK_AT)
        for module in (module for stage in self.stages[:-1] for module in stage.modules()):
            if isinstance(module, Stage):
                module.feedback_at = feedback_at

    def config(self) -> dict[str, object]:
        """What `load` needs to build the same network again."""
        return {"model": "gpt", **self.settings}
