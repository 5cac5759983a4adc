"""A trained network as a plain module: raw rows in, predictions out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .data import Preprocessing
from .exceptions import InputError
from .kernels.reference import LOSSES, prediction_of
from .runs import build_network, load_weights, read_json


class Predictor(nn.Module):
    """What a run learned, for use: `forward` takes raw inputs and gives predictions.

    Raw inputs are what the data set holds before any preparation: a tensor of images `[N, ...]` with values 0..255, a
    tensor of a table's columns `[N, columns]` if all are numbers, or rows (a list of dicts, a dict of columns, a data
    frame, a `datasets` data set). `forward` gives probabilities `[N, classes]`, or values `[N, targets]` in the targets'
    own units; `predict` gives class names or numbers.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, loss: str) -> None:
        super().__init__()
        self.network, self.preprocessing, self.loss = network, preprocessing, loss

    def forward(self, rows: object) -> Tensor:
        like = next(self.network.parameters())
        names = [column.name for column in self.preprocessing.columns]
        if names and isinstance(rows, Tensor) and rows.ndim == 2 and rows.shape[1] == len(names):
            rows = {name: rows[:, i].tolist() for i, name in enumerate(names)}
        x = self.preprocessing.normalise(self.preprocessing.encode(rows).to(like.device), like.dtype)  # [N, K]
        output = prediction_of(self.network(x), self.loss)
        return self.preprocessing.unstandardise(output) if self.loss == "mse" else output

    @torch.no_grad()
    def predict(self, rows: object) -> list:
        """Class names, or numbers (lists of numbers where there are several targets), one a row."""
        output = self(rows)
        names = self.preprocessing.target_names
        if self.loss != "mse":
            return [names[i] for i in output.argmax(-1).tolist()]
        return output.squeeze(-1).tolist() if output.shape[-1] == 1 else output.tolist()


def load(folder: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """The model that a run left in its folder, in eval mode. Raises InputError where the folder holds none.

    Only JSON and safetensors are read, and every size is checked before it is used.
    """
    folder = Path(folder).expanduser()
    config = read_json(folder, "config.json")
    if config.get("loss") not in LOSSES or not isinstance(config.get("network"), dict):
        raise InputError(f"{str(folder / 'config.json')!r} is not a run's configuration: it needs 'loss' and 'network'")
    network = build_network(config["network"])
    load_weights(network, folder / "model.safetensors")
    for parameter in network.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    preprocessing = Preprocessing.from_json(config.get("preprocessing"))
    return Predictor(network, preprocessing, config["loss"]).to(device).eval()
