"""The parts of a run, from its options: data sets, the network's description, the network, and the settings of its peer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..base.exceptions import InputError
from ..base.memory import available_memory
from ..base.text import readable_bytes
from ..base.words import OPTIONS
from ..data import Dataset, Preprocessing, load_dataset, load_text, stream_dataset
from ..models.build import build, describe
from ..network.feedback import Feedback
from ..network.sequential import Sequential
from ..recipes import read_recipe, split_name
from ..recipes.tables import open_data
from .folder import model_file, read_weights
from .settings import LOCAL, Settings


def load_data(options: argparse.Namespace, preprocessing: Preprocessing | None = None) -> tuple[Dataset, Dataset]:
    """(training set, test set), by the `preprocessing` of an earlier run where it is given.

    Raises InputError where they cannot be had.
    """
    names = ["train_split", "test_split", "test_fraction", "max_train_samples", "max_test_samples", "revision"]
    if options.text is not None:
        return load_text(options.text, options.dataset, **_said(options, preprocessing, *names, "tokenizer", "context"))
    names += ["target", "features", "image", "image_size", "task", "seed"]
    source = options.dataset
    if options.recipe is not None:
        source = open_data(read_recipe(split_name(options.recipe)[0]), source, options.streaming)
    if options.streaming:
        data = stream_dataset(source, **_said(options, preprocessing, *names, "shuffle_buffer", "statistics_rows"))
    else:
        data = load_dataset(source, **_said(options, preprocessing, *names))
    if not isinstance(source, str):  # a table as the recipe has it
        for part in data:
            part.name = split_name(options.recipe)[0]
    return data


def _said(options: argparse.Namespace, preprocessing: Preprocessing | None, *names: str) -> dict[str, object]:
    """The options of these names that have a value; the others take the default of the function that they are for."""
    found = {name: getattr(options, name) for name in names}
    found |= {"config": options.dataset_config, "preprocessing": preprocessing}
    return {name: value for name, value in found.items() if value is not None}


def network_of(options: argparse.Namespace, train_set: Dataset) -> dict[str, object]:
    """The description of the network (see `models.build`)."""
    names = {name for options_of_model in OPTIONS.values() for name in options_of_model}
    given = {name: getattr(options, name) for name in names}
    return describe(options.model, train_set, given, options.activation, local=options.method == "local")


def make_feedback(options: argparse.Namespace) -> Feedback:
    """The law of the feedback matrices."""
    return Feedback(options.feedback, options.feedback_values, options.feedback_scale)


def make_network(
    options: argparse.Namespace, network: dict[str, object], say: Callable[[str], None] = lambda line: None
) -> Sequential:
    """The network of a description: the same first weights for the same seed, whatever the method; or those of `--init-from`,
    of which `say` is told.

    Raises InputError where there is no memory for them.
    """
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in build(network).parameters())
    needed, free = 4 * numbers, available_memory()
    if needed > free:
        raise InputError(
            f"not enough memory: the weights need {readable_bytes(needed)}, and {readable_bytes(free)} are free; "
            "--dry-run shows what else a run needs"
        )
    torch.manual_seed(options.seed)
    model = build(network, make_feedback(options))
    if options.init_from is not None and options.resume in (None, "auto"):
        start_from(model, *model_file(Path(options.init_from).expanduser(), options.which), say)
    return model


def start_from(model: Sequential, which: str, path: Path, say: Callable[[str], None] = lambda line: None) -> None:
    """Give a model the weights of a run's model file, and `say` which; a last stage of other sizes keeps its own, and heads of
    hidden stages are new. Raises InputError where anything else does not fit."""
    found = {name: tensor for name, tensor in read_weights(path).items() if not name.startswith("heads.")}
    own, last = model.state_dict(), f"stages.{len(model) - 1}."
    others = sorted(name for name in own.keys() | found.keys() if shape_of(own, name) != shape_of(found, name))
    for name in others:
        if not name.startswith(last):
            raise InputError(
                f"cannot begin with {str(path)!r}: {name} is {shape_of(found, name)} there, and {shape_of(own, name)} here"
            )
    kept = {name for name in own if others and name.startswith(last)}
    with torch.no_grad():
        for name in own.keys() - kept:
            own[name].copy_(found[name])
    new = f"; its last layer is new: {shape_of(own, others[0])}, there {shape_of(found, others[0])}" if others else ""
    say(f"begins with the {which} model of {path.parent}{new}")


def shape_of(tensors: Mapping[str, torch.Tensor], name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None


METHOD_NAMES = {"local": "local errors", "bp": "backpropagation"}  # of what a run is compared with


def peers_of(settings: Settings, options: argparse.Namespace) -> list[Settings]:
    """What a run is compared with: the same training by backpropagation, and before it, of F3 in a network of several hidden
    stages, by local errors. In one order without windows, but for a stream, which has no other."""
    windows = {} if options.streaming else {"window": "off", "visits": None, "window_order": None}
    errors = {"first_visit": None, "error_store": "auto", "error_dtype": "auto", "error_rank": None}
    local = {name: getattr(Settings(), name) for name in LOCAL}
    workers = {"pipeline": "off", "pipeline_split": None, "pipeline_link": "host", "data_parallel": 1}
    workers["data_parallel_by"] = "auto"
    settings = replace(settings, signal=None, **errors, **windows, **workers)
    found = [replace(settings, method="bp", **local)]
    if settings.method == "f3" and options.model == "mlp" and len(options.hidden or OPTIONS["mlp"]["hidden"]) > 1:
        plain = {"link": "auto", "mask_target": False, "hidden_scale": 1.0}
        found.insert(0, replace(settings, method="local", **plain))
    return found
