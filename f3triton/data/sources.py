"""Where splits come from: the bundled digits, a file, a folder, or the Hugging Face hub."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..base.exceptions import InputError
from ..base.files import read_object
from ..base.memory import available_memory
from ..base.text import readable_bytes, short
from .columns import listed, one_line
from .json_rows import check_json

BUNDLED = ("digits",)
READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
HUB_TIMEOUT_SECONDS = 10.0
WIDENED = 16  # times the bytes of a text file is what it may take as a table
NOTE = "f3triton-content"  # in the library's cache: a hash of what was read


def open_source(
    source: Any, config: str | None = None, revision: str | None = None, streaming: bool = False
) -> tuple[str, dict[str, Any]]:
    """The data set's name, and its splits as `datasets.Dataset`s, or as `datasets.IterableDataset`s for `streaming`.

    `source` is `"digits"`, a path to a file or folder, the name of a data set on the hub, or a data set already loaded.
    Raises InputError: nothing of that name; unreadable content; the hub cannot be reached.
    """
    if streaming:
        name, splits = _open_source(source, config, revision, True)
        return name, {k: v.to_iterable_dataset() if hasattr(v, "to_iterable_dataset") else v for k, v in splits.items()}
    return _open_source(source, config, revision, False)


def _open_source(source: Any, config: str | None, revision: str | None, streaming: bool) -> tuple[str, dict[str, Any]]:
    if not isinstance(source, (str, Path)):
        _none_of("a loaded data set", config=config, revision=revision)
        return _loaded(source, streaming)
    name = str(source)
    if name in BUNDLED:
        _none_of(f"bundled data set {name!r}", config=config, revision=revision)
        return name, _bundled(name)
    path = Path(name).expanduser()
    if name.strip() and path.exists():  # an empty name would be the current folder
        _none_of(f"local data set {name!r}", revision=revision)
        return path.resolve().name, _local(path, name, config, streaming)
    looks_like_a_path = name.startswith((".", "/", "~")) or path.is_absolute() or path.suffix.lower() in READERS
    if looks_like_a_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"data set {name!r}: no such file or folder")
    return name, _hub(name, config, revision, streaming)


def folders_of(source: Any) -> tuple[Path, ...] | None:
    """Where the files are that rows of a source may name: its folder, and what the library has unpacked or downloaded; None,
    that is anywhere, for a data set that the caller has loaded."""
    if not isinstance(source, (str, Path)):
        return None
    import datasets
    import huggingface_hub

    path = Path(source).expanduser()
    own = [path if path.is_dir() else path.parent] if path.exists() else [Path(huggingface_hub.constants.HF_HUB_CACHE)]
    return (*own, Path(datasets.config.DOWNLOADED_DATASETS_PATH))


def _none_of(what: str, **options: str | None) -> None:
    for option, value in options.items():
        if value is not None:
            raise InputError(f"{what} has no {option} {value!r}; leave {option} out")


def _loaded(source: Any, streaming: bool = False) -> tuple[str, dict[str, Any]]:
    import datasets

    source = {k: _of_frame(v) for k, v in source.items()} if type(source) is dict else _of_frame(source)
    kinds = (datasets.Dataset, datasets.IterableDataset) if streaming else datasets.Dataset
    if isinstance(source, kinds):
        return source.info.dataset_name or "dataset", {str(source.split or "train"): source}
    if isinstance(source, Mapping) and source and all(isinstance(split, kinds) for split in source.values()):
        name = next(iter(source.values())).info.dataset_name
        return name or "dataset", {str(split): rows for split, rows in source.items()}
    kinds = "a pandas.DataFrame, a datasets.Dataset, or a dict of such by split"
    hint = "; load it without streaming, or use stream_dataset" if "Iterable" in type(source).__name__ else ""
    raise InputError(f"a {type(source).__name__} is no data set; give a name, a path, {kinds}{hint}")


def _of_frame(source: Any) -> Any:
    """The rows of a pandas.DataFrame, without its index; anything else as it is."""
    import datasets

    pandas = sys.modules.get("pandas")  # where nothing has imported it, nothing is a frame
    if pandas is None or not isinstance(source, pandas.DataFrame):
        return source
    with reading("DataFrame"):
        return datasets.Dataset.from_pandas(source, preserve_index=False)


def _bundled(name: str) -> dict[str, Any]:
    """Read into memory, so that nothing needs to be written anywhere."""
    import datasets
    import pyarrow.parquet as pq
    from datasets.table import InMemoryTable

    splits = {}
    for split in ("train", "test"):
        with (resources.files(__package__) / name / f"{split}.parquet").open("rb") as file:
            splits[split] = datasets.Dataset(InMemoryTable(pq.read_table(file)))
    return splits


def _local(path: Path, name: str, config: str | None, streaming: bool) -> dict[str, Any]:
    import datasets

    with reading(name):
        if path.is_file():
            reader = READERS.get(path.suffix.lower())
            if reader is None:
                raise InputError(f"file {name!r} cannot be read; known endings: {', '.join(READERS)}")
            if path.stat().st_size == 0:
                raise InputError(f"file {name!r} is empty")
            _none_of(f"file {name!r}", config=config)
            options = _separated(path) if reader == "csv" else _bounded(streaming and reader == "parquet")
            # A path is taken for a pattern, where brackets and stars have a meaning.
            check_json([path])
            _check_rows([path], streaming)
            files = glob.escape(str(path.resolve()))
            return _load(reader, streaming, data_files=files, **options)
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            _none_of(f"saved data set {name!r}", config=config)
            _check_saved(path)
            splits = _loaded(datasets.load_from_disk(str(path)))[1]
            for rows in splits.values():
                rows.data.table.validate(full=True)  # arrow takes its files as they are, and would read beyond their end
            return splits
        check_json(path.rglob("*.*"))
        _check_rows(path.rglob("*.parquet"), streaming)
        if (path / "README.md").exists():
            _check_description(path, config)
        options = _bounded(streaming and next(path.rglob("*.parquet"), None) is not None)
        return _load(str(path.resolve()), streaming, name=config, **options)


def _separated(path: Path) -> dict[str, Any]:
    """What separates the fields of a text file, for its reader: of a .csv, semicolons or tabs where its first line has such
    and no comma."""
    with path.open("rb") as file:
        first = file.readline(1 << 16)
    found = "\t" if path.suffix.lower() == ".tsv" else next((sep for sep in ",;\t" if sep.encode() in first), ",")
    return {} if found == "," else {"sep": found}


def _load(source: str, streaming: bool, **options: Any) -> dict[str, Any]:
    """What `datasets.load_dataset` reads from local files.

    Its cache takes a file for what it was while size and time are the same. Here names and content decide, noted there.
    """
    import datasets

    if streaming:  # nothing is cached
        return dict(datasets.load_dataset(source, streaming=True, **options))
    builder = datasets.load_dataset_builder(source, **options)
    digest = hashlib.blake2b(digest_size=16)
    for name in (name for files in (builder.config.data_files or {}).values() for name in files):
        digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
        with open(name, "rb") as content:
            while chunk := content.read(1 << 22):
                digest.update(chunk)
    note = Path(builder.cache_dir) / NOTE
    same = not note.parent.exists() or (note.exists() and note.read_text() == digest.hexdigest())
    mode = "reuse_dataset_if_exists" if same else "reuse_cache_if_exists"
    try:
        splits = dict(datasets.load_dataset(source, download_mode=mode, **options))
    except datasets.exceptions.DatasetGenerationError:
        # The first 10,000 rows of a text file have set the types of its columns: once more, by all rows.
        size = sum(Path(name).stat().st_size for files in builder.config.data_files.values() for name in files)
        if type(builder.config).__name__ == "CsvConfig" and "chunksize" not in options and WIDENED * size < available_memory():
            with contextlib.suppress(datasets.exceptions.DatasetGenerationError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pandas, about columns of mixed types
                return _load(source, streaming, **options, chunksize=1 << 40)
        raise
    with contextlib.suppress(OSError):
        note.write_text(digest.hexdigest())
    return splits


def _check_rows(paths: Iterable[Path], streaming: bool) -> None:
    """Raise InputError where parquet files say that they have more numbers than memory holds: a few bytes may stand for all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    needed = 0
    for path in paths:
        if path.suffix.lower() == ".parquet" and path.is_file() and not streaming:
            with contextlib.suppress(pa.ArrowException, OSError):  # whoever reads it will say what is wrong
                told = pq.read_metadata(path)
                needed += 8 * told.num_rows * told.num_columns
    if needed > (free := available_memory()):
        sizes = f"{readable_bytes(needed)}, and {readable_bytes(free)} of memory are free"
        raise InputError(f"the parquet files hold {sizes}; read them as a stream (--streaming)")


