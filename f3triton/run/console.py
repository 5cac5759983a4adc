"""What a run says while it trains: a progress bar on a terminal, plain lines in a log, nothing with `--quiet`."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Console:
    """Prints a run's progress. `lines` is about how many lines a log gets for `epochs` epochs of `samples` samples."""

    def __init__(self, quiet: bool, epochs: int, samples: int, label: str = "", lines: int = 10) -> None:
        self.quiet, self.epochs, self.label = quiet, epochs, label
        self.every = max(1, epochs // lines)
        self.bar = None
        if not quiet and sys.stderr.isatty():
            self.bar = tqdm(total=epochs * samples, unit="sample", unit_scale=True, desc=label, leave=False)

    def step(self, samples: int) -> None:
        """One step is done."""
        if self.bar is not None:
            self.bar.update(samples)

    def record(self, record: dict) -> None:
        """One evaluation is done."""
        if self.quiet:
            return
        text = "  ".join(f"{key.replace('_', ' ')} {record[key]:.4g}" for key in shown(record))
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        if self.bar is None and (record["epoch"] % self.every == 0 or record["epoch"] == self.epochs or self.every == 1):
            prefix = f"{self.label}: " if self.label else ""
            print(f"{prefix}epoch {record['epoch']}/{self.epochs}  {text}  ({record['learning_seconds']:.1f} s)", flush=True)

    def close(self) -> None:
        """Leave the terminal clean."""
        if self.bar is not None:
            self.bar.close()


def shown(record: dict) -> list[str]:
    """The figures of a record that people follow."""
    wanted = ("train_loss", "train_error", "test_loss", "test_error", "test_mse", "test_perplexity")
    return [key for key in record if key in wanted or key.startswith("test_bits_per_")]
