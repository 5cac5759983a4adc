"""The share of an H100's roofline that a compiled kernel's traffic and instructions allow, without running it.

`ideal` is the operation's roofline: every operand read and every result written once at DRAM's bandwidth, or its FLOPs at the
peak of their type, whichever takes longer. `bound` is the longest of these, for the launch that was compiled:

    DRAM          bytes / BANDWIDTH                                          as in `ideal`
    L2            bytes that the programs fetch, each tile's operands again / (64 bytes a cycle and multiprocessor)
    products      FLOPs of whole tiles, rows and columns outside included / peak of the instruction that does them
    instructions  those that all warps issue / (4 a cycle and multiprocessor)

the last three over the multiprocessors that have a program in the average wave. `share = ideal / bound`: what is left when
nothing ever waits. It is not a forecast: latency, barriers and bank conflicts are not in it, and a measured time is longer.
`occupancy` is the share of a multiprocessor's 64 warps that registers and shared memory leave room for.

Instructions are counted in the machine code (nvdisasm, which comes with Triton): in the loop of the products, by the FLOPs that
a turn of it does, and those before the end that are in no loop, once a program. Kernels whose loops have no such products
(`output`, `head`) are bounded by the others alone. `network` is left out: its weights stay in caches; and so are updates whose
programs share the tiles (their products' loop has the rule in it) or fetch by descriptors (which waits in loops of its own).

An H100 SXM5 (NVIDIA's H100 data sheet, and Hopper architecture white paper): 3.35 TB/s, 989 TFLOP/s dense in half precision, 67
in float32 on 132 multiprocessors of 4 x 32 lanes, which makes 1.98 GHz; 65,536 registers and 227 KiB for programs a
multiprocessor. Of the second-level cache NVIDIA gives no figure for it: 64 bytes a cycle is what a multiprocessor is taken to
accept at most (an A100's cache gives 5,120 to all 108 of them: its white paper).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

BANDWIDTH, PEAK, MULTIPROCESSORS = 3.35e12, {"fp32": 67e12, "half": 989e12}, 132
CLOCK = PEAK["fp32"] / (MULTIPROCESSORS * 128 * 2)
MOMENTS = ("weight_m1", "weight_m2", "weight_s1", "weight_s2", "bias_m1", "bias_m2")
ELEMENTS = ("parameter", "first_moment", "second_moment", "first_scale", "second_scale")
# what a kernel reads, and what it writes; an argument that stands in for one that is not there is the same tensor as another
OPERANDS = {
    "forward": (("x", "weight", "bias", "error", "feedback"), ("h", "delta")),
    "update": (("weight", "bias", *MOMENTS, "delta", "x"), ("weight", "bias", *MOMENTS, "shadow")),
    "update_elements": ((*ELEMENTS, "gradient"), (*ELEMENTS, "shadow")),
    "output": (("a", "target"), ("gradient", "error", "loss", "hit")),
    "head": (("h", "weight", "bias", "target"), ("gradient", "back", "normal")),
}


def blocks(arguments: dict[str, object], size: str, block: str) -> int:
    """How many tiles there are along a size, which comes divided by its unit."""
    return math.ceil(arguments[size] * arguments.get(f"{size.upper()}_UNIT", 1) / arguments[block])


def bytes_of(kernel: str, arguments: dict[str, object]) -> tuple[int, int]:
    """Bytes that must move, every operand once; and those that the programs fetch or write, each its own once."""
    read, written = OPERANDS[kernel]
    if arguments.get("KEEP_GRADIENT"):
        read = "delta", "x"
    if arguments.get("NORMALISE") is False:
        written = "gradient", "back"
    times = {}
    if kernel == "forward":
        along, across = blocks(arguments, "rows", "ROWS"), blocks(arguments, "outputs", "OUTPUTS")
        times = {"x": across, "error": across, "weight": along, "feedback": along}
    elif kernel == "update":
        times = {"x": blocks(arguments, "outputs", "OUTPUTS"), "delta": blocks(arguments, "inputs", "INPUTS")}
    elif kernel == "head":
        times = {"weight": blocks(arguments, "samples", "ROWS")}

    def once(names: tuple[str, ...]) -> dict[str, int]:
        first = {id(arguments[name]): name for name in reversed(names)}
        return {name: arguments[name].numel() * arguments[name].element_size() for name in first.values()}

    reads, writes = once(read), sum(once(written).values())
    return sum(reads.values()) + writes, sum(size * times.get(name, 1) for name, size in reads.items()) + writes


def products(kernel: str, arguments: dict[str, object]) -> int:
    """FLOPs of the matrix products, of whole tiles."""
    if kernel not in ("forward", "update"):
        return 0
    tiles = {size: blocks(arguments, size, size.upper()) * arguments[size.upper()] for size in ("rows", "outputs", "inputs")}
    each = 2 * tiles["rows"] * tiles["outputs"]
    signal = each * blocks(arguments, "width", "WIDTH") * arguments["WIDTH"] if arguments.get("HAS_ERROR") else 0
    return each * tiles["inputs"] + signal


def flops_of(instruction: str) -> int:
    """Of a warp's instruction for products, 0 for others; a HGMMA is that of four warps."""
    if found := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction):
        return 2 * math.prod(map(int, found.groups())) // 4
    if found := re.search(r"HMMA\.168(8|16)\b", instruction):
        return 2 * 16 * 8 * int(found[1])
    return 64 if "FFMA" in instruction else 0


