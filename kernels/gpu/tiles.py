"""Tile shapes, by kernel and by the width of the numbers: plain tables, nothing is tuned at run time.

Tuning by running candidates would update the weights once for every candidate. `bench.kernel_report` compiles every entry
for every architecture and shows registers, spills and shared memory. The entries are chosen by that report (no spilled
register, shared memory within every limit); they have not been tuned on hardware yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Block sizes in the kernel's own order of dimensions, warps a program, and pipeline stages."""

    blocks: tuple[int, ...]
    warps: int
    stages: int


# (rows of x, outputs, inputs)
FORWARD = {
    "small": Tile((16, 32, 64), 4, 3),
    "medium": Tile((64, 64, 32), 8, 3),
    "large": Tile((128, 128, 32), 8, 3),  # 48 KiB of shared memory: fits every architecture in the report
    "roomy": Tile((128, 128, 64), 8, 4),  # 128 KiB
    # gelu and its kin, whose slope comes from the pre-activation: both in registers leave room for half the columns
    "medium, curved": Tile((32, 64, 32), 4, 3),
    "large, curved": Tile((128, 64, 32), 8, 3),
    "roomy, curved": Tile((128, 64, 64), 8, 4),
}
CURVED = ("gelu", "gelu-tanh", "silu")
# (outputs, inputs, rows of x): the gradient tile is outputs x inputs and stays in registers, with weight, moments, and the bits
# of stochastic rounding: the more of them, the smaller the tile
UPDATE = {
    "small": Tile((32, 32, 32), 4, 3),
    "medium": Tile((64, 64, 32), 8, 4),
    "roomy": Tile((64, 128, 64), 8, 3),  # 128x128 spills even for plain SGD, with numbers that it is not compiled for
    "roomy, more": Tile((64, 64, 64), 8, 4),
}
# (outputs, inputs): rows of x are one block, of the next power of two
STEP = {
    16: Tile((16, 64), 4, 4),
    32: Tile((16, 64), 4, 2),
    64: Tile((16, 64), 4, 2),
}
STEP_FLOAT32 = {  # without tensor cores a product's operands are in registers: fewer inputs at a time, more stages
    16: Tile((16, 32), 4, 6),
    32: Tile((16, 32), 4, 5),
    64: Tile((16, 32), 4, 4),
}
STEP_GENERATED = Tile((16, 64), 4, 3)  # float32, 64 rows, feedback made in the kernel: the tile above spills with Triton 3.7
STEP_INT8 = Tile((16, 32), 4, 2)  # 32 rows, moments in int8: the tiles above spill with Triton 3.9
STEP_ROWS = 64  # the largest batch that the one-launch step takes; above it forward and update are two launches
ROOMY = 160 << 10  # bytes of shared memory: what an A100, H100, H200 or B200 has, and consumer cards have not
STRIDE = 1 << 23  # elements; a tile has at most 256 rows or columns, and offsets in it 32 bits
ELEMENTWISE = 1024
# (rows, units) of a stage's head, by the block of classes
HEAD = {16: Tile((16, 64), 4, 3), 32: Tile((16, 64), 4, 2), 64: Tile((16, 32), 4, 2), 128: Tile((16, 32), 4, 2)}
HEAD_HALF = {16: Tile((16, 64), 4, 3), 32: Tile((16, 64), 8, 2), 64: Tile((16, 32), 8, 2), 128: Tile((16, 16), 8, 2)}
HEAD_CLASSES = max(HEAD)  # of a head in one launch: all are in registers
OUTPUT = 1024  # elements of the last layer's outputs that a program holds at a time


@dataclass(frozen=True)
class NetworkTile:
    """Of many steps in one launch: rows of a weight that are one block, inputs at a time in a product, and in an update; how
    many turns of the products' loops are one, and are on their way at once; how many of the updates' are one."""

    outputs: int = 4
    inputs: int = 32
    taught: int = 1024
    unroll: int = 2
    stages: int = 1
    unroll_rows: int = 5
    warps: int = 8


NETWORK_CLASSES = 64  # outputs of the network, whose last layer is one program's


def forward_tile(rows: int, outputs: int, half: bool, roomy: bool = False, curved: bool = False) -> Tile:
    """For `h [rows, outputs]`; `half`: products in half precision; `roomy`: the device has `ROOMY` shared memory a program.

    `curved`: the activation is one of `CURVED`.
    """
    if rows <= 16 or outputs <= 32:
        return FORWARD["small"]
    if rows < 256 or outputs < 256 or not half:  # float32 products have no tensor cores, and larger tiles would spill
        return FORWARD["medium" + ", curved" * curved]
    return FORWARD[("roomy" if roomy else "large") + ", curved" * curved]


def _programs(tile: Tile, *sizes: int) -> int:
    return math.prod(-(-size // block) for size, block in zip(sizes, tile.blocks, strict=False))


def update_tile(
    outputs: int, inputs: int, half: bool = False, more: int = 2, roomy: bool = False, multiprocessors: int = 1
) -> Tile:
    """For a weight `[outputs, inputs]`; `half` and `roomy` as in `forward_tile`.

    `more` counts the rule's moments, and one for stochastic rounding. A weight that is short one way gets small tiles only
    where larger ones would be half empty, or too few for the device's `multiprocessors`.
    """
    if min(outputs, inputs) <= 256:
        enough = min(outputs, inputs) > 32 and _programs(UPDATE["medium"], outputs, inputs) >= multiprocessors
        return UPDATE["medium" if enough else "small"]
    if not (half and roomy):
        return UPDATE["medium"]
    return UPDATE["roomy" if more < 2 else "roomy, more"]


def step_tile(rows: int, half: bool, generated: bool = False, int8: bool = False) -> tuple[int, Tile]:
    """The block of rows that holds the whole batch (at most `STEP_ROWS`), and the tile; `half` as in `forward_tile`.

    `generated`: the kernel makes the feedback's entries; `int8`: moments are.
    """
    block = next(size for size in STEP if size >= rows)
    if int8 and block == 32:
        return block, STEP_INT8
    if generated and not half and block == STEP_ROWS:
        return block, STEP_GENERATED
    return block, (STEP if half else STEP_FLOAT32)[block]


def error_columns(width: int, half: bool, largest: int, stored: bool = True) -> int:
    """How many of an error's `width` columns a product with the feedback takes at a time: more for many, where none spills.

    `half` as in `forward_tile`; `largest` is the tile's longest side in rows and outputs, `stored` whether the feedback is a
    matrix of floats. Without tensor cores, and in the largest tiles, all registers are taken.
    """
    wide = largest <= 64 and (half or stored)
    return min(max(16, 1 << (width - 1).bit_length()), 64) if wide else 16


def head_tile(classes: int, half: bool) -> tuple[int, Tile]:
    """The block of classes that holds all (at most `HEAD_CLASSES`), and the tile of a stage's head; `half`: of its output."""
    block = next(size for size in HEAD if size >= classes)
    return block, (HEAD_HALF if half else HEAD)[block]


def output_tile(classes: int) -> Tile:
    """(samples, columns at a time) for the last layer's kernel."""
    columns = min(1 << max(1, (classes - 1).bit_length()), OUTPUT)
    return Tile((OUTPUT // columns, columns), 4, 1)
