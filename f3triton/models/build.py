"""Networks by name: from the options of `train.py` and the shapes of a data set to a description, and from that to a network.

A description is a JSON object: `model`, and the arguments of its class. It is stored with a run, and `load` builds the network
from it again.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..data.targets import LANGUAGE_MODELING
from ..network.feedback import Feedback
from ..network.sequential import Sequential
from .convnet import ConvNet
from .gpt import GPT
from .mlp import MLP
from .vit import ViT

if TYPE_CHECKING:
    from ..data import Dataset

MODELS: dict[str, type[Sequential]] = {"mlp": MLP, "vit": ViT, "convnet": ConvNet, "gpt": GPT}
# The options that each kind of network has beside `activation`, and their values where they are not given.
_TRANSFORMER = {"depth": 4, "heads": 8, "dim": 32, "head_dim": None, "mlp_width": 128, "dropout": 0.0, "granularity": "block"}
_GPT = {"heads": 4, "dim": 128, "mlp_width": None, "tied": False, "feedback_shape": "shared", "feedback_at": "normalised"}
_VIT = {"patch_size": 7, "embedding": "joint", "position_embedding": False, "pool": "flatten", "norm": "layer"}
OPTIONS: dict[str, dict[str, object]] = {
    "mlp": {"hidden": [500], "feedback_shape": "full"},
    "vit": {**_TRANSFORMER, **_VIT, "feedback_shape": "full"},
    "gpt": {**_TRANSFORMER, **_GPT},
    "convnet": {"channels": [32], "kernel_size": 5, "hidden": [1000], "feedback_shape": "full"},
}
LARGEST = 1 << 40  # of any number in a description


def describe(model: str, data: Dataset, given: Mapping[str, object], activation: str | None = None) -> dict[str, object]:
    """The description of a network for a data set. `given` are options of train.py by name; those that are None are not given.

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
        return {
            "model": model,
            "sizes": [data.in_features, *options["hidden"], data.outputs],
            "activation": "tanh",
            "bias": True,
            "feedback_shape": options["feedback_shape"],
        } | act
    shape = data.preprocessing.shape
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
    settings = {name: value for name, value in description.items() if name != "model"}
    known = inspect.signature(MODELS[kind]).parameters
    for name, value in settings.items():
        if name not in known or name == "feedback":
            raise InputError(f"the network {kind!r} has no {name!r}; it has: {', '.join(known)}")
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int | float | str | bool | None) or (isinstance(number, int) and abs(number) > LARGEST):
                raise InputError(
                    f"{name} of the network {kind!r} is {value!r}; allowed: numbers up to {LARGEST}, words, lists of them"
                )
    if settings.get("depth") is not None and not 1 <= settings["depth"] <= 10_000:
        raise InputError(f"depth of the network {kind!r} is {settings['depth']}; allowed: 1 to 10000")
    try:
        return MODELS[kind](**settings, feedback=feedback)
    except (TypeError, RuntimeError) as error:
        if "allocate memory" in str(error):
            raise MemoryError from None
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"the network {kind!r} cannot be built from {settings}: {reason}") from None
