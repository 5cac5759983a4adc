"""Tile shapes, by kernel and by the width of the numbers: plain tables, nothing is tuned at run time.

Tuning by running candidates would update the weights once for every candidate. `bench.kernel_report` compiles every entry
for every architecture and shows registers, spills and shared memory. The entries are chosen by that report (no spilled
register, shared memory within every limit); they have not been tuned on hardware yet.
"""

from __future__ import annotations

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
}
# (outputs, inputs, rows of x): the gradient tile is outputs x inputs and stays in registers, with weight and moments: the more
# moments, the smaller the tile
UPDATE = {
    "small": Tile((32, 32, 32), 4, 3),
    "medium": Tile((64, 64, 32), 8, 4),
    "roomy": Tile((128, 128, 64), 8, 3),  # SGD
    "roomy, one moment": Tile((64, 128, 64), 8, 3),
    "roomy, two moments": Tile((64, 64, 64), 8, 4),
}
# (outputs, inputs): rows of x are one block, of the next power of two
STEP = {
    16: Tile((16, 64), 4, 4),
    32: Tile((16, 64), 4, 2),
    64: Tile((16, 64), 4, 2),
}
STEP_ROWS = 64  # the largest batch that the one-launch step takes; above it forward and update are two launches
ROOMY = 160 << 10  # bytes of shared memory: what an A100, H100, H200 or B200 has, and consumer cards have not
STRIDE = 1 << 23  # elements; a tile has at most 256 rows or columns, and offsets in it 32 bits
ELEMENTWISE = 1024
OUTPUTS = 1 << 15  # the most outputs that the last layer's kernel holds for a sample


def forward_tile(rows: int, outputs: int, half: bool, roomy: bool = False) -> Tile:
    """For `h [rows, outputs]`; `half`: products in half precision; `roomy`: the device has `ROOMY` shared memory a program."""
    if rows <= 16 or outputs <= 32:
        return FORWARD["small"]
    if rows < 256 or outputs < 256 or not half:  # float32 products have no tensor cores, and larger tiles would spill
        return FORWARD["medium"]
    return FORWARD["roomy" if roomy else "large"]


def update_tile(outputs: int, inputs: int, half: bool = False, moments: int = 2, roomy: bool = False) -> Tile:
    """For a weight `[outputs, inputs]` whose rule keeps so many moments; `half` and `roomy` as in `forward_tile`."""
    if min(outputs, inputs) <= 256:
        return UPDATE["small"]
    if not (half and roomy):
        return UPDATE["medium"]
    return UPDATE[("roomy", "roomy, one moment", "roomy, two moments")[moments]]


def step_tile(rows: int) -> tuple[int, Tile]:
    """The block of rows that holds the whole batch, and the tile. `rows` is at most `STEP_ROWS`."""
    block = next(size for size in STEP if size >= rows)
    return block, STEP[block]
