"""Images that are seen a little differently at every visit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..base.exceptions import InputError
from ..base.seeds import derived_seed

SHARE = 8  # an image moves by up to this part of its side


class Augmentation:
    """Moves each image by up to an eighth of its side, with zeros (after the normalisation) where nothing is left; `crop-flip`
    also mirrors half of them, left to right. What is drawn depends on the seed and the visit's number only.

    `shape` is that of a sample, `(channels, height, width)`. Raises InputError for samples that are no images.
    """

    def __init__(self, kind: str, shape: tuple[int, ...], seed: int) -> None:
        if len(shape) != 3:
            raise InputError(f"augment {kind!r} needs images, but a sample of the training set has the shape {list(shape)}")
        self.shape, self.seed, self.mirrors = tuple(shape), seed, kind == "crop-flip"

    def __call__(self, x: Tensor, visit: int) -> Tensor:
        """The batch `x [M, ...]` as it is seen at the visit of that number."""
        channels, height, width = self.shape
        images, count = x.reshape(-1, *self.shape), len(x)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "augment", visit))
        up, left = height // SHARE, width // SHARE
        rows = torch.arange(height) + torch.randint(2 * up + 1, (count, 1), generator=generator)  # [M, height]
        columns = torch.arange(width) + torch.randint(2 * left + 1, (count, 1), generator=generator)  # [M, width]
        if self.mirrors:
            columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns.flip(1), columns)
        rows, columns = (place.to(x.device, non_blocking=True) for place in (rows, columns))
        padded = functional.pad(images, (left, left, up, up))
        seen = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))
        return seen.gather(3, columns[:, None, None].expand(-1, channels, height, -1)).view(x.shape)
