"""How a run starts: anew, once more from its beginning, or from a checkpoint; and the folder that it is written to."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from itertools import count
from pathlib import Path

from ..base.exceptions import InputError
from ..data import Dataset
from ..data.identity import identity
from ..data.sources import READERS
from ..distributed.mesh import processes
from ..error_store import check_home, is_folder, remove_store
from ..learn.signal import resolve_loss
from .checkpoint import BEST, Checkpoints, Snapshot, newest, parse_every
from .folder import CHECKPOINTS, FORMAT, RunFolder, read_json
from .identity import settings_of
from .lock import FolderLock
from .options import EVERY, from_json, to_json, whole_path
from .state import require_same
from .summary import versions
from .trainer import Trainer


class Start:
    """What there is of a run in its folder before it starts.

    `snapshot` is the checkpoint that it goes on from, None where it begins. Raises InputError where the options `--resume`,
    `--overwrite`, `--output-dir` and `--checkpoint-every` do not go with one another or with what is in the folder. Nothing is
    written or removed before `open`; but a folder that is there is locked, for as long as the `with` statement lasts.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.lock, self.folder = options, None, None
        path = Path(options.output_dir or "").expanduser()
        if options.output_dir and is_folder(options.error_store) and whole_path(path) == whole_path(options.error_store):
            raise InputError(f"--output-dir and --error-store are both {str(path)!r}; give the store a folder of its own")
        if options.output_dir and path.is_dir() and not options.dry_run and not processes()[0]:
            self.lock = FolderLock(path)
        try:
            self._look()
        except InputError:
            self.__exit__()
            raise

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *error: object) -> None:
        if self.folder is not None:
            self.folder.discard()
            self.lock = self.folder.lock
        if self.lock is not None:
            self.lock.release()

    def _look(self) -> None:
        options = self.options
        self.snapshot = _checkpoint_to_resume(options)
        self.begun = _begun_before(options) if self.snapshot is None else None
        self.overwrite = options.overwrite or self.begun is not None
        if options.output_dir and self.snapshot is None:
            RunFolder.check(options.output_dir, self.overwrite)
        every = parse_every(options.checkpoint_every or EVERY)
        self.checkpoints = None if every is None else Checkpoints(Path(CHECKPOINTS), *every, keep=options.keep)

    def open(self, trainer: Trainer, train_set: Dataset) -> RunFolder:
        """The run's folder, with its configuration and what is there before its first epoch; `checkpoints` are made there.

        The error store of a run that is written over is removed. Raises InputError where a new one cannot be made, the folder
        is not to be had, or the checkpoint is one of another run.
        """
        options = self.options
        if self.snapshot is not None:
            require_same(self.snapshot, settings_of(trainer, identity(train_set, True), options.epochs, options.eval_every))
        path, resume = options.output_dir or default_folder(options), self.snapshot is not None
        store, begun = trainer.store_for(train_set), self.begun or {}
        home = None if store is None else store[0]
        replaced = home is not None and is_folder(home)
        replaced = replaced and (options.overwrite or begun.get("error_store") == whole_path(home))
        if store is not None and not resume and not replaced:
            check_home(*store)
        folder = self.folder = RunFolder(path, self.overwrite, resume, not options.drop_heads, _warn, self.lock)
        folder.require_space(trainer.model, 1 + options.keep_best)
        if replaced:
            remove_store(home)
            if not resume:
                check_home(*store)
        if self.checkpoints is not None:
            self.checkpoints.folder, self.checkpoints.on_write = folder.checkpoints, self._settle
            self.checkpoints.best = folder.at / BEST
        config = {
            "format": FORMAT,
            "network": trainer.model.config() | ({} if options.drop_heads else trainer.model.readings()),
            "loss": resolve_loss(trainer.loss, train_set.task),
            "preprocessing": train_set.preprocessing.to_json(),
            "options": to_json(options),
            "command": shlex.join(["python", "train.py", *sys.argv[1:]]),
            "versions": versions(),
        }
        folder.write_config(config)
        if self.snapshot is None:
            folder.save_model(trainer.model)  # what is kept should the first epoch diverge
        else:
            folder.go_back(self.snapshot)
        return folder

    def _settle(self) -> None:
        """After a checkpoint: it may be the first thing that there is of the run."""
        self.folder.settle()
        self.checkpoints.folder, self.checkpoints.best = self.folder.checkpoints, self.folder.at / BEST


def default_folder(options: argparse.Namespace) -> str:
    """`runs/DATASET-METHOD-DATE-TIME`, of a file the name without folder and ending; with a number where that is there."""
    path = Path(options.dataset or options.text)
    source = path.stem if options.dataset is None or path.suffix.lower() in READERS else options.dataset
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source).strip("-.") or "data"
    path = f"runs/{name}-{options.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(found for n in count(1) if not Path(found := path + f"-{n}" * (n > 1)).exists())


def _warn(line: str) -> None:
    print(f"train.py: warning: {line}", file=sys.stderr)


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
    found = newest(folder / CHECKPOINTS, (lambda line: None) if processes()[0] else _warn)
    if found is None and options.resume != "auto":
        raise InputError(f"run {options.resume!r} has no checkpoint to go on from")
    if found is None and (folder / "summary.json").exists():
        raise InputError(f"run {str(folder)!r} has ended, and left no checkpoint to go on from; choose another folder")
    return found


def _begun_before(options: argparse.Namespace) -> dict[str, object] | None:
    """The options of the run that `--resume auto` finds begun, without a checkpoint yet: it begins again."""
    if options.resume is None or not (Path(options.output_dir).expanduser() / "config.json").exists():
        return None
    return vars(from_json(read_json(Path(options.output_dir).expanduser(), "config.json").get("options")))
