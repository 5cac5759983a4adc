"""Several seeds in one call: `--seed 0 1 2` trains with each in turn, and tells the mean and the standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from ..base.exceptions import InputError
from ..distributed.mesh import processes
from .console import shown
from .folder import RunFolder, json_text, read_json, replace_file
from .options import parse, without_seeds
from .start import default_folder


def train_seeds(arguments: list[str], seeds: list[str], run: Callable[[list[str]], int], say: Callable[[str], None]) -> int:
    """`run` once for each seed, in a folder of its own, `seed-N` of the output folder, whose `summary.json` has all test
    figures with mean and standard deviation (of a sample, n - 1). Returns the exit code of the first run that did not end well.

    Raises InputError for seeds that come twice, options of something other than a training, or an output folder in use.
    """
    arguments = without_seeds(arguments)
    options = parse(arguments)
    if len({int(seed) for seed in seeds}) < len(seeds):
        raise InputError(f"seeds {' '.join(seeds)}: one comes twice")
    for name in ("evaluate", "sample", "dry_run", "resume", "push_to_hub"):
        if getattr(options, name) not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} takes one seed, got {' '.join(seeds)}")
    if processes()[1] > 1:
        raise InputError(f"seeds {' '.join(seeds)} are trained by one process, in turn; start them one by one with torchrun")
    path = Path(options.output_dir or default_folder(options)).expanduser()
    RunFolder.check(path, options.overwrite)
    folders = {seed: path / f"seed-{int(seed)}" for seed in seeds}
    for folder in folders.values():
        RunFolder.check(folder, options.overwrite)
    for seed, folder in folders.items():
        say(f"seed {seed}:")
        code = run([*arguments, "--seed", seed, "--output-dir", str(folder)])
        if code:
            return code
    summary = summary_of({int(seed): read_json(folder, "summary.json") for seed, folder in folders.items()})
    replace_file(path / "summary.json", lambda place: place.write_text(json_text(summary, indent=2), encoding="utf-8"))
    for method, figures in summary["figures"].items():
        for name, found in figures.items():
            values = "  ".join(f"{value:.4g}" for value in found["values"])
            deviation = found["standard_deviation"]
            spread = f"mean {found['mean']:.4g}" + ("" if deviation is None else f", standard deviation {deviation:.2g}")
            say(f"{method}, {name.replace('_', ' ')}: {spread}  (seeds {' '.join(seeds)}: {values})")
    say(f"written to {path}: summary.json, and a folder for each seed")
    return 0


def summary_of(summaries: dict[int, dict]) -> dict[str, object]:
    """The test figures of runs by their seeds: by method, each figure's values, mean and standard deviation."""
    values: dict[str, dict[str, list[float]]] = {}
    for summary in summaries.values():
        for one in (summary, *summary.get("comparison", [])):
            for name in shown(one):
                if name.startswith("test_") and one[name] is not None:
                    values.setdefault(one["method"], {}).setdefault(name, []).append(one[name])
    figures = {
        method: {
            name: {
                "values": found,
                "mean": statistics.fmean(found),
                "standard_deviation": statistics.stdev(found) if len(found) > 1 else None,
            }
            for name, found in named.items()
        }
        for method, named in values.items()
    }
    return {"seeds": list(summaries), "figures": {method: found for method, found in figures.items() if found}}
