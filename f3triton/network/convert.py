"""Somebody's model as an F3 model: cut into stages, with no change to its code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from ..base.exceptions import InputError
from ..base.seeds import derived_seed
from .block import Block
from .feedback import Feedback
from .linear import Linear
from .sequential import Sequential

ACTIVATION_MODULES = {nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.ReLU: "relu", nn.SiLU: "silu"}


def convert(
    model: nn.Module,
    example_input: Tensor,
    cut: Sequence[str] | None = None,
    *,
    feedback: str | Feedback = "trinomial",
    feedback_shape: str = "full",
) -> Sequential:
    """`model` as a `Sequential` of stages that share its parameters and buffers: training the one trains the other.

    A stage ends after each of the submodules that `cut` names (as in `model.named_modules()`), the last stage at the output.
    Without `cut`, `model` must be an `nn.Sequential`, and each of its children with a linear or convolution layer begins one.
    Stages of one `nn.Linear`, perhaps with an activation, become `Linear`s; the others `Block`s.

    `example_input [batch, ...]` is run through both, in eval mode, and the results compared. Raises InputError where the model
    cannot be cut, and says where: a value that crosses a cut, a parameter used on both sides, control flow on values, `forward`
    that does another thing in training than modules do by themselves.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"convert needs an nn.Module, got a {type(model).__name__}")
    parts = _children(model) if cut is None else _traced(model, list(cut))
    stages = [_stage(part, feedback, feedback_shape) for part in parts]
    converted = Sequential(*stages)
    was = model.training
    with torch.no_grad():
        model.eval(), converted.eval()
        expected, found = model(example_input), converted(example_input)
        model.train(was), converted.train(was)
    if not isinstance(expected, Tensor):
        raise InputError(f"{type(model).__name__} returns a {type(expected).__name__}; a model must return one tensor")
    if expected.shape != found.shape or not torch.allclose(expected, found, rtol=1e-4, atol=1e-5):
        raise InputError(f"the stages of {type(model).__name__} do not give what it gives; its forward cannot be cut there")
    outputs = expected.shape[-1]
    converted.prepare(example_input[:1], outputs, derived_seed(0, "convert"), expected.shape[1:-1].numel())
    return converted


def _children(model: nn.Module) -> list[list[nn.Module]]:
    """The children of an `nn.Sequential` by stage."""
    if not isinstance(model, nn.Sequential):
        raise InputError(f"{type(model).__name__} is no nn.Sequential; name the submodules after which to cut it: cut=[...]")
    parts: list[list[nn.Module]] = []
    for child in model:
        heavy = any(p.dim() > 1 for p in child.parameters())
        begun = parts and any(p.dim() > 1 for module in parts[-1] for p in module.parameters())
        if not parts or (heavy and begun):
            parts.append([])
        parts[-1].append(child)
    if not parts:
        raise InputError("convert needs a model with at least one submodule, got an empty nn.Sequential")
    return parts


class _Tracer(fx.Tracer):
    """Looks into a module only where there is a cut inside it."""

    def __init__(self, cuts: list[str]) -> None:
        super().__init__()
        self.cuts = cuts

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not any(cut.startswith(f"{name}.") for cut in self.cuts)


def _graph(model: nn.Module, cuts: list[str]) -> fx.Graph:
    try:
        return _Tracer(cuts).trace(model)
    except Exception as error:  # whatever somebody's forward does with a stand-in for a tensor
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the forward of {type(model).__name__} cannot be followed: {reason}") from None


def _traced(model: nn.Module, cuts: list[str]) -> list[list[nn.Module]]:
    """The model's graph, split after each cut."""
    names = {name for name, _ in model.named_modules()} - {""}
    unknown = [cut for cut in cuts if cut not in names]
    if unknown:
        raise InputError(f"cut {unknown[0]!r} is no submodule of {type(model).__name__}; it has: {', '.join(sorted(names))}")
    was = model.training
    graphs = {mode: _graph(model.train(mode), cuts) for mode in (True, False)}
    model.train(was)
    described = [
        [(n.name, n.op, str(n.target), repr(n.args), repr(n.kwargs)) for n in graphs[mode].nodes] for mode in (True, False)
    ]
    if described[0] != described[1]:
        first = next((one for one, other in zip(*described, strict=False) if one != other), described[0][-1])
        raise InputError(
            f"{first[0]!r} does another thing in training than in evaluation; use a module such as nn.Dropout for it"
        )
    graph = graphs[True]
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(result, fx.Node):
        raise InputError(f"{type(model).__name__} returns a {type(result).__name__}; a model must return one tensor")
    stage_of, number, boundaries, called = {}, 0, [], []
    for node in graph.nodes:
        stage_of[node] = number
        if node.op == "call_module" and node.target in cuts:
            called.append(node.target)
            boundaries.append(node)
            number += 1
    missing = [cut for cut in cuts if cut not in called]
    if missing:
        raise InputError(f"cut {missing[0]!r} is never called by the forward of {type(model).__name__}")
    repeated = [cut for cut in cuts if called.count(cut) > 1]
    if repeated:
        raise InputError(
            f"cut {repeated[0]!r} is called {called.count(repeated[0])} times in one pass; cut at one that is called once"
        )
    for node in graph.nodes:
        for source in node.all_input_nodes:
            crossing = stage_of[node] - stage_of[source] if source.op != "get_attr" else 0
            allowed = crossing == 0 or (crossing == 1 and source is boundaries[stage_of[source]])
            if node.op == "output" and stage_of[source] < stage_of[node] and source is boundaries[-1]:
                raise InputError(
                    f"nothing comes after the cut {boundaries[-1].target!r}; leave it out: the last stage ends at the output"
                )
            if not allowed:
                where = boundaries[stage_of[source]].target
                raise InputError(
                    f"{source.name!r} is used by {node.name!r} across the cut after {where!r}; only the value of the submodule "
                    "that is cut at may go on"
                )
    return [[part] for part in _split(model, graph, stage_of, boundaries, result)]


def _split(
    model: nn.Module, graph: fx.Graph, stage_of: dict[fx.Node, int], boundaries: list[fx.Node], result: fx.Node
) -> list[nn.Module]:
    """A module for each stage, over the model's own submodules and parameters."""
    parts = []
    for number in range(len(boundaries) + 1):
        part: fx.Graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        if number:
            copied[boundaries[number - 1]] = part.placeholder("x")
        for node in graph.nodes:
            own = any(stage_of[user] == number for user in node.users) if node.op == "get_attr" else stage_of[node] == number
            if own and node.op != "output":
                copied[node] = part.node_copy(node, copied.__getitem__)
        last = number == len(boundaries)
        part.output(copied[result if last else boundaries[number]])
        parts.append(fx.GraphModule(model, part, f"{type(model).__name__}Part{number}"))
    return parts


def _stage(part: list[nn.Module], feedback: str | Feedback, feedback_shape: str) -> Linear | Block:
    first, rest = part[0], part[1:]
    if type(first) is nn.Linear and len(rest) <= 1 and all(type(module) in ACTIVATION_MODULES for module in rest):
        return _linear(first, ACTIVATION_MODULES[type(rest[0])] if rest else "identity", feedback)
    module = part[0] if len(part) == 1 else nn.Sequential(*part)
    return Block(module, feedback, feedback_shape)


def _linear(layer: nn.Linear, activation: str, feedback: str | Feedback) -> Linear:
    """The same layer, by the same parameters."""
    made = Linear(layer.in_features, layer.out_features, activation, feedback, layer.bias is not None)
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)
