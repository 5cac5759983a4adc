"""The convolutional networks of the DRTP experiments (Frenkel et al. 2021, arXiv 1909.01311)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..base.seeds import first_weights
from ..kernels.words import ACTIVATIONS
from ..network.block import Block
from ..network.feedback import Feedback
from ..network.linear import Linear, activate
from ..network.sequential import Sequential
from ..network.stage import not_shared

NORMS = ("none", "batch")


class Convolution(nn.Module):
    """A convolution that keeps height and width, a batch normalisation if asked for, the activation, and 2x2 max pooling."""

    def __init__(
        self, image: tuple[int, int, int], channels: int, kernel: int, activation: str, norm: str, flatten: bool
    ) -> None:
        super().__init__()
        self.image, self.activation, self.flatten = image, activation, flatten
        self.convolution = nn.Conv2d(image[0], channels, kernel, padding=kernel // 2, bias=norm == "none")
        self.norm = nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        # The channels of a pixel side by side: convolution and pooling are faster so, on a CPU too. At every stage, so that
        # another worker, which gets its input from elsewhere, adds up in the same order.
        x = x.view(len(x), *self.image).contiguous(memory_format=torch.channels_last)
        x = self.pool(activate(self.norm(self.convolution(x)), self.activation))
        return x.flatten(1) if self.flatten else x


class ConvNet(Sequential):
    """Stages of convolution, activation and pooling, then `Linear` stages of `hidden` units, then the output.

    `image` is `(channels, height, width)`. `channels` are those of each convolution. The DRTP authors' networks are
    `channels=[32], kernel_size=5, hidden=[1000]` for MNIST and `channels=[64, 256], kernel_size=3, hidden=[1000, 1000]` for
    CIFAR-10. With `norm` batch there is a batch normalisation after each convolution, and a layer normalisation without scale
    and shift after the activation of each `Linear` stage. The first weights come from `seed`, or from torch's global generator.
    Raises InputError for sizes below 1, an even kernel, or an image too small for so many poolings.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        classes: int,
        channels: Sequence[int] = (32,),
        kernel_size: int = 5,
        hidden: Sequence[int] = (1000,),
        activation: str = "tanh",
        feedback: str | Feedback = "trinomial",
        feedback_shape: str = "full",
        norm: str = "none",
        seed: int | None = None,
    ) -> None:
        channels, hidden = list(channels), list(hidden)
        self.settings = {
            "image": list(image), "classes": classes, "channels": channels, "kernel_size": kernel_size, "hidden": hidden,
            "activation": activation, "feedback_shape": feedback_shape, "norm": norm,
        }  # fmt: skip
        for name, sizes in (("image", image), ("channels", channels), ("classes", [classes]), ("hidden", hidden)):
            if not all(isinstance(size, int) and size >= 1 for size in sizes):
                raise InputError(f"{name} of a ConvNet must be whole numbers of at least 1, got {list(sizes)}")
        if not channels:
            raise InputError("a ConvNet needs at least one convolution; use an MLP for none")
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"kernel size of a ConvNet must be an odd whole number, got {kernel_size!r}")
        if min(image[1:]) < 2 ** len(channels):
            raise InputError(f"an image of {image[1]}x{image[2]} is too small for {len(channels)} poolings")
        check_word("activation", activation, ACTIVATIONS)
        check_word("norm", norm, NORMS)
        with first_weights(seed):
            stages, shape = [], tuple(image)
            for number, count in enumerate(channels, 1):
                last = number == len(channels)
                stages.append(
                    Block(
                        Convolution(shape, count, kernel_size, activation, norm, last),
                        feedback,
                        not_shared(feedback_shape) if last else feedback_shape,
                    )
                )
                shape = count, shape[1] // 2, shape[2] // 2
            width, after = shape[0] * shape[1] * shape[2], "none" if norm == "none" else "layer"
            for units in hidden:
                own = not_shared(feedback_shape)
                stages.append(Linear(width, units, activation, feedback, feedback_shape=own, norm=after))
                width = units
            super().__init__(*stages, Linear(width, classes))

    def config(self) -> dict[str, object]:
        """What `load` needs to build the same network again."""
        return {"model": "convnet", **self.settings}