def _check_saved(folder: Path) -> None:
    """Raise InputError where a saved data set names files outside of its folder."""
    for state in folder.rglob("state.json"):
        content = read_object(state)
        for files in (content.get("_data_files"), content.get("_indices_files")):
            for file in files if isinstance(files, list) else ():
                name = file.get("filename") if isinstance(file, dict) else None
                if not isinstance(name, str) or Path(name).name != name or (state.parent / name).is_symlink():
                    raise InputError(
                        f"saved data set {str(folder)!r} names the file {short(name, 200)}; allowed: one in its folder"
                    )


def _check_description(folder: Path, config: str | None) -> None:
    """Raise InputError where a folder's README.md says that its data is in files outside of it."""
    import datasets

    named = datasets.load_dataset_builder(str(folder.resolve()), name=config).config.data_files or {}
    for file in (Path(file) for files in named.values() for file in files):
        if not file.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"README.md of {str(folder)!r} names the file {short(str(file), 200)}, outside of it")


def _bounded(wanted: bool) -> dict[str, Any]:
    """Options by which a parquet file that is streamed is not held in memory as far as it was read: arrow would keep it all."""
    if not wanted:
        return {}
    from datasets.packaged_modules.parquet.parquet import ParquetConfig
    from pyarrow.dataset import ParquetFragmentScanOptions

    known = "fragment_scan_options" in ParquetConfig.__dataclass_fields__  # from datasets 4.2 on
    return {"fragment_scan_options": ParquetFragmentScanOptions(pre_buffer=False)} if known else {}


