"""Samples of text: from a language model that was just trained, or from one in a run's folder."""

from __future__ import annotations

import argparse

from ..base.device import pick_device
from ..base.exceptions import InputError
from ..base.words import TEMPERATURE, TOKENS
from ..data import Dataset
from ..network.sequential import Sequential
from .predictor import Predictor, load


def sample_run(options: argparse.Namespace, typed: set[str]) -> str:
    """Text from the model of the run `--sample`. Raises InputError for options that do not go with it."""
    allowed = {"--sample", "--tokens", "--prompt", "--temperature", "--seed", "--device", "--which"}
    refused = sorted(typed - allowed)
    if refused:
        raise InputError(f"--sample goes with {', '.join(sorted(allowed - {'--sample'}))} only, got {refused[0]}")
    return load(options.sample, pick_device(options.device), which=options.which).generate(*asked_for(options), options.seed)


def sample_of(model: Sequential, data: Dataset, options: argparse.Namespace) -> str:
    """Text from a language model in training, the same for the same options."""
    return Predictor(model, data.preprocessing, "cross-entropy").generate(*asked_for(options), options.seed)


def check_sample(model: Sequential, data: Dataset, options: argparse.Namespace) -> None:
    """Raise InputError now where the sample after training would not work."""
    Predictor(model, data.preprocessing, "cross-entropy").first_tokens(*asked_for(options))


def asked_for(options: argparse.Namespace) -> tuple[str | None, int, float]:
    """(prompt, tokens, temperature)."""
    tokens = TOKENS if options.tokens is None else options.tokens
    return options.prompt, tokens, TEMPERATURE if options.temperature is None else options.temperature
