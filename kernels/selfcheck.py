"""A short check of the Triton kernels on the device they are about to run on, before anything is trusted to them.

Compilers have miscompiled matrix products on particular devices (reused a register that the tensor core was still reading, for
one), and the weights would be silently wrong. So: whole-number operands, whose products and sums are exact in every precision,
must come out exact through every tile that the tables can choose for this type and device; what is not exact must agree with
torch's operations in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from . import eager, reference
from .generated import GeneratedFeedback
from .gpu import tiles
from .moments import widened
from .rules import SGD, Adam, Layer, Rule, State, Update, new_state

Ops = ModuleType | SimpleNamespace
Feedback = Tensor | GeneratedFeedback
# sizes among which the smallest are taken that reach each tile; none a multiple of 16
ROWS, OUTPUTS, INPUTS = (13, 30, 50, 70, 260), (20, 70, 300, 3300), (40, 300, 1100)
# rules, and in what their moments are kept
RULES = ((SGD(lr=0.5), "float32"), (SGD(lr=0.5, momentum=0.5), "float32"), (Adam(lr=0.01), "float32"), (Adam(lr=0.01), "int8"))
WIDTHS = (2, 7, 1000, 5000)  # columns of the last layer


def sizes(half: bool, roomy: bool, multiprocessors: int = 1) -> dict[tuple[int, str], tuple[int, int, int]]:
    """(rows, outputs, inputs) by the number of the rule and the tile: the smallest that reach each tile of the tables with it.

    `half`: products in half precision; `roomy`, `multiprocessors`: see `tiles`.
    """
    found: dict[tuple[int, str], tuple[int, int, int]] = {}
    grid = sorted(itertools.product(ROWS, OUTPUTS, INPUTS), key=lambda size: size[0] * size[1] * size[2])
    for number, (rule, kind) in enumerate(RULES):
        for rows, outputs, inputs in grid:
            reached = [tiles.forward_tile(rows, outputs, half, roomy, curved, multiprocessors) for curved in (False, True)]
            more = rule.moments, roomy, multiprocessors, kind == "int8"
            reached.append(tiles.forward_tile(rows, inputs, half, roomy, False, multiprocessors, transposed=True))
            reached.append(tiles.update_tile(rows, outputs, inputs, half, *more))
            for tile in reached:
                found.setdefault((number, str(tile)), (rows, outputs, inputs))
    return found


def _whole(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=generator).float()


def _states(weight: Tensor, bias: Tensor, rule: Rule, half: torch.dtype | None, kind: str = "float32") -> tuple[State, State]:
    return new_state(weight, rule, 0, half, kind), new_state(bias, rule, 1)


def _step(
    ops: Ops, rule: Rule, operands: tuple[Tensor, ...], feedback: Feedback, activation: str, kind: str = "float32"
) -> dict[str, Tensor]:
    """What a visit gives and leaves behind, by name."""
    x, weight, bias, error = (tensor.clone() for tensor in operands)
    states = _states(weight, bias, rule, x.dtype if x.dtype in (torch.float16, torch.bfloat16) else None, kind)
    update = Update(rule, rule.lr, torch.ones((), dtype=torch.int64, device=x.device), seed=3)
    h = ops.linear_step_(x, weight, bias, error, feedback, *states, update, activation)
    return {"output": h, "weight": weight, "bias": bias} | _moments(states)


def _backward(ops: Ops, rule: Rule, operands: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The same of an update with the input's gradient, which reads the weight transposed."""
    x, weight, bias, _ = (tensor.clone() for tensor in operands)
    delta = x[:, :1].expand(len(x), len(weight)).contiguous()
    states = _states(weight, bias, rule, x.dtype if x.dtype in (torch.float16, torch.bfloat16) else None)
    update = Update(rule, rule.lr, torch.ones((), dtype=torch.int64, device=x.device), seed=3)
    dx = ops.linear_backward_update_(weight, bias, delta, x, *states, update)
    return {"input's gradient": dx, "weight": weight, "bias": bias} | _moments(states)


