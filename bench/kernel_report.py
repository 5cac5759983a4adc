"""Compile every tile shape of every Triton kernel ahead of time, with no GPU, and show what came out.

    python -m bench.kernel_report                      sm_90
    python -m bench.kernel_report --arch all --output kernels.json

For each kernel: registers a thread, bytes of local memory a thread (`stack`: spilled registers), shared memory, the tensor-core
instruction in the PTX, and for a stated size the operation's bytes and FLOPs and the time that its roofline allows on an H200
(4.8 TB/s; 989 TFLOP/s in half precision, 67 in float32) and an RTX 4090 (1.0 TB/s; 165 and 83): the vendors' figures.
Resource usage is read from the cubin, so it is there for NVIDIA's architectures only; for AMD's the code is compiled.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from f3triton.kernels import SGD, Adam
from f3triton.kernels.gpu import linear as triton_linear
from f3triton.kernels.gpu import ops as triton_ops
from f3triton.kernels.gpu import output as triton_output
from f3triton.kernels.gpu import tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .common import result, row, table, write_result

ARCHITECTURES = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB
MACHINES = {"H200": (4.8e12, {"fp32": 67e12, "half": 989e12}), "RTX 4090": (1.008e12, {"fp32": 83e12, "half": 165e12})}
TYPES = {"fp32": triton.language.float32, "fp16": triton.language.float16, "bf16": triton.language.bfloat16}


@dataclass(frozen=True)
class Case:
    """One kernel with one tile, for inputs of one type, at one size (rows M, inputs K, outputs N, error width C)."""

    kernel: str
    tile: tiles.Tile
    dtype: str
    size: tuple[int, int, int, int]
    moments: int = 2  # of the rule: SGD, SGD with momentum, Adam
    generated: int = 0  # the kind of entries of a feedback matrix that the kernel makes

    @property
    def name(self) -> str:
        return f"{self.kernel} {'x'.join(map(str, self.tile.blocks))}" + " generated" * (self.generated > 0)


def cases() -> list[Case]:
    """Every entry of the tables that the choosers can return, with a size at which it is chosen."""
    found = [Case("forward", tiles.FORWARD["small"], dtype, (16, 784, 512, 16)) for dtype in ("fp32", "bf16")]
    found += [Case("forward", tiles.FORWARD["medium"], dtype, (128, 1024, 1024, 16)) for dtype in ("fp32", "bf16")]
    found += [Case("forward", tiles.FORWARD["large"], dtype, (4096, 4096, 4096, 16)) for dtype in ("fp16", "bf16")]
    found += [Case("forward", tiles.FORWARD["roomy"], dtype, (4096, 4096, 4096, 16)) for dtype in ("fp16", "bf16")]
    found += [Case("update", tiles.UPDATE["small"], dtype, (64, 784, 256, 16)) for dtype in ("fp32", "bf16")]
    found += [Case("update", tiles.UPDATE["medium"], dtype, (4096, 4096, 4096, 16)) for dtype in ("fp32", "bf16")]
    for moments, name in enumerate(("roomy", "roomy, one moment", "roomy, two moments")):
        found += [Case("update", tiles.UPDATE[name], "bf16", (4096, 4096, 4096, 16), moments)]
    for rows, tile in tiles.STEP.items():
        found += [Case("step_small", tile, dtype, (rows, 4096, 4096, 16)) for dtype in ("fp32", "bf16")]
    found += [Case("step_small", tiles.STEP[64], dtype, (64, 4096, 4096, 16), generated=1) for dtype in ("fp32", "bf16")]
    found += [Case("forward", tiles.FORWARD["medium"], "fp32", (128, 1024, 1024, 16), generated=1)]
    found += [Case("forward", tiles.FORWARD["large"], "bf16", (4096, 4096, 4096, 16), generated=1)]
    found += [Case("output", tiles.Tile((64, 16), 4, 3), "fp32", (4096, 1, 1, 16))]
    found += [Case("output", tiles.Tile((1, 1024), 4, 3), "fp32", (4096, 1, 1, 1024))]
    found += [Case("update_elements", tiles.Tile((tiles.ELEMENTWISE,), 4, 3), "fp32", (1, 4096, 4096, 1))]
    return found


def constants(case: Case) -> dict[str, object]:
    """Compile-time arguments as `triton_ops` passes them: tanh, bias, error, Adam, step in memory; unit inner strides."""
    if case.kernel == "output":
        choice = {"LOSS": 1, "LINK": 0, "SOURCE": 0, "SCATTER": True}
        return choice | {"ROWS": case.tile.blocks[0], "COLUMNS": case.tile.blocks[1]}
    product = {"DTYPE": TYPES[case.dtype], "PRECISION": "ieee", "HAS_BIAS": True}
    if case.kernel != "forward":
        product |= {"SHADOW": case.dtype != "fp32", "STOCHASTIC": False}
    rules = SGD(), SGD(momentum=0.9), Adam()
    rule = triton_ops._constants(triton_ops._rule_arguments(rules[case.moments], 0.0, 1)) | {"STEP_IN_MEMORY": True}
    blocks = case.tile.blocks
    if case.kernel == "update_elements":
        return rule | {"STOCHASTIC": False, "BLOCK": case.tile.blocks[0]}
    if case.kernel == "forward":
        sizes = dict(zip(("ROWS", "OUTPUTS", "INPUTS"), blocks, strict=True))
        sizes |= {"WIDTH": 16, "ACTIVATION": 1, "HAS_ERROR": True, "GENERATED": case.generated}
        return product | sizes | {"x_k": 1, "weight_k": 1, "error_c": 1, "feedback_n": 1}
    if case.kernel == "update":
        sizes = dict(zip(("OUTPUTS", "INPUTS", "ROWS"), blocks, strict=True)) | {"KEEP_GRADIENT": False}
        return product | rule | sizes | {"delta_n": 1, "x_k": 1}
    sizes = {"OUTPUTS": blocks[0], "INPUTS": blocks[1], "ROWS": case.size[0], "WIDTH": 16, "ACTIVATION": 1}
    sizes["GENERATED"] = case.generated
    return product | rule | sizes | {"x_k": 1, "error_c": 1, "feedback_n": 1}


def compile_case(case: Case, target: GPUTarget, ones: bool = False) -> CompiledKernel:
    """The kernel as a real launch would have it: 16-byte aligned pointers, sizes and strides divisible by 16.

    With `ones` every size and stride is 1, which a launch turns into a compile-time constant.
    """
    function = getattr(triton_output if case.kernel == "output" else triton_linear, case.kernel)
    constexprs = constants(case)
    sizes = {"rows", "outputs", "inputs", "width", "samples", "classes", "count_elements"}
    numbers = {"scale", "lr", "log_beta1", "log_beta2"}
    of_input_type = {"x", "h", "delta", "shadow"} | ({"weight"} if case.kernel == "forward" else set())  # its shadow
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in numbers:
            signature[name] = "fp32"
        elif name in {"seed", "bias_seed", "feedback_seed"}:
            signature[name] = "i32"
        elif name in {"correct", "index"}:
            signature[name] = {"correct": "*i32", "index": "*i64"}[name]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif (name in sizes or re.fullmatch(r"(x|weight|delta|error|feedback)_[mnkc]", name)) and ones:
            signature[name], constexprs[name] = "constexpr", 1
        elif name in sizes or re.fullmatch(r"(x|weight|delta|error|feedback)_[mnkc]", name):
            signature[name] = "i32"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = f"*{case.dtype if name in of_input_type else 'fp32'}"
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def resources(compiled: CompiledKernel) -> dict[str, int]:
    """Registers and local memory a thread, from the cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def tensor_core(ptx: str) -> str:
    """The matrix instruction that the PTX uses."""
    return next((word for word in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if word in ptx), "none (fma)")


