"""Tile shapes, by kernel and by the width of the numbers: plain tables, nothing is tuned at run time.

Tuning by running candidates would update the weights once for every candidate. `bench.kernel_report` compiles every entry
for every architecture and shows registers, spills and shared memory. The entries are chosen by that report (no spilled
register, shared memory within every limit), and those of half precision, of small batches and of updates by times on an H100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Block sizes in the kernel's own order of dimensions, warps a program, pipeline stages, and, for an update, in how many
    slices of columns the rule goes over the tile, how many programs a multiprocessor share all tiles (0: each has one), and
    whether operands are fetched by descriptors (NVIDIA's tensor memory accelerator, from Hopper on)."""

    blocks: tuple[int, ...]
    warps: int
    stages: int
    slices: int = 1
    persistent: int = 0
    descriptors: bool = False


# (rows of x, outputs, inputs)
FORWARD = {
    "small": Tile((16, 16, 64), 4, 5),
    "narrow": Tile((16, 32, 64), 4, 5),
    "medium": Tile((64, 64, 32), 8, 3),
    "medium, half": Tile((64, 64, 64), 4, 4),
    "medium, transposed": Tile((64, 64, 32), 8, 2),  # float32, a weight whose columns are contiguous
    "large": Tile((128, 128, 32), 8, 3),  # 48 KiB of shared memory: fits every architecture in the report
    "roomy": Tile((128, 128, 64), 8, 4),  # 128 KiB
    # gelu and its kin, whose slope comes from the pre-activation: both in registers leave room for half the columns
    "medium, curved": Tile((32, 64, 32), 4, 3),
    "large, curved": Tile((128, 64, 32), 8, 3),
    "roomy, curved": Tile((128, 64, 64), 8, 4),
}
CURVED = ("gelu", "gelu-tanh", "silu")
# (outputs, inputs, rows of x): the gradient tile is outputs x inputs and stays in registers, and with it weight, moments, and
# the bits of stochastic rounding of a slice of its columns
UPDATE = {
    "small": Tile((32, 32, 32), 4, 3),
    "medium": Tile((64, 64, 32), 8, 4),
    "medium, half": Tile((64, 64, 32), 8, 4, 2),
    # many rows: the product is the most of the work
    "roomy": Tile((128, 256, 64), 8, 3, 8),
    "roomy, more": Tile((128, 128, 64), 8, 4, 4),
    "roomy, middle": Tile((64, 128, 64), 4, 4, 4),
    "roomy, int8": Tile((64, 64, 64), 8, 4),
    # few rows, or a small weight: weight and moments are, and many small programs keep more of them on their way
    "streaming": Tile((64, 64, 32), 4, 3, 2),
    "streaming, more": Tile((32, 64, 64), 4, 4, 2),
}
STREAMING_ROWS = 256
ROOMY = 160 << 10  # bytes of shared memory: what an A100, H100, H200 or B200 has, and consumer cards have not
STRIDE = 1 << 23  # elements; a tile has at most 256 rows or columns, and offsets in it 32 bits
ELEMENTWISE = 512
# (rows, units) of a stage's head, by the block of classes
HEAD = {16: Tile((16, 64), 4, 3), 32: Tile((16, 64), 4, 2), 64: Tile((16, 32), 4, 2), 128: Tile((16, 32), 8, 2)}
HEAD_HALF = {16: Tile((16, 64), 4, 3), 32: Tile((16, 64), 8, 2), 64: Tile((16, 32), 8, 2), 128: Tile((16, 16), 8, 2)}
HEAD_CLASSES = max(HEAD)  # of a head in one launch: all are in registers
OUTPUT = 1024  # elements of the last layer's outputs that a program holds at a time


@dataclass(frozen=True)
class NetworkTile:
    """Of many steps in one launch: rows of a weight that are one block, inputs at a time in a product, and in an update; how
    many turns of the products' loops are one, and are on their way at once; how many of the updates' are one.

    `outputs * inputs` must be less than the threads: a larger load of the weight would have a layout of its own."""

    outputs: int = 4
    inputs: int = 32
    taught: int = 1024
    unroll: int = 2
    stages: int = 1
    unroll_rows: int = 5
    warps: int = 8


