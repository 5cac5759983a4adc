"""Evaluation of a run from its folder: the stored test figures, again."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..base.exceptions import InputError
from ..base.precision import matmul_precision
from ..data.identity import digest
from .console import shown
from .folder import read_json
from .options import from_json, make_settings
from .parts import load_data
from .predictor import load
from .records import test_record
from .tally import evaluate


def evaluate_run(options: argparse.Namespace, typed: set[str]) -> list[str]:
    """Repeat the best evaluation (with `--which last` the last) of the run `--evaluate`: its own data, preprocessing, model,
    device and batch size; a line a figure.

    Raises InputError for options that do not go with it, or a folder that holds no finished run.
    """
    refused = sorted(typed - {"--evaluate", "--device", "--exit", "--quiet", "--which"})
    if refused:
        allowed = "only --device, --exit, --which and --quiet go with it"
        raise InputError(f"--evaluate takes the run's own settings ({allowed}), got {refused[0]}")
    path = Path(options.evaluate).expanduser()
    config, summary = read_json(path, "config.json"), read_json(path, "summary.json")
    stored = from_json(config.get("options"))
    stored.device = options.device if "--device" in typed else stored.device
    settings = make_settings(stored)
    place = None if options.exit is None else int(options.exit) if options.exit.isdecimal() else options.exit
    predictor = load(path, exit=place, which=options.which)
    _, test_set = load_data(stored, predictor.preprocessing)
    device, dtype = settings.resolved_device, settings.types.products
    same = summary.get("test_data", digest(test_set)) == digest(test_set)  # once, it was not noted
    network = predictor.network.to(device)
    with matmul_precision(settings.precision):
        figures = evaluate(network, test_set.to(device), predictor.loss, settings.eval_batch_size, device, dtype)
    found = test_record(test_set, figures)
    told = summary if predictor.which == "last" else summary.get("best") or {}
    lines = [] if same else ["the test data are not those of the run: other rows, or other values"]
    for name in shown(found):
        if options.exit is not None:
            lines.append(f"{name.replace('_', ' ')} {found[name]} (exit {options.exit}; the whole network: {told.get(name)})")
            continue
        before = told.get(name)
        note = "exactly as stored by the run" if found[name] == before and same else f"stored by the run: {before}"
        lines.append(f"{name.replace('_', ' ')} {found[name]} of the {predictor.which} model ({note})")
    return lines
