"""Compile every Triton kernel that a launch can ask for, ahead of time, with no GPU, and show what came out.

    python -m bench.kernel_report                      sm_90
    python -m bench.kernel_report --arch all --output kernels.json
    PYTHONPATH=FOLDER python -m bench.kernel_report    with another Triton: pip install --no-deps --target FOLDER triton==X

A case is a call of one of the backend's operations. It is made on tensors without memory, and what it would have launched is
compiled: the tile that the tables choose, with the types, the constants and the divisibilities of that very launch.

For each: registers a thread, bytes of local memory a thread (`stack`: spilled registers), shared memory, the number of
instructions that access global memory, the tensor-core instruction in the PTX, the operation's FLOPs, and for sm_90 the share
of an H100's roofline that its bytes, tiles and instructions allow (`bench.roofline`). Resource usage is read from the cubin, so
it is there for NVIDIA's architectures only; for AMD's the code is compiled. Exits with 1 where a case does not compile.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from f3triton.kernels import SGD, Adam, GeneratedFeedback, Update, new_state
from f3triton.kernels.gpu import head as triton_head
from f3triton.kernels.gpu import linear as triton_linear
from f3triton.kernels.gpu import network as triton_network
from f3triton.kernels.gpu import ops as triton_ops
from f3triton.kernels.gpu import output as triton_output
from f3triton.kernels.gpu import steps as triton_steps
from f3triton.kernels.gpu import tiles
from f3triton.kernels.rules import Layer

from .common import result, row, table, write_result
from .roofline import MULTIPROCESSORS, roofline

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
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
RULES = {"sgd": SGD(), "momentum": SGD(momentum=0.9), "adam": Adam()}


# --- what is compiled -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call of an operation at a size (rows M, inputs K, outputs N, error width C), with products in one type."""

    operation: str
    size: tuple[int, int, int, int]
    dtype: str = "fp32"
    rule: str = "adam"
    feedback: str = "float32"  # or int8, or the kind of entries that the kernel makes
    activation: str = "tanh"
    weight: str = "fp32"  # bf16: weights in bfloat16, rounded stochastically
    roomy: bool = False  # a device with much shared memory
    output: tuple[str, str, str] = ("cross-entropy", "delayed-error", "auto")
    norm: bool = True  # of a head
    moments: str = "float32"  # bfloat16, int8: rounded stochastically
    persistent: int = 0  # programs a multiprocessor that share all tiles
    descriptors: bool = False

    @property
    def name(self) -> str:
        """What it is, in words."""
        words = [self.operation, "x".join(map(str, self.size)), self.dtype]
        if self.operation in ("update", "elements", "network"):
            words += [self.rule, "stochastic" * (self.weight == "bf16"), self.moments * (self.moments != "float32")]
        if self.operation in ("forward", "network"):
            words += [self.activation, self.feedback]
        if self.operation == "output":
            words += self.output
        if self.operation == "network":
            words.append(self.output[0])
        if self.operation == "head":
            words += [self.output[0], "norm" * self.norm]
        return " ".join(
            filter(None, [*words, "roomy" * self.roomy, "persistent" * self.persistent, "descriptors" * self.descriptors])
        )


def twin(case: Case) -> Case:
    """The same with sizes of 512, 1536 and 4096 for those of 500, 1500 and 4100: what the compiler knows more of."""
    known = {500: 512, 1500: 1536, 4100: 4096}
    return replace(case, size=tuple(known.get(size, size) for size in case.size))


