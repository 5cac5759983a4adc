"""A run's records as TensorBoard shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.exceptions import InputError
from .folder import EVENTS
from .records import Record

if TYPE_CHECKING:
    from .trainer import Trainer


def require_log(kind: str | None) -> None:
    """Raise InputError where the package that `--log` needs is missing."""
    if kind is not None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise InputError(
                f"--log {kind} needs the package tensorboard, which is not installed: pip install tensorboard"
            ) from None


class TensorBoard:
    """Writes records to `tensorboard` in a run's folder, by step; at first those made before too, as of a resumed run.

    Those of a method that the run is compared with go to a folder of its name in there.
    """

    def __init__(self, folder: Path, method: str = "") -> None:
        self.folder, self.writer = folder / EVENTS / method, None

    def write(self, history: list[Record]) -> None:
        """Add the newest record of the run's history. Raises InputError where it cannot be written."""
        new = history[-1:]
        try:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                for left in self.folder.glob("events.out.tfevents.*"):  # all that is in them is in the history
                    left.unlink()
                self.writer, new = SummaryWriter(str(self.folder)), history
            for record in new:
                for name, value in figures(record):
                    self.writer.add_scalar(name, value, record["step"])
            self.writer.flush()
        except OSError as error:
            raise InputError(f"cannot write {str(self.folder)!r}: {error.strerror or error}") from None

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


@contextmanager
def logged(
    kind: str | None, folder: Path, trainer: Trainer, tell: Callable[[Record], None], method: str = ""
) -> Iterator[Callable[[Record], None]]:
    """What tells of each record of the trainer's run: `tell`, and with a `kind` the log in that run's folder."""
    if kind is None:
        yield tell
        return
    log = TensorBoard(folder, method)

    def both(record: Record) -> None:
        tell(record)
        log.write(trainer.result.history)

    try:
        yield both
    finally:
        log.close()


def figures(record: Record, before: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a record; those by target name are `name/target`."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from figures(value, f"{before}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{before}{name}", value