def cost(case: Case) -> tuple[int, int]:
    """Bytes that must move and FLOPs that must be done, with Adam in float32 and every operand read and written once."""
    m, k, n, c = case.size
    if case.kernel == "output":
        return 4 * (4 * m * c + 2 * m) + 8 * m, 10 * m * c
    if case.kernel == "update_elements":
        return 28 * n * k, 15 * n * k
    item = 4 if case.dtype == "fp32" else 2
    weight, error = n * k, m * c + c * n
    if case.kernel == "forward":
        return item * (m * k + 2 * m * n) + 4 * (weight + error), 2 * m * n * (k + c)
    if case.kernel == "update":
        return item * (m * k + m * n) + (8 + 8 * case.moments) * weight, 2 * m * n * k
    return item * (m * k + m * n) + 24 * weight + 4 * error, 2 * m * n * (2 * k + c)


def fits(case: Case, architecture: str) -> bool:
    """Whether the tile is ever chosen there: the roomy ones only where there is room."""
    roomy = [tile for table in (tiles.FORWARD, tiles.UPDATE) for name, tile in table.items() if name.startswith("roomy")]
    return case.tile not in roomy or SHARED_LIMIT[architecture] * 1024 >= tiles.ROOMY


def report(case: Case, architecture: str) -> dict[str, object]:
    compiled = compile_case(case, ARCHITECTURES[architecture])
    moved, flops = cost(case)
    kind = "fp32" if case.dtype == "fp32" else "half"
    found = {
        "kernel": case.name,
        "dtype": case.dtype,
        "arch": architecture,
        "size": list(case.size),
        "shared_bytes": compiled.metadata.shared,
        "bytes": moved,
        "flops": flops,
    }
    for machine, (bandwidth, rates) in MACHINES.items():
        found[f"roofline_us_{machine}"] = round(1e6 * max(moved / bandwidth, flops / rates[kind]), 1)
    if "cubin" in compiled.asm:
        found |= resources(compiled)
        found["tensor_core"] = tensor_core(compiled.asm["ptx"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=[*ARCHITECTURES, "all"])
    parser.add_argument("--quick", action="store_true", help="the first four kernels only")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there too")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set; the interpreter cannot compile, unset it")
    chosen = list(ARCHITECTURES) if "all" in options.arch else options.arch
    wanted = cases()[:4] if options.quick else cases()
    rows = [report(case, architecture) for architecture in chosen for case in wanted if fits(case, architecture)]
    columns = ["kernel", "dtype", "arch", "size", "reg", "stack", "shared_bytes", "tensor_core"]
    columns += [f"roofline_us_{machine}" for machine in MACHINES]
    print(table(columns, [[row.get(column, "") for column in columns] for row in rows]))
    if options.output:
        figures = []
        for found in rows:
            place = {"x": f"{found['kernel']} {found['dtype']}", "part": found["arch"]}
            figures.append(row("registers a thread", metric="registers", values=found.get("reg", 0), **place, **found))
        write_result(options.output, result("kernel_report", figures))


if __name__ == "__main__":
    main()