def cases() -> list[Case]:
    """Every tile of the tables, at sizes that lead to it, and with 512 in place of 500; every variant of a kernel."""
    found = []
    for dtype in ("fp32", "bf16"):
        forward = [Case("forward", size, dtype) for size in ((16, 784, 4100, 10), (50, 784, 500, 10), (1024, 500, 500, 10))]
        found += [*forward, Case("keep", (50, 500, 10, 1), dtype)]
        found += [Case("transposed", size, dtype) for size in ((50, 500, 500, 1), (1024, 500, 500, 1))]
        found += [Case("update", (50, 500, 10, 1), dtype), Case("gradient", (256, 500, 500, 1), dtype)]
        found += [Case("update", (256, 500, 500, 1), dtype, rule) for rule in RULES]
        found += [twin(case) for case in found if case.dtype == dtype]
        found += [replace(case, feedback=kind) for case in forward for kind in ("trinomial", "uniform", "int8")]
        found += [replace(case, activation=kind) for case in forward for kind in ("relu", *tiles.CURVED)]
    for roomy in (False, True):
        large = [Case("forward", (4096, 500, 500, 10), "bf16", roomy=roomy)]
        large += [Case("transposed", (4096, 500, 500, 1), "bf16", roomy=roomy), replace(large[0], dtype="fp16")]
        found += large + [twin(case) for case in large]
        found += [replace(large[0], feedback=feedback) for feedback in ("trinomial", "int8")]
        found += [replace(large[0], activation=activation) for activation in tiles.CURVED]
    sizes = (50, 500, 500, 1), (4096, 1500, 500, 1), (4096, 4100, 4100, 1)
    large = [Case("update", size, "bf16", rule, roomy=True) for size in sizes for rule in RULES]
    found += large + [twin(case) for case in large] + [replace(case, weight="bf16") for case in large]
    found += [Case("update", (256, 500, 500, 1), "bf16", weight="bf16")]
    found += [Case("elements", (1, 500, 500, 1), rule=rule, weight=w) for rule, w in (("adam", "fp32"), ("sgd", "bf16"))]
    shared = ((1, False), (0, True), (1, True))
    found += [
        Case("update", (4096, 4096, 4096, 1), "bf16", rule, roomy=True, persistent=programs, descriptors=described)
        for programs, described in shared
        for rule in ("sgd", "adam")
    ]
    for feedback in ("float32", "int8", "trinomial", "uniform"):  # many classes: more columns of the error at a time
        for size in ((16, 784, 4100, 1000), (50, 784, 500, 1000), (1024, 500, 500, 1000)):
            for activation in ("tanh", "gelu"):
                found += [Case("forward", size, "bf16", feedback=feedback, activation=activation)]
    for size in ((50, 784, 500, 1000), (1024, 500, 500, 1000)):
        found += [Case("forward", size, activation=activation) for activation in ("tanh", "gelu")]
    for moments in ("bfloat16", "int8"):
        rules = ("momentum", "adam")
        narrow = [Case("update", (256, 500, 500, 1), dtype, rule) for dtype in ("fp32", "bf16") for rule in rules]
        narrow += [Case("update", (50, 500, 10, 1), dtype) for dtype in ("fp32", "bf16")]
        narrow += [Case("update", size, "bf16", rule, roomy=True) for size in sizes for rule in rules]
        narrow += [replace(case, weight="bf16") for case in narrow if case.dtype == "bf16"]
        found += [replace(case, moments=moments) for case in [*narrow, Case("elements", (1, 500, 500, 1))]]
    for size in [(rows, 4096, 4096, 16) for rows in (16, 64, 256, 4096)] + [(8192, 8192, 8192, 16)]:  # those of `bench.tiles`
        found += [Case("update", size, "bf16", rule, roomy=True) for rule in ("sgd", "adam")]
        found += [Case("forward", size, "bf16", roomy=True)] if size[0] < 256 else []
    found += [Case("update", (50, 784, 500, 16), rule=rule) for rule in ("sgd", "adam")] + [Case("forward", (50, 784, 500, 16))]
    steps = [Case("network", (rows, 784, 500, 10), activation=kind) for rows in (50, 16) for kind in ("tanh", "gelu")]
    steps += [Case("network", (50, 784, 500, 10), rule=rule) for rule in ("sgd", "momentum")]
    steps += [Case("network", (64, 784, 500, 10), activation="silu"), Case("network", (50, 784, 500, 64))]
    steps += [Case("network", (50, 784, 500, 10), output=(loss, "delayed-error", "auto")) for loss in ("bce", "mse")]
    found += steps + [twin(case) for case in steps]
    found += [Case("forward", (1, 7, 3, 1)), Case("update", (1, 7, 3, 1))]
    for dtype in ("fp32", "fp16", "bf16"):
        heads = [Case("head", (100, 1, 500, classes), dtype) for classes in (10, 32, 50, 100)]
        found += heads + [twin(case) for case in heads] + [replace(case, norm=False) for case in heads]
    found += [Case("head", (100, 1, 500, 10), output=(loss, "none", "auto")) for loss in ("bce", "mse")]
    found += [Case("output", (64, 1, 1, classes)) for classes in (2, 10, 1000, 4096, 32768)]
    outputs = [("bce", "delayed-error", "auto"), ("mse", "delayed-error", "auto"), ("bce", "current-error-sign", "softmax")]
    outputs += [("cross-entropy", "delayed-loss", "softmax"), ("bce", "delayed-loss", "softmax")]
    return found + [Case("output", (64, 1, 1, 10), output=output) for output in outputs]


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of a launch, and with its options."""

    kernel: triton.JITFunction
    arguments: dict[str, object]
    options: dict[str, object]
    programs: int

    @property
    def tile(self) -> str:
        """Block sizes in the kernel's own order, warps, and pipeline stages."""
        names = ("ROWS", "OUTPUTS", "INPUTS", "COLUMNS", "BLOCK")
        blocks = [value for name, value in self.arguments.items() if name in names]
        slices = f" {self.arguments['SLICES']} slices" if self.arguments.get("SLICES", 1) > 1 else ""
        slices += " persistent" * self.arguments.get("PERSISTENT", False)
        slices += " descriptors" * (self.arguments.get("x_tiles") is not None)
        return f"{'x'.join(map(str, blocks))} {self.options.get('num_warps', 4)}w {self.options.get('num_stages', 3)}s{slices}"


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches are written down instead of made."""
    made: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: triton.JITFunction) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return partial(self.launch, grid[0])

        def launch(self, programs: int, *positional: object, **named: object) -> None:
            names = self.kernel.arg_names
            options = {name: value for name, value in named.items() if name not in names}
            arguments = dict(zip(names, positional, strict=False)) | named
            made.append(Launch(self.kernel, {name: arguments[name] for name in names}, options, programs))

    kernels = [(triton_linear, name) for name in ("forward", "update", "update_elements")]
    kernels += [(triton_output, "output"), (triton_head, "head"), (triton_network, "network")]
    before: list[tuple[ModuleType, str, triton.JITFunction]] = [(room, name, getattr(room, name)) for room, name in kernels]
    for room, name, kernel in before:
        setattr(room, name, Recorder(kernel))
    try:
        yield made
    finally:
        for room, name, kernel in before:
            setattr(room, name, kernel)


def launch_of(case: Case) -> Launch:
    """What the operation launches."""
    m, k, n, c = case.size
    dtype, weight_dtype = TYPES[case.dtype], TYPES[case.weight]

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, delta, weight, bias = tensor(m, k, dtype=dtype), tensor(m, n, dtype=dtype), tensor(n, k), tensor(n)
    weight, bias = weight.to(weight_dtype), bias.to(weight_dtype)
    error, rule = tensor(m, c), RULES[case.rule]
    if case.feedback in ("float32", "int8"):
        feedback = tensor(c, n, dtype=getattr(torch, case.feedback))
    else:
        feedback = GeneratedFeedback(case.feedback, c, n, seed=1)
    states = new_state(weight, rule, 0, dtype if dtype != torch.float32 else None, case.moments), new_state(bias, rule, 1)
    shadow = weight if states[0].shadow is None else states[0].shadow
    update = Update(
        rule, 1e-3, tensor(dtype=torch.int64), seed=7 if case.weight == "bf16" or case.moments != "float32" else None
    )
    chosen = triton_ops._roomy, triton_ops._multiprocessors, tiles.update_tile
    tiles.update_tile = lambda *about: replace(chosen[2](*about), persistent=case.persistent, descriptors=case.descriptors)
    triton_ops._roomy = lambda device: case.roomy
    triton_ops._multiprocessors = lambda device: MULTIPROCESSORS if case.roomy else 108  # of an H100; of an A100
    try:
        with recording() as made:
            if case.operation == "forward":
                triton_ops.linear_forward(x, shadow, bias, case.activation, error, feedback)
            elif case.operation == "keep":
                triton_ops.linear_keep(x, shadow, bias, "identity")
            elif case.operation == "transposed":
                triton_ops.linear_forward(delta, shadow.t())
            elif case.operation == "update":
                triton_ops.outer_product_update_(weight, bias, delta, x, *states, update)
            elif case.operation == "gradient":
                triton_ops.outer_product(delta, x)
            elif case.operation == "elements":
                triton_ops.update_(weight, tensor(n, k), states[0], update)
            elif case.operation == "head":
                head, its_bias = tensor(c, n).to(weight_dtype), tensor(c).to(weight_dtype)
                owned = new_state(head, rule, 0, dtype if dtype != torch.float32 else None), new_state(its_bias, rule, 1)
                triton_ops.head_step_(delta, head, its_bias, error, case.output[0], *owned, update, case.norm)
            elif case.operation == "network":
                last, its_bias = tensor(c, n), tensor(c)
                layers = [Layer(weight, bias, *states, feedback)]
                layers += [Layer(last, its_bias, new_state(last, rule), new_state(its_bias, rule, 1))]
                now = replace(update, lr=tensor(1))
                triton_steps.network_steps_(x[None], error[None], error[None], layers, case.output[0], now, case.activation)
            else:
                loss, source, link = case.output
                triton_ops.output_step(error, error, loss, source, link)
    finally:
        triton_ops._roomy, triton_ops._multiprocessors, tiles.update_tile = chosen
    return made[0]  # the update of a head is a case of its own


# --- what comes out ---------------------------------------------------------------------------------------------------


def source_of(launch: Launch) -> ASTSource:
    """The kernel that the launch would have had compiled, its pointers aligned to 16 bytes as torch's are."""
    signature, attributes, constants = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if value is None or parameter.is_constexpr or (specialised and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
            continue
        pointer = isinstance(value, torch.Tensor)
        signature[name] = POINTERS[value.dtype] if pointer else "fp32" if isinstance(value, float) else "i32"
        if specialised and (pointer or (type(value) is int and value % 16 == 0)):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def dumped(compiled: CompiledKernel, tool: str, option: str) -> str:
    """What one of the tools beside Triton's ptxas says of the cubin."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([str(path), option, file.name], check=True, capture_output=True, text=True).stdout


def resources(compiled: CompiledKernel) -> dict[str, int]:
    """Registers and local memory a thread, from the cubin."""
    text = dumped(compiled, "cuobjdump", "--dump-resource-usage")
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def tensor_core(ptx: str) -> str:
    """The matrix instruction that the PTX uses."""
    return next((word for word in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if word in ptx), "none (fma)")


def accesses(ptx: str) -> int:
    """Instructions that read or write global memory: the wider each is, the fewer there are."""
    return len(re.findall(r"\b(?:ld|st)\.global|\bcp\.async\.c[ag]\.shared", ptx))


def flops_of(case: Case) -> int:
    """FLOPs that must be done."""
    m, k, n, c = case.size
    if case.operation == "output":
        return 10 * m * c
    if case.operation == "head":
        return 4 * m * n * c
    if case.operation == "network":
        return 4 * m * k * n + 4 * m * n * c + 2 * m * n * c
    if case.operation == "elements":
        return 15 * n * k
    return 2 * m * n * (k + c * (case.operation == "forward"))


def fits(case: Case, architecture: str) -> bool:
    """Whether an architecture has so much shared memory (roomy tiles are chosen only where there is room), and descriptors."""
    described = architecture.startswith("sm_") and int(architecture[3:]) >= 90
    return (not case.roomy or SHARED_LIMIT[architecture] * 1024 >= tiles.ROOMY) and (described or not case.descriptors)


def report(case: Case, architecture: str, disassembled: bool = True) -> dict[str, object]:
    """All figures of a case, the roofline if `disassembled`; `failed`, with the first line of why, if it does not compile."""
    launch = launch_of(case)
    source, flops = source_of(launch), flops_of(case)
    found = {
        "case": case.name,
        "kernel": launch.kernel.__name__,
        "tile": launch.tile,
        "dtype": case.dtype,
        "arch": architecture,
        "triton": triton.__version__,
        "size": list(case.size),
        "flops": flops,
    }
    try:
        compiled = triton.compile(source, target=ARCHITECTURES[architecture], options=launch.options)
    except RuntimeError as error:
        return found | {"failed": str(error).splitlines()[0]}
    found["shared_bytes"] = compiled.metadata.shared
    if "cubin" in compiled.asm:
        ptx = compiled.asm["ptx"]
        found |= resources(compiled) | {"accesses": accesses(ptx), "tensor_core": tensor_core(ptx)}
    if architecture == "sm_90" and disassembled:
        about = launch.kernel.__name__, launch.arguments, launch.programs, launch.options.get("num_warps", 4), case.dtype
        found |= roofline(*about, flops, found, dumped(compiled, "nvdisasm", "-c"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=[*ARCHITECTURES, "all"])
    parser.add_argument("--quick", action="store_true", help="the first four cases only")
    parser.add_argument("--brief", action="store_true", help="no bounds, which need the machine code: twice as fast")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there too")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set; the interpreter cannot compile, unset it")
    chosen = list(ARCHITECTURES) if "all" in options.arch else options.arch
    wanted = cases()[:4] if options.quick else cases()
    asked = [(case, architecture) for architecture in chosen for case in wanted if fits(case, architecture)]
    rows = [report(*one, disassembled=not options.brief) for one in asked]
    columns = ["case", "tile", "arch", "reg", "stack", "shared_bytes", "accesses", "tensor_core"]
    columns += ["occupancy", "loop", "ideal_us", "bound_us", "limit", "share"]
    print(table(columns, [[found.get(column, "") for column in columns] for found in rows]))
    if options.output:
        figures = []
        for found in rows:
            place = {"x": found["case"], "part": found["arch"]}
            figures.append(row("registers a thread", metric="registers", values=found.get("reg", 0), **place, **found))
        write_result(options.output, result("kernel_report", figures))
    failed = [f"{found['case']} for {found['arch']}: {found['failed']}" for found in rows if "failed" in found]
    if failed:
        sys.exit("\n".join(["does not compile:", *failed]))


if __name__ == "__main__":
    main()
