"""F3: neural networks trained with no backward pass (feed-forward with delayed feedback, arXiv 2304.13372).

import f3triton as f3
train, test = f3.load_dataset("digits")
model = f3.models.MLP([64, 500, 10], activation="tanh", feedback="trinomial")
f3.Trainer(model, loss="bce", optimizer=f3.Adam(lr=5e-4)).fit(train, epochs=50, test=test)
"""

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
from .run.predictor import Predictor, load
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
    "Stage",
    "Trainer",
    "convert",
    "kernels",
    "load",
    "load_dataset",
    "load_text",
    "models",
    "stream_dataset",
]
