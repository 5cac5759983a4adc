"""JSON files are looked through before a parser gets them that is ended by some: arrow's, by rows that are null, and by
nesting without bound."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..base.exceptions import InputError

ENDINGS = re.compile(r"\.(json|jsonl|ndjson)(\.(gz|bz2|xz|zst|lz4))?$")
DEEPEST = 64
CHUNK = 1 << 22  # bytes
LONGEST = 1 << 26  # of a string
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


def check_json(paths: Iterable[Path]) -> None:
    """Raise InputError where one of these that is a JSON file has a row that is null, or lists or objects nested too deeply."""
    import fsspec

    for path in paths:
        if ENDINGS.search(path.name.lower()) and path.is_file():
            with fsspec.open(str(path), "rb", compression="infer") as file:
                _check(iter(lambda file=file: file.read(CHUNK), b""), path)
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                for name in packed.namelist():
                    if ENDINGS.search(name.lower()):
                        with packed.open(name) as file:
                            _check(iter(lambda file=file: file.read(CHUNK), b""), Path(name))


def _check(chunks: Iterable[bytes], path: Path) -> None:
    depth, rest, rows_at = 0, b"", None  # rows_at: the depth of a row, 1 within a list of them
    for chunk in chunks:
        text = (rest + chunk).replace(rb"\\", b"").replace(rb"\"", b"")  # then a quote begins or ends a text
        text = re.sub(rb'"[^"]*"', b"0", text)
        end = text.find(b'"')
        if end < 0:  # a word, or what a backslash begins, may go on in the next chunk
            end = max(len(text) - 4, 0) if len(chunk) == CHUNK else len(text)
        text, rest = text[:end], text[end:]
        if len(rest) > LONGEST:
            raise InputError(f"file {path.name!r} holds a text of more than {LONGEST:,} bytes")
        if rows_at is None and (first := text.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]):
            rows_at = int(first == b"[")
        depths = depth + np.cumsum(_STEPS[np.frombuffer(text, np.uint8)], dtype=np.int64)
        if not len(depths):
            continue
        depth = int(depths[-1])
        if depths.max() > DEEPEST:
            raise InputError(f"file {path.name!r} holds lists or objects that are nested more than {DEEPEST} deep")
        if any(depths[found.start()] == rows_at for found in re.finditer(rb"null", text)):
            raise InputError(f"file {path.name!r} holds a row that is null; every row must be an object")
