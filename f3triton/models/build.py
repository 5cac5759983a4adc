"""Networks by name: from the options of `train.py` and the shapes of a data set to a description, and from that to a network.

A description is a JSON object: `model`, and the arguments of its class. It is stored with a run, and `load` builds the network
from it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Protocol

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..base.schema import ANYTHING, FINITE, FLAG, Either, Fields, Many, Variant, Whole, Word, check, maybe
from ..base.text import short
from ..base.words import (
    EMBEDDINGS,
    FEEDBACK_AT,
    FEEDBACK_SHAPES,
    GRANULARITIES,
    KINDS,
    LANGUAGE_MODELING,
    LAYERS,
    OPTIONS,
    POOLS,
)
from ..kernels.words import ACTIVATIONS
from ..network.feedback import Feedback
from ..network.linear import NORMS as LINEAR_NORMS
from ..network.sequential import Sequential
from .convnet import NORMS as CONV_NORMS
from .convnet import ConvNet
from .gpt import GPT
from .mlp import MLP
from .transformer import NORMS
from .vit import ViT

MODELS: dict[str, type[Sequential]] = dict(zip(KINDS, (MLP, ViT, ConvNet, GPT), strict=True))

_SIZE, _LAW = Whole(1), Word(FEEDBACK_SHAPES)
_LOCAL = {
    "reading": Whole(),
    "exits": Fields({"shapes": Many(Many(_SIZE, 1, 3), 0, LAYERS), "outputs": _SIZE, "positions": _SIZE, "depth": Whole()}),
}
_ANY = {"model": Word(KINDS), "activation": Word(ACTIVATIONS), "feedback_shape": _LAW, **_LOCAL}
_BLOCKS = {"depth": Whole(1, LAYERS), "heads": _SIZE, "dim": _SIZE, "head_dim": maybe(_SIZE), "mlp_width": maybe(_SIZE),
           "dropout": FINITE, "granularity": Word(GRANULARITIES), **_ANY}  # fmt: skip
_GPT_HAS = {"tied": FLAG, "feedback_at": Word(FEEDBACK_AT), **_BLOCKS}
_VIT_HAS = {"patch_size": _SIZE, "embedding": Word(EMBEDDINGS), "positions": FLAG, "pool": Word(POOLS),
            "norm": Word(tuple(NORMS)), **_BLOCKS}  # fmt: skip
_CONV_HAS = {"channels": Many(_SIZE, 1, LAYERS), "kernel_size": _SIZE, "hidden": Many(_SIZE, 0, LAYERS),
             "norm": Word(CONV_NORMS), **_ANY}  # fmt: skip
# What a description may hold: what it needs, and what else its class takes.
NETWORK = Variant("model", {
    "mlp": Fields({"sizes": Many(_SIZE, 2, LAYERS)}, {"bias": FLAG, "norm": Word(LINEAR_NORMS), "residual": FLAG, **_ANY}),
    "vit": Fields({"image_size": Either((_SIZE, Many(_SIZE, 2, 2))), "channels": _SIZE, "classes": _SIZE}, _VIT_HAS),
    "gpt": Fields({"vocabulary": Whole(2), "context": Whole(2)}, _GPT_HAS),
    "convnet": Fields({"image": Many(_SIZE, 3, 3), "classes": _SIZE}, _CONV_HAS),
})  # fmt: skip
_NOT_SETTINGS = {"model", *_LOCAL}


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
    check(NETWORK, description, "network")
    kind = description["model"]
    settings = {name: value for name, value in description.items() if name not in _NOT_SETTINGS}
    try:
        network = MODELS[kind](**settings, feedback=feedback)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        if "allocate memory" in str(error):
            raise MemoryError from None
        reason = short((str(error).splitlines() or [""])[0], 200)[1:-1]
        raise InputError(f"the network {kind!r} cannot be built from {short(settings, 200)}: {reason}") from None
    add_readings(network, description)
    return network


def add_readings(network: Sequential, description: Mapping[str, object]) -> None:
    """The heads, or the shared reading, of a network that has learned from local errors. Raises InputError for a description
    that is not of the form that `Sequential.readings` gives."""
    heads, hidden = description.get("exits"), len(network.stages) - 1
    check(Whole(0, hidden), description.get("reading", 0), "network.reading")
    network.reading = description.get("reading", 0)
    if heads is None:
        return
    check(Many(ANYTHING, hidden, hidden), heads["shapes"], "network.exits.shapes")
    check(Whole(0, 10 * LAYERS // max(hidden, 1)), heads["depth"], "network.exits.depth")
    network.add_heads(**heads)