def _hub(name: str, config: str | None, revision: str | None, streaming: bool) -> dict[str, Any]:
    """Ask for the data set first, once and briefly: `datasets` alone would retry for half a minute without a network."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise InputError(f"data set {name!r} is gated: accept its terms on the hub, then run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise InputError(f"data set {name!r} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"data set {name!r} is not on the hub (or is private), and there is no local file or folder of that name; "
            f"bundled: {listed(BUNDLED)}"
        ) from error
    except Exception as error:
        if not (_unreachable(error) or isinstance(error, HfHubHTTPError)):
            raise InputError(f"data set {name!r} cannot be looked up on the hub: {one_line(error)}") from error
        return _cached(name, config, revision, error)
    with reading(name, quiet=False):
        return dict(datasets.load_dataset(name, name=config, revision=revision, streaming=streaming))


def _cached(name: str, config: str | None, revision: str | None, reason: Exception) -> dict[str, Any]:
    """The copy that an earlier download left, if there is one: the hub was asked and did not answer."""
    import datasets
    import huggingface_hub

    was = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        with _quiet([]):
            splits = dict(datasets.load_dataset(name, name=config, revision=revision))
    except Exception:
        splits = {}
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = was
    # A download is kept under its commit. A local folder of the same name is kept nearby, and would be taken for it.
    commits = {Path(file["filename"]).parent.name for rows in splits.values() for file in rows.cache_files}
    downloaded = commits and all(re.fullmatch(r"[0-9a-f]{40}", commit) for commit in commits)
    if downloaded and (revision is None or all(commit.startswith(revision) for commit in commits)):
        return splits
    offline = " (HF_HUB_OFFLINE is set)" if was[1] else f" ({one_line(reason, 100)})"
    raise InputError(
        f"cannot reach the Hugging Face hub to load {name!r}{offline}, and there is no local file or folder of that name; "
        f"give a local folder or file, or one that is bundled: {listed(BUNDLED)}"
    )


@contextlib.contextmanager
def reading(name: str, quiet: bool = True) -> Iterator[None]:
    """Turns whatever goes wrong while a data set is read into one line."""
    import datasets

    log: list[str] = []
    try:
        with _quiet(log) if quiet else contextlib.nullcontext():
            yield
    except InputError:
        raise
    except datasets.exceptions.DataFilesNotFoundError as error:
        raise InputError(f"data set {name!r} holds no file that can be read; known: {', '.join(READERS)}, images") from error
    except MemoryError:
        raise
    except Exception as error:
        if _unreachable(error):
            raise InputError(f"lost the Hugging Face hub while loading {name!r}: {one_line(error)}; try again") from error
        # The message that says what is wrong is the innermost; the one that says in which file was only logged.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = one_line(cause)
        # In older versions of datasets the cast error is only the context of the last error, not its cause.
        cast = next((e for e in (cause, cause.__context__) if isinstance(e, datasets.table.CastError)), None)
        if cast is not None:
            text = f"its files differ in columns: {one_line(cast.details())}"
        elif "converting to" in text or "as a scalar of type" in text:
            text += " (the first rows set the type of each column, and later rows or files must have it)"
        elif "Error tokenizing data" in text:
            text += (
                " (fields of a .csv are separated by what its first line has: commas, semicolons, tabs; decimals have a point)"
            )
        elif "codec can't decode" in text:
            text += " (text must be UTF-8)"
        if "corresponds to no data" in text:
            raise InputError(f"data set {name!r} has an empty split: {text}") from error
        files = [Path(match[1]).name for line in log if (match := re.search(r"Failed to .* '([^']+)' with error", line))]
        where = f" (file {files[0]!r})" if files and files[0] != Path(name).name else ""
        raise InputError(f"data set {name!r} cannot be read{where}: {text}") from error


@contextlib.contextmanager
def _quiet(log: list[str]) -> Iterator[None]:
    """Silences the progress bars and log lines of the Hugging Face libraries, keeping the latter in `log`; restores both."""
    import datasets

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.append(record.getMessage())

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.handlers, logger.propagate = [Collector()], False
        logger.setLevel(logging.ERROR)
    if not bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _unreachable(error: BaseException | None) -> bool:
    """Whether a network that is down, slow or switched off is behind an error, whichever HTTP library raised it."""
    names = {"ConnectionError", "TransportError", "Timeout", "OfflineModeIsEnabled", "TimeoutError", "gaierror"}
    while error is not None:
        if any(kind.__name__ in names for kind in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False