def _elements(ops: Ops, rule: Rule, operands: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The rule on a parameter alone, from a gradient in memory."""
    weight = operands[1].clone()
    state = new_state(weight, rule)
    ops.update_(weight, operands[1] + 1, state, Update(rule, rule.lr, 1, seed=3))
    return {"weight": weight} | _moments((state,))


def _moments(states: tuple[State, ...]) -> dict[str, Tensor]:
    """With those of int8 widened, which are called narrow."""
    found = {}
    for i, state in enumerate(states):
        for j, moment in enumerate(state.moments):
            name = f"{'narrow ' if state.scales else ''}moment {i}.{j}"
            found[name] = widened(moment, state.scales[j]) if state.scales else moment
    return found


def _differs(got: dict[str, Tensor], wanted: dict[str, Tensor], exact: bool, loose: float = 1e-4) -> str | None:
    """The name of the first tensor that is not what it should be; of a narrow moment, to one part in fifty of the largest."""
    for name, ours in got.items():
        theirs = wanted[name.removeprefix("narrow ")]
        if exact or name in ("output", "input's gradient"):
            same = torch.equal(ours, theirs.to(ours.dtype))
        else:
            close = (0, 0.02 * float(theirs.abs().max())) if name.startswith("narrow") else (loose, loose)
            same = torch.allclose(ours.double(), theirs.double(), *close)
        if not same:
            return name
    return None


def _checks(
    ops: Ops, device: torch.device, dtype: torch.dtype, precision: str, roomy: bool, multiprocessors: int
) -> Iterator[tuple[str, str | None]]:
    """(what was checked, what of it is wrong)."""
    generator, half = torch.Generator().manual_seed(0), dtype != torch.float32
    loose = 3e-2 if half else {"ieee": 1e-4, "tf32": 2e-3}[precision]
    reached = sizes(half, roomy, multiprocessors).items()
    for number, (rows, outputs, inputs) in dict.fromkeys((number, size) for (number, _), size in reached):
        (rule, kind), shapes = RULES[number], ((rows, inputs), (outputs, inputs), (outputs,), (rows, 5))
        x, *others = (_whole(generator, *shape).to(device) for shape in shapes)
        operands = x.to(dtype), *others
        wide = tuple(tensor.double() for tensor in operands)
        feedback, exact = _whole(generator, 5, outputs).to(device), isinstance(rule, SGD)
        where = f"{rule} with moments in {kind} on {rows} x {inputs} inputs and {outputs} outputs"
        right = _step(eager, rule, wide, feedback.double(), "relu")
        yield where, _differs(_step(ops, rule, operands, feedback, "relu", kind), right, exact)
        if number:  # what does not depend on the rule is run with one
            continue
        made = GeneratedFeedback("trinomial", 5, outputs, seed=11)
        for name, matrix, dense in (("int8", feedback.to(torch.int8), feedback), ("generated", made, made.dense(device))):
            right = _step(eager, rule, wide, dense.double(), "relu")
            yield f"{name} feedback, {where}", _differs(_step(ops, rule, operands, matrix, "relu"), right, exact)
        classes = 70  # several turns, of which few columns count, so that sums stay exact
        many, its = (torch.zeros(*shape, device=device) for shape in ((rows, classes), (classes, outputs)))
        many[:, ::14], its[::14] = operands[3], feedback
        apart = *operands[:3], many
        right = _step(eager, rule, tuple(tensor.double() for tensor in apart), its.double(), "relu")
        for name, matrix in (("float", its), ("int8", its.to(torch.int8))):
            got = _step(ops, rule, apart, matrix, "relu")
            yield f"{classes} classes and {name} feedback, {where}", _differs(got, right, exact)
        for activation in ("tanh", "gelu"):
            small = operands[0], operands[1] / 64, *operands[2:]
            right = _step(eager, SGD(lr=0.5), tuple(t.double() for t in small), feedback.double(), activation)
            got = _step(ops, SGD(lr=0.5), small, feedback, activation)
            close = {name: torch.allclose(got[name].double(), right[name], loose, loose * rows * 8) for name in got}
            yield f"{activation}, {where}", next((name for name, ok in close.items() if not ok), None)
        yield f"backward, {where}", _differs(_backward(ops, rule, operands), _backward(eager, rule, wide), exact)
        yield f"elements, {where}", _differs(_elements(ops, rule, operands), _elements(eager, rule, wide), exact)
        if dtype == torch.float16:
            continue
        low = operands[0], operands[1].bfloat16(), operands[2].bfloat16(), operands[3]
        ours = _step(ops, SGD(lr=0.3), low, feedback, "relu")["weight"]
        theirs = _step(eager, SGD(lr=0.3), (x, *low[1:]), feedback, "relu")["weight"]  # in float32, where all is exact
        # bfloat16 weights, rounded by the same bits: but where float32 sums differ in their last one, now and then another way
        other = float((ours != theirs).double().mean())
        yield f"stochastic rounding, {where}", "weight" if other > 0.02 else None
    for loss, classes in itertools.product(("bce", "cross-entropy", "mse"), WIDTHS):
        a = _whole(generator, 9, classes).to(device)
        target = torch.eye(classes, device=device)[torch.arange(9, device=device) % classes]
        pairs = zip(ops.output_step(a, target, loss, "delayed-error")[:2],
                    eager.output_step(a.double(), target.double(), loss, "delayed-error")[:2], strict=True)  # fmt: skip
        wrong = [name for name, (o, t) in zip(("gradient", "error"), pairs, strict=True) if not _near(o, t)]
        yield f"the loss {loss} of {classes} outputs", next(iter(wrong), None)
    for loss, classes, norm in itertools.product(("bce", "cross-entropy", "mse"), tiles.HEAD, (True, False)):
        h, weight, bias = (_whole(generator, *shape).to(device) / 8 for shape in ((21, 70), (classes - 1, 70), (classes - 1,)))
        target = torch.eye(classes - 1, device=device)[torch.arange(21, device=device) % (classes - 1)]
        ours = _head(ops, (h.to(dtype), weight, bias, target), loss, norm)
        theirs = _head(eager, tuple(tensor.double() for tensor in (h, weight, bias, target)), loss, norm)
        wrong = (name for name in ours if not torch.allclose(ours[name].double(), theirs[name], loose, loose / 30))
        yield f"a head of {classes - 1} outputs and {loss}", next(wrong, None)


def _head(ops: Ops, operands: tuple[Tensor, ...], loss: str, norm: bool) -> dict[str, Tensor]:
    """What a head's visit gives and leaves behind, by name."""
    h, weight, bias, target = (tensor.clone() for tensor in operands)
    states = _states(weight, bias, RULES[0][0], None)
    update = Update(RULES[0][0], 0.5, torch.ones((), dtype=torch.int64, device=h.device), seed=3)
    return {"gradient": ops.head_step_(h, weight, bias, target, loss, *states, update, norm), "weight": weight, "bias": bias}


def _near(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours.double(), theirs, 1e-4, 1e-6)


@cache
def fault(device: torch.device, dtype: torch.dtype, precision: str) -> str | None:
    """What is wrong with the kernels on this device, with products in this type; None if nothing is. Once a process."""
    from .gpu import ops as triton_ops

    room = triton_ops._roomy(device), triton_ops._multiprocessors(device)
    for what, wrong in _checks(triton_ops.with_precision(precision), device, dtype, precision, *room):
        if wrong is not None:
            return f"wrong {wrong} of {what}"
    return None


@cache
def network_fault(
    device: torch.device,
    sizes: tuple[int, ...],
    width: int,
    batch: int,
    rule: Rule,
    loss: str,
    activation: str,
    bias: bool,
) -> tuple[str | None, str | None]:
    """(what the one launch of a network's steps does not do, what is wrong with it on this device), None each where nothing is.

    Steps of random layers of these `sizes`, as errors of this `width` and batches of so many samples teach them, are compared
    with those of torch in float64: by the very kernel that a run with them compiles.
    """
    from .gpu import steps

    generator = torch.Generator().manual_seed(0)
    if not isinstance(rule, SGD):
        rule = replace(rule, eps=1e-2)  # no gradient is so small that its sign decides

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def layer(k: int, n: int, place: int) -> Layer:
        weight, b = draw(n, k) / k**0.5, draw(n) / 8 if bias else None
        states = new_state(weight, rule), None if b is None else new_state(b, rule)
        return Layer(weight, b, *states, draw(width, n) if place < len(sizes) - 2 else None)

    ours = [layer(k, n, place) for place, (k, n) in enumerate(itertools.pairwise(sizes))]
    why = steps.refusal(ours, batch, device)
    if why is not None or device.type != "cuda":
        return why, None
    theirs = [_widened(one, rule) for one in ours]
    count = 5
    x, row, lr = draw(count, batch, sizes[0]), draw(count, batch, width) / 8, torch.full((count,), 1e-2, device=device)
    target = draw(count, batch, sizes[-1]).softmax(-1)
    step, failed = torch.ones((), dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    a = steps.network_steps_(x, row, target, ours, loss, Update(rule, lr, step), activation, 0.1, failed=failed)
    if int(failed):
        return None, "comes to no end: programs waited in vain for each other"
    x, row, target, lr = (tensor.double() for tensor in (x, row, target, lr))
    right = reference.network_steps_(x, row, target, theirs, loss, Update(rule, lr, step), activation, 0.1)
    pairs = [("output", a, right)]
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        pairs += [(f"weight {place}", one.weight, other.weight)] + [(f"bias {place}", one.bias, other.bias)] * bias
    wrong = (name for name, mine, its in pairs if not torch.allclose(mine.double(), its, 1e-3, 1e-4))
    return None, next((f"gives a wrong {name}" for name in wrong), None)


def _widened(layer: Layer, rule: Rule) -> Layer:
    """A copy in float64."""
    weight, bias, feedback = (None if t is None else t.double() for t in (layer.weight, layer.bias, layer.feedback))
    return Layer(weight, bias, new_state(weight, rule), None if bias is None else new_state(bias, rule), feedback)
