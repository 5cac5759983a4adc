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
}
# (outputs, inputs, rows of x): the gradient tile is outputs x inputs and stays in registers with weight and moments
UPDATE = {
    "small": Tile((32, 32, 16), 4, 3),
    "medium": Tile((64, 64, 32), 8, 3),
}
# (outputs, inputs): rows of x are one block, of the next power of two
STEP = {
    16: Tile((16, 64), 4, 2),
    32: Tile((16, 64), 4, 2),
    64: Tile((16, 64), 4, 2),
}
STEP_ROWS = 64  # the largest batch that the one-launch step takes; above it forward and update are two launches
ELEMENTWISE = 1024
OUTPUTS = 1 << 15  # the most outputs that the last layer's kernel holds for a sample


def forward_tile(rows: int, outputs: int, half: bool) -> Tile:
    """For `h [rows, outputs]`."""
    if rows <= 16 or outputs <= 32:
        return FORWARD["small"]
    if rows < 256 or outputs < 256:
        return FORWARD["medium"]
    return FORWARD["large" if half else "medium"]  # float32 products have no tensor cores, and larger tiles would spill


def update_tile(outputs: int, inputs: int) -> Tile:
    """For a weight `[outputs, inputs]`."""
    return UPDATE["small" if min(outputs, inputs) <= 256 else "medium"]


def step_tile(rows: int) -> tuple[int, Tile]:
    """The block of rows that holds the whole batch, and the tile. `rows` is at most `STEP_ROWS`."""
    block = next(size for size in STEP if size >= rows)
    return block, STEP[block]
