"""Predictions for the rows of a file, by the model in a run's folder, as a CSV file."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ..base.device import pick_device
from ..base.exceptions import InputError
from ..data.columns import Table, kind_of
from ..data.preprocessing import IMAGE, TENSORS, TEXT
from ..data.sources import folders_of, open_source
from .folder import replace_file
from .predictor import load

BATCH = 1000  # rows that go through the network at once
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def predict_run(options: argparse.Namespace, typed: set[str]) -> list[str]:
    """Write `NAME-predictions.csv` for the rows of NAME to --output-dir, or to the current folder; a line that says so.

    A row has `prediction`, and of classes the `probability of` each; of several numbers there is a column for each. Rows of
    images begin with the `image`'s path, where they have one. The file appears whole or not at all. Raises InputError for
    options that do not go with it, rows that the model does not take, and a file that is there already (unless --overwrite).
    """
    allowed = {"--predict", "--device", "--output-dir", "--overwrite", "--quiet"}
    if refused := sorted(typed - allowed):
        raise InputError(f"--predict goes with {', '.join(sorted(allowed - {'--predict'}))} only, got {refused[0]}")
    run, file = options.predict
    device = pick_device(options.device)
    predictor = load(run, device)
    fitted = predictor.preprocessing
    if fitted.kind in (TEXT, TENSORS):
        raise InputError(f"--predict is for models of tables and images; that of {run!r} was trained on {fitted.kind}")
    place = Path(options.output_dir or ".").expanduser() / f"{Path(file).expanduser().resolve().stem}-predictions.csv"
    if place.exists() and not options.overwrite:
        raise InputError(f"{str(place)!r} is there already; choose another folder with --output-dir, or --overwrite")
    images = []
    if fitted.kind == IMAGE and Path(file).suffix.lower() in PICTURES:
        images, inputs = [file], fitted.encode([file])
    else:
        name, splits = open_source(file)
        if len(splits) > 1:
            raise InputError(f"data set {name!r} has the splits {', '.join(splits)}; give the file of one")
        rows = Table.from_dataset(next(iter(splits.values())), f"{name!r}", folders_of(file))
        inputs = fitted.encode(rows)
        images = paths_in(rows, fitted.image) if fitted.kind == IMAGE else []
    with torch.no_grad():
        outputs = [predictor.from_inputs(part.to(device)).cpu() for part in inputs.split(BATCH)]
    if not outputs:
        raise InputError(f"{file!r} has no rows")
    found = torch.cat(outputs)  # [N, C]
    answers, classes = predictor.answers(found), predictor.classes
    header = ["prediction", *(f"probability of {name}" for name in classes)] if classes else list(fitted.target_names)
    if not classes and len(header) == 1:
        header = ["prediction"]
    lines = ([a, *p] for a, p in zip(answers, found.tolist(), strict=True)) if classes else found.tolist()
    if images:
        header, lines = ["image", *header], ([path, *line] for path, line in zip(images, lines, strict=True))
    _write(place, header, lines)
    return [f"{len(found):,} predictions in {place}"]


def paths_in(rows: Table, name: str) -> list[str]:
    """The paths of a column of images; none where an image has none."""
    column = rows.column(name)
    paths = column.field("path").to_pylist() if kind_of(rows, name)[0] == IMAGE and hasattr(column, "field") else []
    return [] if None in paths else paths


def _write(place: Path, header: list[str], lines: Iterable[Sequence[object]]) -> None:
    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([header, *lines])

    replace_file(place, write)
