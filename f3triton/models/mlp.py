"""The multilayer perceptron of the paper's experiments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..base.choices import plain
from ..base.exceptions import InputError
from ..base.seeds import first_weights
from ..network.feedback import Feedback
from ..network.linear import Linear
from ..network.sequential import Sequential


class MLP(Sequential):
    """Linear stages of the given `sizes [inputs, hidden, ..., outputs]`, `activation` after each hidden one.

    `feedback` is the law of every hidden stage's feedback matrix (a word or a `Feedback`), or a list with a law or a
    matrix `[outputs, hidden]` for each. `norm` and `residual` are those of `Linear` stages; a residual is added where sizes are
    equal. The output is linear: its sigmoid or softmax belongs to the loss. The first weights come from `seed`, or from torch's
    global generator. Raises InputError for fewer than two sizes or sizes below 1.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "tanh",
        feedback: str | Feedback | Sequence[str | Feedback | Tensor] = "trinomial",
        bias: bool = True,
        feedback_shape: str = "full",
        norm: str = "none",
        residual: bool = False,
        seed: int | None = None,
    ) -> None:
        sizes = [plain(size) for size in sizes]
        if len(sizes) < 2:
            raise InputError(f"the sizes of an MLP are inputs, hidden layers, outputs: at least two numbers, got {sizes}")
        if not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise InputError(f"the sizes of an MLP must be whole numbers of at least 1, got {sizes}")
        hidden = len(sizes) - 2
        laws = [feedback] * hidden if isinstance(feedback, str | Feedback) else list(feedback)
        if len(laws) != hidden:
            raise InputError(f"an MLP of {hidden} hidden layers needs {hidden} feedback laws or matrices, got {len(laws)}")
        with first_weights(seed):
            stages = [
                Linear(i, o, activation, law, bias, feedback_shape, norm, residual and i == o)
                for i, o, law in zip(sizes, sizes[1:-1], laws, strict=False)
            ]
            super().__init__(*stages, Linear(sizes[-2], sizes[-1], bias=bias))
        self.sizes, self.activation = sizes, self.stages[0].activation if hidden else activation
        self.bias, self.feedback_shape, self.norm, self.residual = bias, feedback_shape, norm, residual

    def config(self) -> dict[str, object]:
        """What `load` needs to build the same network again."""
        settings = {"activation": self.activation, "bias": self.bias, "feedback_shape": self.feedback_shape}
        more = {"norm": self.norm, "residual": self.residual} if self.norm != "none" or self.residual else {}
        return {"model": "mlp", "sizes": self.sizes, **settings, **more}
