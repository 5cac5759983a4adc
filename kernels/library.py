"""The operations as `torch.library` operators, `torch.ops.f3triton.*`, for programs that are compiled or exported.

The functions here have the names and arguments of `reference`, and torch.compile, torch.export and the profiler see one
operator in each: what it changes is declared, and what it returns is known without running it. On CUDA and ROCm an operator is
the Triton kernel, where triton can be imported; everywhere else it is `eager`. A call of an operator costs the host 40
(`linear_forward`) to 140 (`linear_step_`) microseconds more than one of those, so a program that is not compiled calls them
directly, as f3triton's own does.

A schema knows tensors, numbers and words, so structured arguments are taken apart, field by field: see `_parts`. `lr` and
`step` may be tensors; a compiled program should have them so, for of numbers it makes constants. Nothing here enters autograd:
call it without gradients, as under `torch.no_grad`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import wraps
from inspect import signature
from types import ModuleType

import torch
from torch import Tensor

from . import eager, reference
from .generated import GeneratedFeedback
from .rules import SGD, Adam, AdamW, Rule, State, Update

# A copy of this folder, as from a kernel hub, may be loaded beside the package: it has operators of its own.
NAMESPACE = "".join(c if c.isalnum() else "_" for c in (__package__ or "").removesuffix(".kernels"))
RULES = {rule.__name__: rule for rule in (SGD, Adam, AdamW)}
# the fields of what is taken apart, and their annotations; here, for a compiler cannot look into `dataclasses.fields`
FIELDS = {kind.__name__: {field.name: field.type for field in fields(kind)} for kind in (State, Update, *RULES.values())}


# --- arguments, taken apart and put together --------------------------------------------------------------------------


def _parts(name: str, kind: str) -> list[tuple[str, str]]:
    """`(name, type in a schema)` of each argument that stands for one of this annotation; `(!)` is what may be changed."""
    if kind.startswith("State"):
        return [part for own, field in FIELDS["State"].items() for part in _parts(f"{name}_{own}", f"changed {field}")]
    if kind == "Update":
        return [part for own, field in FIELDS["Update"].items() for part in _parts(own, field)]
    if kind == "Rule":
        return [(name, "str"), (f"{name}_settings", "float[]")]
    if "GeneratedFeedback" in kind:
        return [(name, "Tensor?"), (f"{name}_kind", "str?"), (f"{name}_sizes", "int[]"), (f"{name}_amplitude", "float")]
    if kind in ("float | Tensor", "int | Tensor"):
        return [(name, kind.split()[0]), (f"{name}_tensor", "Tensor?")]
    changed, plain = "(!)" * kind.startswith("changed "), kind.removeprefix("changed ")
    types = {"Moments": f"Tensor{changed}[]", "Tensor": f"Tensor{changed}"}
    base = plain.removesuffix(" | None")
    return [(name, types.get(base, base) + "?" * plain.endswith(" | None"))]


def _take_apart(kind: str, value: object) -> list[object]:
    """The arguments of `_parts` for a value."""
    if kind.startswith("State"):
        value = State(()) if value is None else value
        return [list(value.moments) if own == "moments" else getattr(value, own) for own in FIELDS["State"]]
    if kind == "Update":
        return [part for own, field in FIELDS["Update"].items() for part in _take_apart(field, getattr(value, own))]
    if kind == "Rule":
        name = type(value).__name__
        settings = [getattr(value, own) for own in FIELDS[name]]
        return [name, [float(x) for s in settings for x in (s if isinstance(s, tuple) else (s,))]]
    if "GeneratedFeedback" in kind:
        if isinstance(value, GeneratedFeedback):
            return [None, value.kind, [value.outputs, value.units, value.seed], value.amplitude]
        return [value, None, [], 1.0]
    if kind in ("float | Tensor", "int | Tensor"):
        return [0, value] if isinstance(value, Tensor) else [value, None]
    return [value]


def _put_together(kind: str, flat: Iterator[object]) -> object:
    """The value from the arguments of `_parts`."""
    if kind.startswith("State"):
        moments, *others = (next(flat) for _ in FIELDS["State"])
        return State(tuple(moments), *others)
    if kind == "Update":
        return Update(*[_put_together(field, flat) for field in FIELDS["Update"].values()])
    if kind == "Rule":
        return _rule(next(flat), next(flat))
    if "GeneratedFeedback" in kind:
        tensor, law, sizes, amplitude = (next(flat) for _ in range(4))
        return tensor if law is None else GeneratedFeedback(law, *sizes, amplitude)
    value = next(flat)
    if kind in ("float | Tensor", "int | Tensor"):
        tensor = next(flat)
        return value if tensor is None else tensor
    return value


def _rule(name: str, settings: list[float]) -> Rule:
    if name == "SGD":
        lr, momentum, nesterov, decay = settings
        return SGD(lr, momentum, bool(nesterov), decay)
    lr, beta1, beta2, eps, decay = settings
    return RULES[name](lr, (beta1, beta2), eps, decay)


# --- what an operator returns: the same on every device ---------------------------------------------------------------

_wide = {torch.float64: torch.float64}


def _figures(a: Tensor, target: Tensor, loss: str, found: tuple) -> tuple[Tensor, ...]:
    gradient, error, figures = found
    losses, hits = figures or (reference.losses_of(a, target, loss), reference.hits_of(a, target))
    return gradient.to(a.dtype), error.to(a.dtype), losses.to(_wide.get(a.dtype, torch.float32)), hits


def _like(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape)


# operation: (returns in its schema, their shapes from named arguments)
RETURNS: dict[str, tuple[str, Callable[..., object]]] = {
    "linear_forward": (
        "Tensor[]",
        lambda x, weight, error, **_: [_like(x, len(x), len(weight)) for _ in range(1 if error is None else 2)],
    ),
    "outer_product": (
        "(Tensor, Tensor)",
        lambda delta, x, **_: (
            x.new_empty((delta.shape[1], x.shape[1]), dtype=_wide.get(x.dtype, torch.float32)),
            x.new_empty((delta.shape[1],), dtype=_wide.get(x.dtype, torch.float32)),
        ),
    ),
    "outer_product_update_": ("()", lambda **_: None),
    "linear_step_": ("Tensor", lambda x, weight, **_: _like(x, len(x), len(weight))),
    "linear_backward_update_": ("Tensor", lambda delta, x, **_: _like(delta, *x.shape)),
    "head_step_": ("Tensor", lambda h, **_: _like(h, *h.shape)),
    "output_step": (
        "(Tensor, Tensor, Tensor, Tensor)",
        lambda a, **_: (
            _like(a, *a.shape),
            _like(a, *a.shape),
            a.new_empty(len(a), dtype=_wide.get(a.dtype, torch.float32)),
            a.new_empty(len(a), dtype=torch.bool),
        ),
    ),
    "update_": ("()", lambda **_: None),
}


# --- the operators ----------------------------------------------------------------------------------------------------

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _backend(device: torch.device) -> ModuleType:
    """Triton's operations on CUDA and ROCm, if it can be imported; else those of torch."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return eager
    return importlib.import_module(".gpu.ops", __package__)


