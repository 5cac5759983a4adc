"""The transformer block of vision and language models, and the two ways to teach it."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..base.words import GRANULARITIES, TRANSFORMER_NORMS
from ..network.block import Block
from ..network.feedback import Feedback
from ..network.layers import Layers
from ..network.linear import Linear
from ..network.norm import LayerNorm, RMSNorm
from ..network.stage import Stage

NOT_STORED = ("self", "__class__", "feedback", "seed")  # of a model's arguments: what its description does not have
NORMS = dict(zip(TRANSFORMER_NORMS, (LayerNorm, RMSNorm, None), strict=True))


class Attention(nn.Module):
    """Self-attention over `x [M, tokens, dim]` with `heads` heads of `head_dim`; with `causal`, of a token to itself and those
    before it. Queries, keys and values have no bias. The output is projected (with bias) and dropped out, but for a single head
    as wide as the token, as in the authors' code.
    """

    def __init__(
        self, dim: int, heads: int, head_dim: int, dropout: float, causal: bool, feedback: str | Feedback, feedback_shape: str
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        inner = heads * head_dim
        self.qkv = Linear(dim, 3 * inner, feedback=feedback, bias=False, feedback_shape=feedback_shape)
        self.out, self.drop = nn.Identity(), nn.Identity()
        if heads > 1 or head_dim != dim:
            self.out = Linear(inner, dim, feedback=feedback, feedback_shape=feedback_shape)
            self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "m t (three h d) -> three m h t d", three=3, h=self.heads)
        dropout = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.drop(self.out(rearrange(attended, "m h t d -> m t (h d)")))


class TransformerBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, for `x [M, tokens, dim]`.

    `mlp_width` is that of the perceptron's hidden layer, with `activation`; `head_dim` is `dim / heads` by default; `norm` is
    layer, rms or none; `dropout` is that of attention weights, hidden units and both branches' results. Raises InputError for
    sizes below 1, heads that do not divide the dimension, or a dropout outside 0..1.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_width: int,
        head_dim: int | None = None,
        activation: str = "gelu",
        norm: str = "layer",
        dropout: float = 0.0,
        causal: bool = False,
        feedback: str | Feedback = "trinomial",
        feedback_shape: str = "full",
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads), ("mlp width", mlp_width), ("head dim", head_dim or 1)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} of a transformer must be a whole number of at least 1, got {value!r}")
        if head_dim is None and dim % heads:
            raise InputError(f"{heads} heads do not divide the dimension {dim}; choose another number of heads, or a head dim")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, got {dropout}")
        kind = NORMS[check_word("norm", norm, NORMS)]
        self.norm1, self.norm2 = (
            nn.Identity() if kind is None else kind(dim, feedback, feedback_shape=feedback_shape) for _ in range(2)
        )
        self.attention = Attention(dim, heads, head_dim or dim // heads, dropout, causal, feedback, feedback_shape)
        self.rise = Linear(dim, mlp_width, activation, feedback, feedback_shape=feedback_shape)
        self.fall = Linear(mlp_width, dim, feedback=feedback, feedback_shape=feedback_shape)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.dropout(self.fall(self.dropout(self.rise(self.norm2(x)))))


def as_stage(module: nn.Module, granularity: str, feedback: str | Feedback | Tensor, feedback_shape: str) -> Stage:
    """A module as one stage: `block`, with exact gradients inside, or `layer`, where each of its layers is taught directly.

    Raises InputError for another word.
    """
    if check_word("granularity", granularity, GRANULARITIES) == "layer":
        return Layers(module)
    return Block(module, feedback, feedback_shape)
