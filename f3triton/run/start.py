"""How a run starts: anew, once more from its beginning, or from a checkpoint; and the folder that it is written to."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from pathlib import Path

from ..base.exceptions import InputError
from ..data import Dataset
from ..data.identity import identity
from ..distributed.mesh import processes
from ..error_store import check_home, is_folder, remove_store
from ..learn.signal import resolve_loss
from .checkpoint import Checkpoints, Snapshot, newest, parse_every
from .folder import CHECKPOINTS, FORMAT, RunFolder, read_json
from .identity import settings_of
from .options import to_json, whole_path
from .state import require_same
from .summary import versions
from .trainer import Trainer


class Start:
    """What there is of a run in its folder before it starts.

    `snapshot` is the checkpoint that it goes on from, None where it begins. Raises InputError where the options `--resume`,
    `--overwrite`, `--output-dir` and `--checkpoint-every` do not go with one another or with what is in the folder. Nothing is
    written before `open`, and of an error store nothing removed before `make_way`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.snapshot = _checkpoint_to_resume(options)
        self.begun = _begun_before(options) if self.snapshot is None else None
        self.overwrite = options.overwrite or self.begun is not None
        if options.output_dir and self.snapshot is None:
            RunFolder.check(options.output_dir, self.overwrite)
        self.every = None if options.checkpoint_every is None else parse_every(options.checkpoint_every)

    def make_way(self, trainer: Trainer, train_set: Dataset) -> None:
        """Remove the error store of the run that is written over. Raises InputError where a new one cannot be made, or the
        checkpoint is one of another run.
        """
        store = trainer.store_for(train_set)
        if store is not None:
            home, begun = store[0], self.begun or {}
            if is_folder(home) and (self.options.overwrite or begun.get("error_store") == whole_path(home)):
                remove_store(home)
            if self.snapshot is None:
                check_home(*store)
        if self.snapshot is not None:
            require_same(self.snapshot, settings_of(trainer, identity(train_set), self.options.epochs, self.options.eval_every))

    def open(self, trainer: Trainer, train_set: Dataset) -> tuple[RunFolder, Checkpoints | None]:
        """The run's folder, with its configuration and what is there before its first epoch; and its checkpoints."""
        options = self.options
        folder = RunFolder(options.output_dir or default_folder(options), self.overwrite, resume=self.snapshot is not None)
        checkpoints = None if self.every is None else Checkpoints(folder.checkpoints, *self.every, keep=options.keep)
        folder.require_space(trainer.model)
        config = {
            "format": FORMAT,
            "network": trainer.model.config() | ({} if options.drop_heads else trainer.model.readings()),
            "loss": resolve_loss(trainer.loss, train_set.task),
            "preprocessing": train_set.preprocessing.to_json(),
            "options": to_json(options),
            "command": shlex.join(["python", "train.py", *sys.argv[1:]]),
            "versions": versions(),
        }
        folder.write_json("config.json", config)
        if self.snapshot is None:
            folder.save_model(trainer.model, not options.drop_heads)  # what is kept should the first epoch diverge
        else:
            folder.write_metrics(self.snapshot.state["history"])
        return folder, checkpoints


def default_folder(options: argparse.Namespace) -> str:
    """`runs/DATASET-METHOD-DATE-TIME`."""
    source = options.dataset or Path(options.text).stem
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source).strip("-.") or "data"
    return f"runs/{name}-{options.method}-{time.strftime('%Y%m%d-%H%M%S')}"


def _checkpoint_to_resume(options: argparse.Namespace) -> Snapshot | None:
    """The newest sound checkpoint of the run that `--resume` names; damaged ones are told of.

    None where nothing is to be resumed, or `auto` finds no checkpoint yet: then the run begins anew.
    """
    if options.resume is None:
        return None
    if options.overwrite:
        raise InputError("--overwrite and --resume cannot go together; leave one out")
    if options.output_dir is None:
        raise InputError("--resume auto needs --output-dir, the run's folder")
    folder = Path(options.output_dir).expanduser()
    warn = (lambda line: None) if processes()[0] else (lambda line: print(f"train.py: warning: {line}", file=sys.stderr))
    found = newest(folder / CHECKPOINTS, warn)
    if found is None and options.resume != "auto":
        raise InputError(f"run {options.resume!r} has no checkpoint to go on from")
    if found is None and (folder / "summary.json").exists():
        raise InputError(f"run {str(folder)!r} has ended, and left no checkpoint to go on from; choose another folder")
    return found


def _begun_before(options: argparse.Namespace) -> dict[str, object] | None:
    """The options of the run that `--resume auto` finds begun, without a checkpoint yet: it begins again."""
    if options.resume is None or not (Path(options.output_dir).expanduser() / "config.json").exists():
        return None
    stored = read_json(Path(options.output_dir).expanduser(), "config.json").get("options")
    return stored if isinstance(stored, dict) else {}