def _mark(changed: Iterable[object]) -> None:
    """Autograd is told that these were changed, so that it refuses to differentiate with their old values."""
    found = [part for value in changed for part in (value if isinstance(value, list) else [value])]
    torch.autograd.graph.increment_version([t for t in found if t is not None and not t.is_inference()])


def _operator(name: str) -> Callable[..., object]:
    """Defines the operator, and returns the function that calls it with the arguments of `reference`."""
    specification = getattr(reference, name)
    parameters = signature(specification).parameters.values()
    kinds = {p.name: p.annotation for p in parameters}
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    returns, shapes = RETURNS[name]
    if name.endswith("_"):
        kinds |= {n: f"changed {kind}" for n, kind in kinds.items() if n in ("weight", "bias", "parameter")}
    flat = [part for n, kind in kinds.items() for part in _parts(n, kind)]
    changed = [place for place, (_, kind) in enumerate(flat) if "(!)" in kind]
    words = ", ".join(f"{kind.replace('(!)', f'(a{place}!)')} {n}" for place, (n, kind) in enumerate(flat))

    def named(arguments: tuple[object, ...]) -> dict[str, object]:
        rest = iter(arguments)
        return {n: _put_together(kind, rest) for n, kind in kinds.items()}

    def run(*arguments: object) -> object:
        given = named(arguments)
        first = next(iter(given.values()))
        found = getattr(_backend(first.device), name)(*given.values())
        if changed:
            _mark(arguments[place] for place in changed)
        if name == "output_step":
            return _figures(given["a"], given["target"], given["loss"], found)
        if name == "outer_product":
            return tuple(gradient.to(_wide.get(gradient.dtype, torch.float32)) for gradient in found)
        return [found] if isinstance(found, Tensor) and returns == "Tensor[]" else found

    _library.define(f"{name}({words}) -> {returns}")
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *arguments: shapes(**named(arguments)), lib=_library)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    many = returns == "Tensor[]"

    @wraps(specification)
    def call(*arguments: object, **by_name: object) -> object:
        given = defaults | dict(zip(kinds, arguments, strict=False)) | by_name
        found = overload(*[part for n, kind in kinds.items() for part in _take_apart(kind, given[n])])
        if many:
            return found[0] if len(found) == 1 else tuple(found)
        return (found[0], found[1], (found[2], found[3])) if name == "output_step" else found

    return call


for _name in RETURNS:
    globals()[_name] = _operator(_name)
