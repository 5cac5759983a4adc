"""What a run says while it trains: a progress bar on a terminal, plain lines in a log, nothing with `--quiet`."""

from __future__ import annotations

import os
import shutil
import sys
import time
from datetime import timedelta

from ..base.text import printable

# What is wanted comes first, so that a narrow terminal cuts off what is not.
BAR = "{desc}{remaining} left {percentage:3.0f}%|{bar:10}| {rate_fmt}{postfix}"
WANTED = ("test_error", "test_mse", "test_bits_per_")
BAR_WIDTH = 46  # columns of it without the description and the rest


def tell(text: str) -> None:
    """Print lines, in whatever characters there are. A reader that has gone, as that of a pipe, ends no run."""
    for line in text.split("\n"):
        line = printable(line)
        try:
            print(
                line.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8"),
                flush=True,
            )
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
    """Prints a run's progress, inside `with`. `lines`: about how many lines a log gets for `epochs` epochs of `samples`
    samples.
    """

    def __init__(self, quiet: bool, epochs: int, samples: int, label: str = "", lines: int = 10) -> None:
        self.quiet, self.epochs, self.samples = quiet, epochs, samples
        self.began, self.done = time.monotonic(), 0  # samples since then
        self.every = max(1, epochs // lines)
        self.bar = None
        self.prefix = f"{label}: " if label else ""
        if not quiet and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            from tqdm.auto import tqdm  # a notebook gets a bar of its own

            looks = {"unit": "sample", "unit_scale": True, "bar_format": BAR, "leave": False, "dynamic_ncols": True}
            self.bar = tqdm(total=epochs * samples, desc=self.prefix, **looks)

    def step(self, samples: int) -> None:
        """One step is done."""
        self.done += samples
        if self.bar is not None:
            self.bar.update(samples)

    def record(self, record: dict) -> None:
        """One evaluation is done."""
        if self.quiet:
            return
        figures = {key: f"{key.replace('_', ' ')} {record[key]:.4g}" for key in shown(record)}
        if self.bar is not None:
            first = next((key for key in figures if key.startswith(WANTED)), None) or list(figures)[-1]
            description = f"{self.prefix}{figures.pop(first)}  "
            room = shutil.get_terminal_size().columns - len(description) - BAR_WIDTH
            while figures and len(", ".join(figures.values())) > room:  # whole numbers, or none
                figures.popitem()
            self.bar.set_description_str(description, refresh=False)
            self.bar.set_postfix_str(", ".join(figures.values()))
        elif record["epoch"] % self.every == 0 or record["epoch"] == self.epochs or self.every == 1:
            text = "  ".join(figures.values())
            place, times = f"{record['epoch']}/{self.epochs}", [f"{record['learning_seconds']:.1f} s"]
            left = (self.epochs - record["epoch"]) * self.samples
            if left and self.done:
                times.append(f"{timedelta(seconds=round((time.monotonic() - self.began) / self.done * left))} left")
            tell(f"{self.prefix}epoch {place}  {text}  ({', '.join(times)})")

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()  # leaves the terminal clean


def shown(record: dict) -> list[str]:
    """The figures of a record that people follow."""
    wanted = ("train_loss", "train_error", "test_loss", "test_error", "test_mse", "test_perplexity")
    return [key for key in record if key in wanted or key.startswith("test_bits_per_")]
