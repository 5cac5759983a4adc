"""The roofline of compiled kernels, by machine code and launches that can be counted by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.report import as_compiled
from bench.roofline import BANDWIDTH, CLOCK, bytes_of, flops_of, instructions, products, roofline

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDS R2, [R1] ;
        /*0020*/                   FFMA R3, R2, R2, R3 ;
        /*0030*/                   FFMA R4, R2, R2, R4 ;
        /*0040*/              @!P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   FADD R3, R3, R3 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/               @P0 BRA `(.L_x_3) ;
        /*0080*/                   STG.E [R2], R3 ;
.L_x_3:
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4) ;
"""


def update(rows: int, inputs: int, outputs: int) -> dict[str, object]:
    weight, m1, m2 = (torch.empty(outputs, inputs, device="meta") for _ in range(3))
    bias, bias_m1, bias_m2 = (torch.empty(outputs, device="meta") for _ in range(3))
    delta, x = torch.empty(rows, outputs, device="meta"), torch.empty(rows, inputs, device="meta")
    moments = {"weight_m1": m1, "weight_m2": m2, "bias_m1": bias_m1, "bias_m2": bias_m2}
    stand_ins = {"weight_s1": weight, "weight_s2": weight, "shadow": weight}
    sizes = {"rows": rows, "outputs": outputs // 4, "OUTPUTS_UNIT": 4, "inputs": inputs // 4, "INPUTS_UNIT": 4}
    tile = {"OUTPUTS": 64, "INPUTS": 64, "ROWS": 32, "KEEP_GRADIENT": False}
    return {"weight": weight, "bias": bias, "delta": delta, "x": x, **moments, **stand_ins, **sizes, **tile}


def test_instructions_are_counted_in_the_loop_of_the_products_and_outside_of_loops() -> None:
    assert instructions(SASS) == {"loop": 4, "matrix": 2, "flops": 128, "outside": 3}


@pytest.mark.parametrize(
    ("instruction", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12].tnspA.tnspB, R24 ;", 2 * 64 * 128 * 16 // 4),
        ("HMMA.16816.F32.BF16 R4, R8, R10, R4 ;", 4096),
        ("@P0 FFMA R3, R2, R2, R3 ;", 64),
        ("IMAD R3, R2, R2, R3 ;", 0),
    ],
)
def test_flops_of_an_instruction(instruction: str, flops: int) -> None:
    assert flops_of(instruction) == flops


def test_bytes_of_an_update_by_adam() -> None:
    """24 bytes a weight, what stands in for an absent tensor none; each column of tiles fetches delta again."""
    arguments = update(50, 100, 200)
    moved, fetched = bytes_of("update", arguments)
    assert moved == 24 * (200 * 100 + 200) + 4 * 50 * (100 + 200)
    assert fetched - moved == 4 * 50 * (100 * (4 - 1) + 200 * (2 - 1))
    assert products("update", arguments) == 2 * 64 * 256 * 128


def test_the_longest_bounds() -> None:
    arguments, found = update(50, 100, 200), {"reg": 100, "shared_bytes": 16384, "tensor_core": "none (fma)"}
    few = roofline("update", arguments, 8, 4, "fp32", 2 * 50 * 100 * 200, found, SASS)
    assert (few["limit"], few["loop"]) == ("instructions", "2 of 4")
    per_flop = 2 * 64 * 256 * 128 / 128 * 4 + 3 * 4 * 8
    assert few["bound_us"] == pytest.approx(1e6 * per_flop / (4 * 8 * CLOCK), rel=0.01)
    assert few["ideal_us"] == pytest.approx(1e6 * few["bytes"] / BANDWIDTH, rel=0.01)
    assert few["share"] == pytest.approx(few["ideal_us"] / few["bound_us"], abs=0.01)
    assert few["occupancy"] == pytest.approx(4 * 4 / 64, abs=0.07)


def test_timed_tiles_are_named_as_the_compiled_ones() -> None:
    timed = {"peers": "update, SGD", "size": "16 x 4096 -> 4096", "method": "64x64x32 4 warps, 3 stages, 2 slices"}
    assert as_compiled(timed) == ("update 16x4096x4096x16 bf16 sgd roomy", "64x64x32 4w 3s 2 slices")
    timed = {
        "peers": "forward with error signal, SGD",
        "size": "50 x 784 -> 500",
        "method": "16x16x64 4 warps, 5 stages, 1 slices",
    }
    assert as_compiled(timed) == ("forward 50x784x500x16 fp32 tanh float32", "16x16x64 4w 5s")
