"""Trajectories of the authors' own code in float64: same start, same batches, same end, or it is not F3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import f3triton as f3

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
MLP_FILES = sorted(GOLDEN.glob("given-mlp-*.safetensors"))
VIT_FILES = sorted(GOLDEN.glob("given-vit-*.safetensors"))

# The authors' names for a signal, and ours.
SIGNALS = {
    "delayed_error": {"signal": "delayed-error", "link": "identity"},
    "delayed_loss": {"signal": "delayed-loss"},
    "one_hot_target": {"signal": "target"},
    "current_error": {"method": "dfa", "link": "identity"},
}
LOSSES = {"bce": "bce", "mse": "mse", "cross_entropy": "cross-entropy"}


def settings(meta: dict) -> dict:
    """Trainer settings for a trajectory's metadata."""
    if meta["mode"] != "f3":
        return {"method": {"bp": "bp", "llo": "last-layer"}[meta["mode"]]}
    name = meta["signal"]
    mask, name = name.endswith("_one_hot"), name.removesuffix("_one_hot")
    for link in ("softmax", "sigmoid"):
        if name.endswith(f"_{link}"):
            return {**SIGNALS[name.removesuffix(f"_{link}")], "link": link, "mask_target": mask}
    return {**SIGNALS[name], "mask_target": mask}


def position(name: str) -> list[int]:
    """Blocks and feedback alternate in `layers.N`: sort by number, so that layer 10 comes after layer 9."""
    return [int(part) for part in name.split(".") if part.isdigit()]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max())


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(metadata, tensors) of a trajectory."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["meta"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def trained(model: f3.Sequential, meta: dict, tensors: dict[str, torch.Tensor]) -> f3.Trainer:
    """The trajectory, through the public interface."""
    rule = {"adam": f3.Adam, "sgd": f3.SGD}[meta["optimizer"]](lr=meta["lr"])
    trainer = f3.Trainer(
        model, LOSSES[meta["loss"]], rule, **settings(meta), lr_schedule="constant", precision="float64", device="cpu"
    )
    per_epoch = len(tensors["batches"]) // meta["epochs"]

    def batches(epoch: int) -> list[torch.Tensor]:
        rows = tensors["batches"][epoch * per_epoch : (epoch + 1) * per_epoch]
        return [row[row >= 0] for row in rows]

    trainer.fit((tensors["x"], tensors["y"]), meta["epochs"], batches=batches)
    return trainer


@pytest.mark.skipif(not MLP_FILES, reason="the golden trajectories are not here")
@pytest.mark.parametrize("path", MLP_FILES, ids=lambda path: getattr(path, "stem", "none"))
def test_mlp_trajectory(path: Path) -> None:
    meta, tensors = read(path)
    names = sorted({key.removeprefix("init.").rsplit(".", 1)[0] for key in tensors if key.startswith("init.")}, key=position)
    blocks = [name for name in names if f"init.{name}.weight" in tensors]
    feedback = [tensors[f"init.{name}.feedback_weight"] for name in names if f"init.{name}.feedback_weight" in tensors]

    weights = [tensors[f"init.{name}.weight"] for name in blocks]
    sizes = [weights[0].shape[1], *(weight.shape[0] for weight in weights)]
    model = f3.models.MLP(sizes, activation="tanh", feedback=feedback or "trinomial").double()
    for stage, name in zip(model.stages, blocks, strict=True):
        stage.load_state_dict({"weight": tensors[f"init.{name}.weight"], "bias": tensors[f"init.{name}.bias"]})
    trainer = trained(model, meta, tensors)
    for stage, name in zip(model.stages, blocks, strict=True):
        assert relative(stage.weight, tensors[f"final.{name}.weight"]) < 1e-9, name
        assert relative(stage.bias, tensors[f"final.{name}.bias"]) < 1e-9, name
    if "final.errors" in tensors:
        assert relative(trainer.learner.store.rows, tensors["final.errors"]) < 1e-9
    with torch.no_grad():
        output = f3.kernels.reference.output_of(model.eval()(tensors["x"]), LOSSES[meta["loss"]])
    assert relative(output, tensors["final.output"]) < 1e-9


# The authors' names inside a transformer block, and ours.
VIT_NAMES = {
    "norm1": "layer_norm1",
    "attention.qkv": "attention.to_qkv",
    "attention.out": "attention.to_out.0",
    "norm2": "layer_norm2",
    "rise": "mlp.linear1",
    "fall": "mlp.linear2",
}


@pytest.mark.skipif(not VIT_FILES, reason="the golden trajectories are not here")
@pytest.mark.parametrize("path", VIT_FILES, ids=lambda path: getattr(path, "stem", "none"))
def test_vit_trajectory(path: Path) -> None:
    meta, tensors = read(path)
    feedback = [tensors[f"init.model.layers.{n}.feedback_weight"] for n in (1, 3, 5)]
    model = f3.models.ViT(8, 1, 5, patch_size=4, depth=2, heads=2, dim=8, head_dim=4, mlp_width=16, feedback=feedback).double()
    theirs = {"stages.0.module.0.linear": "0.0.2", "stages.2": "4.0", "stages.3": "6.0"}
    for stage, block in (("stages.0.module.1", "0.1.1"), ("stages.1.module", "2.1")):
        theirs |= {f"{stage}.{ours}": f"{block}.{name}" for ours, name in VIT_NAMES.items()}
    names = {f"{ours}.{part}": f"model.layers.{name}.{part}" for ours, name in theirs.items() for part in ("weight", "bias")}
    names = {ours: name for ours, name in names.items() if f"init.{name}" in tensors}
    model.load_state_dict({ours: tensors[f"init.{name}"] for ours, name in names.items()})

    trainer = trained(model, meta, tensors)

    for ours, parameter in model.named_parameters():
        assert relative(parameter, tensors[f"final.{names[ours]}"]) < 1e-9, ours
    assert relative(trainer.learner.store.rows, tensors["final.errors"]) < 1e-9
    with torch.no_grad():
        assert relative(model.eval()(tensors["x"]), tensors["final.output"]) < 1e-9
