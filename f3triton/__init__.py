"""F3: neural networks trained with no backward pass (feed-forward with delayed feedback, arXiv 2304.13372).

import f3triton as f3
train, test = f3.load_dataset("digits")
model = f3.models.MLP([64, 500, 10], activation="tanh", feedback="trinomial")
f3.Trainer(model, loss="bce", optimizer=f3.Adam(lr=5e-4)).fit(train, epochs=50, test=test)

Names are imported when they are first asked for (PEP 562), so that `import f3triton.kernels` needs torch and triton only.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import kernels, models
    from .base.exceptions import InputError
    from .data import Dataset, load_dataset, load_text, stream_dataset
    from .kernels import SGD, Adam, AdamW
    from .network.block import Block
    from .network.convert import convert
    from .network.feedback import Feedback
    from .network.layers import Layers
    from .network.linear import Linear
    from .network.norm import LayerNorm, RMSNorm
    from .network.sequential import Sequential
    from .network.stage import Stage
    from .run.diagnostics import Diagnostics
    from .run.memory import memory
    from .run.predictor import Predictor, load
    from .run.settings import Settings
    from .run.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Block",
    "Dataset",
    "Diagnostics",
    "Feedback",
    "InputError",
    "LayerNorm",
    "Layers",
    "Linear",
    "Predictor",
    "RMSNorm",
    "Sequential",
    "Settings",
    "Stage",
    "Trainer",
    "convert",
    "kernels",
    "load",
    "load_dataset",
    "load_text",
    "memory",
    "models",
    "stream_dataset",
]

# The module of each name above, as the imports for type checkers have it (a test compares the two).
_MODULES = {
    ".base.exceptions": ("InputError",),
    ".data": ("Dataset", "load_dataset", "load_text", "stream_dataset"),
    ".kernels": ("SGD", "Adam", "AdamW"),
    ".network.block": ("Block",),
    ".network.convert": ("convert",),
    ".network.feedback": ("Feedback",),
    ".network.layers": ("Layers",),
    ".network.linear": ("Linear",),
    ".network.norm": ("LayerNorm", "RMSNorm"),
    ".network.sequential": ("Sequential",),
    ".network.stage": ("Stage",),
    ".run.diagnostics": ("Diagnostics",),
    ".run.memory": ("memory",),
    ".run.predictor": ("Predictor", "load"),
    ".run.settings": ("Settings",),
    ".run.trainer": ("Trainer",),
}


def __getattr__(name: str) -> object:
    if name in ("kernels", "models"):
        return import_module(f".{name}", __name__)
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(module, __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
