"""The operations as `torch.library` operators: registered properly, the same as the reference, compiled and exported."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from f3triton.kernels import SGD, Adam, AdamW, GeneratedFeedback, Rule, State, Update, library, new_state, reference

M, K, N, C = 7, 5, 4, 3
RULES = (SGD(), SGD(momentum=0.9, nesterov=True, weight_decay=0.1), Adam(), AdamW(betas=(0.8, 0.9), eps=1e-6))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calls(rule: Rule, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Every operation with arguments of its own, with and without what is optional."""
    for bias in (True, False):  # without one, there are tensors for numbers, a shadow, and a feedback that is made
        lr, step = (0.1, 3) if bias else (torch.tensor(0.1), torch.tensor(3))
        update = Update(rule, lr, step, seed=5 if dtype == torch.bfloat16 else None)

        def owned(*shape: int, bias: bool = bias) -> tuple[Tensor, Tensor | None, State, State | None]:
            weight, own = random(*shape, seed=1).to(dtype), random(shape[0], seed=2).to(dtype) if bias else None
            shadow = torch.bfloat16 if dtype == torch.float32 and not bias else None
            return weight, own, new_state(weight, rule, 0, shadow), None if own is None else new_state(own, rule, 1)

        x, delta, error, target = (
            random(M, K, seed=3),
            random(M, N, seed=4),
            random(M, C, seed=5),
            random(M, N, seed=6).softmax(-1),
        )
        feedback = random(C, N, seed=7) if bias else GeneratedFeedback("trinomial", C, N, seed=9, amplitude=0.5)
        weight, own, *states = owned(N, K)
        yield "linear_forward", (x, weight.float(), own if own is None else own.float(), "tanh")
        yield "linear_forward", (x, weight.float(), None, "gelu", error, feedback, 0.3)
        yield "outer_product", (delta, x)
        yield "outer_product_update_", (weight, own, delta, x, *states, update)
        weight, own, *states = owned(N, K)
        yield "linear_step_", (x, weight, own, error, feedback, *states, update, "relu", 2.0)
        weight, own, *states = owned(N, K)
        yield "linear_backward_update_", (weight, own, delta, x, *states, update)
        weight, own, *states = owned(N, K)
        yield "head_step_", (x, weight, own, target, "cross-entropy", *states, update, bias)
        yield "output_step", (delta, target, "bce" if bias else "mse", "delayed-error")
        weight, _, state, _ = owned(N, K)
        yield "update_", (weight, random(N, K), state, update)


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors in arguments or results, those of states as well."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, State):
        yield from tensors((value.moments, value.shadow))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_operator_is_the_reference(rule: Rule) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for (name, ours), (_, theirs) in zip(calls(rule, dtype), calls(rule, dtype), strict=True):
            got, wanted = getattr(library, name)(*ours), getattr(reference, name)(*theirs)
            for mine, own in zip(tensors((got, ours)), tensors((wanted, theirs)), strict=True):
                torch.testing.assert_close(mine, own, msg=lambda text, name=name: f"{name}: {text}")


def flat(name: str, arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the operator itself is called with."""
    operator = getattr(torch.ops.f3triton, name).default
    parts: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(type(operator), "__call__", lambda self, *given: parts.extend(given) or [None] * 4)
        getattr(library, name)(*arguments)
    return parts


@pytest.mark.parametrize("rule", [RULES[1], RULES[2]], ids=str)
def test_every_operator_passes_torchs_own_check(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, arguments in calls(rule):
        torch.library.opcheck(getattr(torch.ops.f3triton, name).default, flat(name, arguments, monkeypatch))


def test_autograd_learns_of_a_change() -> None:
    """A gradient through the old weight is refused, as after any in-place operation; `inference_mode` works."""
    weight, rule = random(N, K), SGD()
    loss = (random(M, K).requires_grad_() @ weight.T).sum()
    library.update_(weight, random(N, K), new_state(weight, rule), Update(rule, 0.1, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        weight = random(N, K)
        library.update_(weight, random(N, K), new_state(weight, rule), Update(rule, 0.1, 1))
    assert not torch.equal(weight, random(N, K))


class Layers(nn.Module):
    """A user's own module: two hidden layers that learn as they are visited, and an output that leaves the next error."""

    def __init__(self) -> None:
        super().__init__()
        for n, (rows, columns) in enumerate(((6, 5), (4, 6))):
            self.register_buffer(f"weight{n}", random(rows, columns, seed=n))
            self.register_buffer(f"bias{n}", torch.zeros(rows))
            for name in ("m", "v"):
                self.register_buffer(f"weight{n}_{name}", torch.zeros(rows, columns))
                self.register_buffer(f"bias{n}_{name}", torch.zeros(rows))
            self.register_buffer(f"feedback{n}", random(C, rows, seed=10 + n))
        self.register_buffer("last", random(C, 4, seed=20))

    def forward(
        self, x: Tensor, target: Tensor, error: Tensor, lr: Tensor, step: Tensor, ops: object = library
    ) -> tuple[Tensor, Tensor]:
        update = Update(Adam(), lr, step)
        for n in range(2):
            own = {name: getattr(self, f"{name}{n}") for name in ("weight", "bias", "feedback")}
            states = [State((getattr(self, f"{name}{n}_m"), getattr(self, f"{name}{n}_v"))) for name in ("weight", "bias")]
            x = ops.linear_step_(x, own["weight"], own["bias"], error, own["feedback"], *states, update, "tanh", 0.1)
        a = ops.linear_forward(x, self.last)
        gradient, left, _ = ops.output_step(a, target, "cross-entropy", "delayed-error")
        ops.outer_product_update_(self.last, None, gradient, x, State(()), None, Update(SGD(), lr, step))
        return a, left


def visits(module: nn.Module, model: nn.Module) -> list[Tensor]:
    """Two steps of a module; what it returned, and what the model has become."""
    error, found = torch.zeros(M, C), []
    for step in (1, 2):
        target = torch.eye(C)[torch.arange(M) % C]
        with torch.no_grad():
            a, error = module(random(M, 5, seed=30 + step), target, error, torch.tensor(0.1 / step), torch.tensor(step))
        found += [a, error]
    return found + list(model.state_dict().values())


def by_reference() -> list[Tensor]:
    model = Layers()
    return visits(lambda *given: model(*given, ops=reference), model)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_a_module_of_a_user_compiles_whole(backend: str) -> None:
    torch._dynamo.reset()
    model = Layers()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    for got, wanted in zip(visits(compiled, model), by_reference(), strict=True):
        torch.testing.assert_close(got, wanted)
    with torch._dynamo.config.patch(error_on_recompile=True):  # another rate and step are the same program
        visits(compiled, model)


def test_a_module_of_a_user_is_exported() -> None:
    given = random(M, 5), torch.eye(C)[torch.arange(M) % C], torch.zeros(M, C), torch.tensor(0.1), torch.tensor(1)
    with torch.no_grad():
        program = torch.export.export(Layers(), given)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"f3triton.linear_step_.default", "f3triton.output_step.default"} <= names
    module = program.module()
    for got, wanted in zip(visits(module, Layers())[:4], by_reference()[:4], strict=True):
        torch.testing.assert_close(got, wanted)