def loops(code: list[str]) -> Iterator[tuple[int, int]]:
    """First and last line of each loop: a branch back to a label."""
    labels = {line[:-1]: place for place, line in enumerate(code) if line.endswith(":")}
    for place, line in enumerate(code):
        found = re.search(r"BRA\b.*`\((\.L_x_\d+)\)", line)
        if found and labels.get(found[1], place) < place:
            yield labels[found[1]], place


def instructions(sass: str) -> dict[str, int]:
    """Of a warp: in a turn of the products' loop (`loop`), those of them that are products (`matrix`), their FLOPs (`flops`);
    and in no loop, up to the end of the program (`outside`)."""
    lines = (re.sub(r"/\*.*?\*/", "", line).strip() for line in sass.splitlines())
    code = [line for line in lines if line.endswith(";") or re.fullmatch(r"\.L_x_\d+:", line)]
    ranges = list(loops(code))
    bodies = [[line for line in code[first : last + 1] if line.endswith(";")] for first, last in ranges]
    body = max(bodies, key=lambda body: sum(map(flops_of, body)), default=[])
    inside = {place for first, last in ranges for place in range(first, last + 1)}
    end = next((place for place, line in enumerate(code) if line.startswith("EXIT")), len(code))
    outside = sum(code[place].endswith(";") and place not in inside for place in range(end))
    work = [flops_of(line) for line in body]
    return {"loop": len(body), "matrix": sum(map(bool, work)), "flops": sum(work), "outside": outside}


def roofline(
    kernel: str, arguments: dict[str, object], programs: int, warps: int, dtype: str, flops: int, found: dict, sass: str
) -> dict[str, object]:
    """`bytes`, `ideal_us`, `bound_us`, what bounds (`limit`), `share`, `occupancy`, and how many of the instructions of the
    products' loop are products (`loop`), of a launch of `programs`.

    `flops`: those that must be done, products in `dtype`; `found`: `reg`, `shared_bytes`, `tensor_core` of what was compiled.
    """
    registers = -(-found["reg"] // 8) * 8 * 32 * warps
    resident = min(65536 // registers, 227 * 1024 // (found["shared_bytes"] + 1024), 64 // warps, 32)
    result = {"occupancy": round(resident * warps / 64, 2)}
    if kernel not in OPERANDS or arguments.get("PERSISTENT") or arguments.get("x_tiles") is not None:
        return result
    count = instructions(sass)
    moved, asked = bytes_of(kernel, arguments)
    busy = programs / (math.ceil(programs / MULTIPROCESSORS) * MULTIPROCESSORS)
    whole = products(kernel, arguments)
    dram = moved / BANDWIDTH
    times = {
        "DRAM": dram,
        "L2": asked / (64 * MULTIPROCESSORS * CLOCK * busy),
        "products": whole / (PEAK["fp32" if found["tensor_core"].startswith("none") else "half"] * busy),
    }
    if whole or kernel == "update_elements":
        issued = whole / count["flops"] * count["loop"] if whole else 0
        times["instructions"] = (issued + count["outside"] * warps * programs) / (4 * MULTIPROCESSORS * CLOCK * busy)
    ideal = max(dram, flops / PEAK["fp32" if dtype == "fp32" else "half"])
    limit = max(times, key=times.get)
    bound = max(ideal, times[limit])
    result |= {"bytes": moved, "ideal_us": float(f"{1e6 * ideal:.3g}"), "bound_us": float(f"{1e6 * bound:.3g}")}
    loop = {"loop": f"{count['matrix']} of {count['loop']}"} if whole else {}
    return result | {"share": round(ideal / bound, 2), "limit": limit} | loop
