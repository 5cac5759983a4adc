"""Networks by name: from the options of `train.py` and the shapes of a data set to a description, and from that to a network.

A description is a JSON object: `model`, and the arguments of its class. It is stored with a run, and `load` builds the network
from it again.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import Protocol

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..data.targets import LANGUAGE_MODELING
from ..network.feedback import Feedback
from ..network.sequential import Sequential
from .convnet import ConvNet
from .gpt import GPT
from .mlp import MLP
from .vit import ViT

MODELS: dict[str, type[Sequential]] = {"mlp": MLP, "vit": ViT, "convnet": ConvNet, "gpt": GPT}
# The options that each kind of network has beside `activation`, and their values where they are not given.
_TRANSFORMER = {"depth": 4, "heads": 8, "dim": 32, "head_dim": None, "mlp_width": 128, "dropout": 0.0, "granularity": "block"}
_GPT = {"heads": 4, "dim": 128, "mlp_width": None, "tied": False, "feedback_shape": "shared", "feedback_at": "normalised"}
_VIT = {"patch_size": 7, "embedding": "joint", "position_embedding": False, "pool": "flatten", "norm": "layer"}
OPTIONS: dict[str, dict[str, object]] = {
    "mlp": {"hidden": [500], "feedback_shape": "full", "norm": None, "residual": False},
    "vit": {**_TRANSFORMER, **_VIT, "feedback_shape": "full"},
    "gpt": {**_TRANSFORMER, **_GPT},
    "convnet": {"channels": [32], "kernel_size": 5, "hidden": [1000], "feedback_shape": "full"},
}
HEADS = {"shapes", "outputs", "positions", "depth"}
LARGEST = 1 << 40  # of any number in a description


class Samples(Protocol):
    """What a description takes from a data set, such as a `Dataset`: its name, its task, and the sizes of a sample."""

    name: str
    task: str
    shape: tuple[int, ...]  # of a sample's input
    in_features: int  # the product of that
    outputs: int  # values of a prediction
    positions: int  # predictions a sample


def describe(
    model: str, data: Samples, given: Mapping[str, object], activation: str | None = None, local: bool = False
) -> dict[str, object]:
    """The description of a network for a data set. `given` are options of train.py by name; those that are None are not given.
    `local`: it will learn from local errors, for which an MLP has other defaults (relu and a normalisation).

    Raises InputError for an unknown model, an option that it does not have, or data that it cannot take.
    """
    check_word("model", model, MODELS)
    options = dict(OPTIONS[model])
    for name, value in given.items():
        if value is None:
            continue
        if name not in options:
            others = ", ".join(kind for kind, its in OPTIONS.items() if name in its)
            raise InputError(f"--{name.replace('_', '-')} has no effect with --model {model}; it belongs to {others}")
        options[name] = value
    act = {} if activation is None else {"activation": activation}
    if (data.task == LANGUAGE_MODELING) != (model == "gpt"):
        allowed = "gpt" if data.task == LANGUAGE_MODELING else ", ".join(kind for kind in MODELS if kind != "gpt")
        raise InputError(f"model {model!r} does not go with the task {data.task} of {data.name!r}; allowed: {allowed}")
    if model == "gpt":
        sizes = {"vocabulary": data.outputs, "context": data.positions}
        return {"model": model, **sizes, "activation": "gelu", **options} | act
    if model == "mlp":
        sizes = [data.in_features, *options["hidden"], data.outputs]
        if options["feedback_shape"].startswith("shared"):
            raise InputError(
                f"feedback shape {options['feedback_shape']!r} has no effect with --model mlp, whose layers have no tokens or "
                "pixels that could share it; allowed: full, generated"
            )
        if options["residual"] and not any(a == b for a, b in pairwise(sizes[:-1])):
            raise InputError(
                f"--residual has no effect in an mlp of the sizes {sizes}, where no hidden layer has its input's size"
            )
        norm = options["norm"] or ("layer" if local else "none")
        more = {"norm": norm} if norm != "none" else {}
        return {
            "model": model,
            "sizes": sizes,
            "activation": "relu" if local else "tanh",
            "bias": True,
            "feedback_shape": options["feedback_shape"],
            **more,
            **({"residual": True} if options["residual"] else {}),
        } | act
    shape = data.shape
    if len(shape) != 3:
        raise InputError(
            f"model {model!r} needs images, but data set {data.name!r} has rows of shape {list(shape)}; use --model mlp"
        )
    if model == "convnet":
        return {"model": model, "image": list(shape), "classes": data.outputs, "activation": "tanh", **options} | act
    options["positions"] = options.pop("position_embedding")
    sizes = {"image_size": list(shape[1:]), "channels": shape[0], "classes": data.outputs}
    return {"model": model, **sizes, "activation": "tanh", **options} | act


def build(description: Mapping[str, object], feedback: str | Feedback = "trinomial") -> Sequential:
    """The network of a description. Raises InputError for one that is not of the form that `describe` gives,
    MemoryError where there is not enough.
    """
    kind = description.get("model")
    if kind not in MODELS:
        raise InputError(f"the network {kind!r} cannot be built; known: {', '.join(MODELS)}")
    settings = {name: value for name, value in description.items() if name not in ("model", "exits", "reading")}
    known = inspect.signature(MODELS[kind]).parameters
    for name, value in settings.items():
        if name not in known or name in ("feedback", "seed"):
            raise InputError(f"the network {kind!r} has no {name!r}; it has: {', '.join(known)}")
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int | float | str | bool | None) or (isinstance(number, int) and abs(number) > LARGEST):
                raise InputError(
                    f"{name} of the network {kind!r} is {value!r}; allowed: numbers up to {LARGEST}, words, lists of them"
                )
    if settings.get("depth") is not None and not 1 <= settings["depth"] <= 10_000:
        raise InputError(f"depth of the network {kind!r} is {settings['depth']}; allowed: 1 to 10000")
    try:
        network = MODELS[kind](**settings, feedback=feedback)
    except (TypeError, RuntimeError) as error:
        if "allocate memory" in str(error):
            raise MemoryError from None
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"the network {kind!r} cannot be built from {settings}: {reason}") from None
    add_readings(network, description)
    return network


def add_readings(network: Sequential, description: Mapping[str, object]) -> None:
    """The heads, or the shared reading, of a network that has learned from local errors. Raises InputError for a description
    that is not of the form that `Sequential.readings` gives."""
    heads, reading, hidden = description.get("exits"), description.get("reading", 0), len(network.stages) - 1
    if not isinstance(reading, int) or not 0 <= reading <= hidden:
        raise InputError(f"reading of the network is {reading!r}; allowed: whole numbers from 0 to {hidden}")
    network.reading = reading
    if heads is None:
        return

    def whole(value: object, low: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= LARGEST

    shapes = heads.get("shapes") if isinstance(heads, dict) and set(heads) == HEADS else None
    fits = (
        isinstance(shapes, list)
        and len(shapes) == hidden
        and all(isinstance(shape, list) and 1 <= len(shape) <= 3 and all(whole(size, 1) for size in shape) for shape in shapes)
    )
    if not fits or not (whole(heads["outputs"], 1) and whole(heads["positions"], 1) and whole(heads["depth"], 0)):
        raise InputError(f"exits of the network are {str(heads)[:80]!r}; needed: {', '.join(sorted(HEADS))} of {hidden} stages")
    network.add_heads(**heads)