NETWORK_ROWS = 64  # of a batch: a program holds all
NETWORK_CLASSES = 64  # outputs of the network: a program of the last layer holds all for a softmax


def _programs(tile: Tile, *sizes: int) -> int:
    return math.prod(-(-size // block) for size, block in zip(sizes, tile.blocks, strict=False))


def forward_tile(
    rows: int,
    outputs: int,
    half: bool,
    roomy: bool = False,
    curved: bool = False,
    multiprocessors: int = 1,
    transposed: bool = False,
) -> Tile:
    """For `h [rows, outputs]`; `half`: products in half precision; `roomy`: the device has `ROOMY` shared memory a program.

    `curved`: the activation is one of `CURVED`; `transposed`: the weight's columns are contiguous, not its rows. Where larger
    tiles are too few for the device's `multiprocessors`, smaller.
    """
    large = FORWARD[("roomy" if roomy else "large") + ", curved" * curved]
    # float32 products have no tensor cores, and larger tiles would spill
    if half and min(rows, outputs) >= 256 and 2 * _programs(large, rows, outputs) >= multiprocessors:
        return large
    medium = FORWARD["medium" + (", curved" if curved else ", half" if half else ", transposed" * transposed)]
    if rows > 16 and outputs > 32 and 2 * _programs(medium, rows, outputs) >= multiprocessors:
        return medium
    return FORWARD["narrow" if _programs(FORWARD["narrow"], rows, outputs) >= 0.9 * multiprocessors else "small"]


def update_tile(
    rows: int,
    outputs: int,
    inputs: int,
    half: bool = False,
    more: int = 2,
    roomy: bool = False,
    multiprocessors: int = 1,
    int8: bool = False,
) -> Tile:
    """For a weight `[outputs, inputs]` and `rows` of `x`; `half`, `roomy`, `multiprocessors` as in `forward_tile`.

    `more` counts the rule's moments, and one for stochastic rounding; `int8`: moments are. A weight that is short one way gets
    small tiles only where larger ones would be half empty, or too few for the device.
    """
    medium = UPDATE["medium" + ", half" * half]
    if min(outputs, inputs) <= 256:
        enough = min(outputs, inputs) > 32 and _programs(medium, outputs, inputs) >= multiprocessors
        return medium if enough else UPDATE["small"]
    if not (half and roomy):
        return medium
    if rows > STREAMING_ROWS and int8:
        return UPDATE["roomy, int8"]
    if rows > STREAMING_ROWS:
        for name in ("roomy" if more < 1 else "roomy, more", "roomy, middle"):
            if 2 * _programs(UPDATE[name], outputs, inputs) >= multiprocessors:
                return UPDATE[name]
    return UPDATE["streaming" if more < 2 else "streaming, more"]


def error_columns(width: int, half: bool, largest: int, stored: bool = True) -> int:
    """How many of an error's `width` columns a product with the feedback takes at a time: more for many, where none spills.

    `half` as in `forward_tile`; `largest` is the tile's longest side in rows and outputs, `stored` whether the feedback is a
    matrix of floats. Large tiles, sums without tensor cores, and entries that are made or widened take the registers.
    """
    if largest > (64 if half else 32) or not (half or stored):
        return 16
    return min(max(16, 1 << (width - 1).bit_length()), 64 if stored or largest < 64 else 32)


def head_tile(classes: int, half: bool) -> tuple[int, Tile]:
    """The block of classes that holds all (at most `HEAD_CLASSES`), and the tile of a stage's head; `half`: of its output."""
    block = next(size for size in HEAD if size >= classes)
    return block, (HEAD_HALF if half else HEAD)[block]


def output_tile(classes: int) -> Tile:
    """(samples, columns at a time) for the last layer's kernel."""
    columns = min(1 << max(1, (classes - 1).bit_length()), OUTPUT)
    return Tile((OUTPUT // columns, columns), 4, 1)
