"""The fixed random feedback matrix `B [C, N]` that carries an error of width C to a layer of N outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..base.seeds import derived_seed
from ..base.words import LAWS
from ..kernels.generated import GeneratedFeedback

_ALIASES = {"kaiming-uniform": "kaiming", "kaiming-uniform-repeat-line": "kaiming-repeat-line"}
_VALUES = {"trinomial": (-1.0, 0.0, 1.0), "binomial": (0.0, 1.0)}
_TAKES_VALUES = ("discrete-uniform", "cartesian-product")
SCALE_WORDS = ("ones", "zeros", "1/C")


def error_projection(outputs: int, rank: int, seed: int) -> Tensor:
    """`R [outputs, rank]`, float32 on the CPU: normal entries of variance 1 / rank, so that `e R` is about as long as `e`.

    An error is then kept as `e R`, and every feedback matrix is `R B'` with `B' [rank, N]`: another law of lower rank, computed
    exactly. Raises InputError for a rank that saves nothing.
    """
    if not isinstance(rank, int) or not 1 <= rank < outputs:
        raise InputError(f"error rank must be a whole number from 1 to {outputs - 1} (of {outputs} outputs), got {rank!r}")
    generator = torch.Generator().manual_seed(derived_seed(seed, "error rank"))
    return torch.randn(outputs, rank, generator=generator) / math.sqrt(rank)


@dataclass(frozen=True)
class Feedback:
    """A law for `B [C, N]` (the authors' `initialization_method`s; their names with underscores are taken too).

    - `kaiming`: uniform in +-1/sqrt(N); `kaiming-repeat-line`: one column, uniform in +-1, repeated along N
    - `trinomial`, `binomial`, `discrete-uniform`: each entry drawn from {-1, 0, 1}, {0, 1}, or `values`
    - `identity-repeat-pm`: I, -I, I, ... along N, the last copy cut; `identity-repeat`: I, I, ...;
      `identity-fill-zero`: I, then zeros
    - `constant`: ones; `alternate-negative`: -1, 1, -1, ... along N; `chunked-negative`: 1 in the first half, -1 in the second
    - `cartesian-product`: every combination of `values`, one a column; needs N = len(values)^C

    `scale` multiplies the matrix: a number, or `ones`, `zeros`, `1/C`. `values` (default -1, 0, 1) belongs to
    `discrete-uniform` and `cartesian-product`. Raises InputError for an unknown law or settings that do not fit it.
    """

    law: str = "trinomial"
    values: tuple[float, ...] | None = None
    scale: float | str = 1.0

    def __post_init__(self) -> None:
        law = self.law.replace("_", "-") if isinstance(self.law, str) else self.law
        law = check_word("feedback", _ALIASES.get(law, law), LAWS)
        object.__setattr__(self, "law", law)
        if self.values is not None:
            values = tuple(float(value) for value in self.values)
            if law not in _TAKES_VALUES:
                raise InputError(f"feedback values {list(values)} belong to {' and '.join(_TAKES_VALUES)}, not to {law!r}")
            if not values or not all(math.isfinite(value) for value in values):
                raise InputError(f"feedback values must be finite numbers, at least one, got {list(values)}")
            object.__setattr__(self, "values", values)
        if isinstance(self.scale, str):
            check_word("feedback scale", self.scale, SCALE_WORDS, "or a number")
        elif not math.isfinite(self.scale):
            raise InputError(f"feedback scale must be a finite number or one of {', '.join(SCALE_WORDS)}, got {self.scale}")
        else:
            object.__setattr__(self, "scale", float(self.scale))

    def draw(self, outputs: int, features: int, seed: int) -> Tensor:
        """`B [outputs, features]` in float32 on the CPU: the same for the same sizes and seed, whatever was drawn before.

        Raises InputError where the law does not fit the sizes.
        """
        generator = torch.Generator().manual_seed(seed)
        scale = {"ones": 1.0, "zeros": 0.0, "1/C": 1 / outputs}.get(self.scale, self.scale)
        return (self._unscaled(outputs, features, generator) * scale).contiguous()

    def generated(self, outputs: int, features: int, seed: int) -> GeneratedFeedback:
        """`B [outputs, features]` by the same law, of which nothing is stored: other entries than `draw` gives.

        Raises InputError for a law whose entries are not independent.
        """
        kind = {"trinomial": "trinomial", "binomial": "binomial", "kaiming": "uniform"}.get(self.law)
        if kind is None:
            raise InputError(f"feedback {self.law!r} cannot be generated; kaiming, trinomial and binomial can")
        scale = {"ones": 1.0, "zeros": 0.0, "1/C": 1 / outputs}.get(self.scale, self.scale)
        amplitude = scale / math.sqrt(features) if self.law == "kaiming" else scale
        return GeneratedFeedback(kind, outputs, features, seed & 0x7FFFFFFF, amplitude)

    def _unscaled(self, outputs: int, features: int, generator: torch.Generator) -> Tensor:
        values = torch.tensor(_VALUES.get(self.law) or self.values or _VALUES["trinomial"])
        if self.law == "kaiming":
            return torch.empty(outputs, features).uniform_(-1, 1, generator=generator) / math.sqrt(features)
        if self.law == "kaiming-repeat-line":
            column = torch.empty(outputs).uniform_(-1, 1, generator=generator)
            return repeat(column, "c -> c n", n=features)
        if self.law in ("trinomial", "binomial", "discrete-uniform"):
            return values[torch.randint(len(values), (outputs, features), generator=generator)]
        if self.law == "cartesian-product":
            needed = len(values) ** outputs
            if features != needed:
                exact = f" = {needed}" if needed < 10**9 else ""
                raise InputError(
                    f"feedback 'cartesian-product' of {len(values)} values and {outputs} outputs needs layers of "
                    f"{len(values)}^{outputs}{exact} units, got {features}; change the hidden sizes or the law"
                )
            combinations = torch.cartesian_prod(*[values] * outputs).reshape(features, outputs)
            return rearrange(combinations, "n c -> c n")
        if self.law.startswith("identity"):
            return self._identity(outputs, features)
        matrix = torch.ones(outputs, features)
        if self.law == "alternate-negative":
            matrix[:, ::2] = -1
        elif self.law == "chunked-negative":
            matrix[:, features // 2 :] = -1
        return matrix

    def _identity(self, outputs: int, features: int) -> Tensor:
        column = torch.arange(features)
        matrix = torch.zeros(outputs, features)
        copy = column // outputs  # which copy of the identity a column belongs to
        if self.law == "identity-fill-zero":
            column = column[copy == 0]
            matrix[column, column] = 1
        else:
            sign = 1 - 2 * (copy % 2) if self.law == "identity-repeat-pm" else torch.ones_like(copy)
            matrix[column % outputs, column] = sign.float()
        return matrix
