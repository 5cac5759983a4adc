"""The parts of a run, from its options: data sets, the network's description, the network, and the settings of its peer."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from ..base.exceptions import InputError
from ..base.memory import available_memory
from ..base.text import readable_bytes
from ..data import Dataset, Preprocessing, load_dataset, load_text, stream_dataset
from ..models.build import OPTIONS, build, describe
from ..network.feedback import Feedback
from ..network.sequential import Sequential
from ..recipes import open_data, read_recipe, split_name
from .settings import Settings


def load_data(options: argparse.Namespace, preprocessing: Preprocessing | None = None) -> tuple[Dataset, Dataset]:
    """(training set, test set), by the `preprocessing` of an earlier run where it is given.

    Raises InputError where they cannot be had.
    """
    names = ["train_split", "test_split", "test_fraction", "max_train_samples", "max_test_samples", "revision"]
    if options.text is not None:
        return load_text(options.text, options.dataset, **_said(options, preprocessing, *names, "tokenizer", "context"))
    names += ["target", "features", "image", "task", "seed"]
    source = options.dataset
    if options.recipe is not None:
        source = open_data(read_recipe(split_name(options.recipe)[0]), source)
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


def make_network(options: argparse.Namespace, network: dict[str, object]) -> Sequential:
    """The network of a description: the same first weights for the same seed, whatever the method.

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
    return build(network, make_feedback(options))


def by_backpropagation(settings: Settings, streaming: bool) -> Settings:
    """The same training by backpropagation, in one order without windows but for a stream, which has no other."""
    windows = {} if streaming else {"window": "off", "visits": None}
    errors = {"first_visit": None, "error_store": "auto", "error_dtype": "auto", "error_rank": None}
    local = {"local_head": "auto", "local_head_depth": 0, "local_feedback": "head", "reach": 1}
    local |= {"local_positions": 1.0, "local_candidates": None}
    return replace(settings, method="bp", signal=None, **errors, **windows, **local)
