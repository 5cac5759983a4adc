"""The bytes of a store on disk: a manifest, and one file of rows for every generation; see docs/error-store.md.

Everything that is read is checked before it is used: sizes before anything is allocated or mapped, names before they are
opened, every field's type and range. What does not fit is an InputError that names the file.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from ...base.exceptions import InputError
from ...base.faults import fault
from ...base.files import check_written, open_regular, parse_object, read_object
from ...base.text import short
from ..codecs import Codec, make_codec

MAGIC, VERSION = b"F3ERRORS", 1
PREFIX = struct.Struct("<8sII")  # magic, version, bytes of the JSON that follows
ROWS_AT = 1 << 14  # where the rows begin
FORMAT = "f3triton-errors"
MANIFEST = "manifest.json"
MANIFEST_CAP = 1 << 20  # bytes
MAX_SAMPLES, MAX_WIDTH, MAX_EPOCH = 1 << 40, 1 << 22, 10**9
CHUNK = 1 << 22  # bytes read at a time
ROWS_FILE = re.compile(r"errors-(0|[1-9]\d{0,8})\.f3e")
SPARE_FILE = re.compile(r"spare-\d{1,9}\.f3e")
TEMPORARY_FILE = re.compile(r"\.manifest\.[0-9a-f]{16}\.tmp")

Data = dict[str, str | int | None]


@dataclass(frozen=True)
class Kind:
    """What every generation of a store holds: `samples` rows of `codec` with `width` entries, of the data set `data`."""

    samples: int
    width: int
    codec: str
    row_bytes: int
    data: Data | None

    @property
    def bitmap_at(self) -> int:
        """Where in a file the bits begin that say which rows were written."""
        return ROWS_AT + self.samples * self.row_bytes

    @property
    def file_bytes(self) -> int:
        """The exact size of a generation's file."""
        return self.bitmap_at + (self.samples + 7) // 8

    def make_codec(self) -> Codec:
        return make_codec(self.codec, self.width, torch.float32)


@dataclass(frozen=True)
class Generation:
    """One epoch's rows that are safe on disk. `carried` of them are older: the epoch did not visit their samples."""

    epoch: int
    file: str
    bytes: int
    crc32: int
    carried: int


@dataclass
class Manifest:
    """What a store holds, and which of its files count: those of `generations`, by epoch."""

    kind: Kind
    generations: dict[int, Generation] = field(default_factory=dict)


def rows_file(epoch: int) -> str:
    return f"errors-{epoch}.f3e"


# --- writing ----------------------------------------------------------------------------------------------------------


def header(kind: Kind, epoch: int) -> bytes:
    """The first `ROWS_AT` bytes of the file of `epoch`. Raises InputError where the data set's description is too long."""
    text = json.dumps({**asdict(kind), "epoch": epoch}, allow_nan=False).encode()
    if len(text) > ROWS_AT - PREFIX.size:
        raise InputError(f"the error store's header of {len(text):,} bytes is too long; give the data set a shorter name")
    return (PREFIX.pack(MAGIC, VERSION, len(text)) + text).ljust(ROWS_AT, b"\0")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest: all of it is on disk under another name before it takes the place of the one before."""
    generations = [asdict(generation) for _, generation in sorted(manifest.generations.items())]
    content = {"format": FORMAT, "version": VERSION, "rows": asdict(manifest.kind), "generations": generations}
    text = json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"
    temporary = folder / f".manifest.{secrets.token_hex(8)}.tmp"
    with os_errors_named(folder / MANIFEST, "write"):
        try:
            with open(temporary, "xb") as file:
                file.write(text)
                file.flush()
                fault("store:manifest-written")
                os.fsync(file.fileno())
            fault("store:manifest-synced")
            temporary.replace(folder / MANIFEST)
        finally:
            temporary.unlink(missing_ok=True)
        fault("store:manifest-renamed")
        sync_folder(folder)
    fault("store:folder-synced")


def sync_folder(folder: Path) -> None:
    """Make names in a folder safe: files created, renamed or removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def os_errors_named(path: Path, action: str) -> Iterator[None]:
    """Turn an error of the operating system into an InputError that names the file and what could not be done with it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"error store: cannot {action} {str(path)!r}: {error.strerror or error}") from error


# --- reading ----------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store. Raises InputError where there is none, or anything in it is not as it must be."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"error store {str(folder)!r} is not a folder")
    if not os.path.lexists(path):
        raise InputError(f"error store {str(folder)!r} has no {MANIFEST}")
    content = _Fields(read_object(path, MANIFEST_CAP), path)
    content.word("format", FORMAT)
    content.whole("version", VERSION, VERSION)
    kind = _kind(_Fields(content.take("rows", dict), path, "rows"))
    generations: dict[int, Generation] = {}
    for entry in content.take("generations", list):
        if not isinstance(entry, dict):
            raise InputError(f"{str(path)!r}: an entry of 'generations' is no object")
        part = _Fields(entry, path, "generations")
        epoch = part.whole("epoch", 0, MAX_EPOCH - 1)
        if generations and epoch <= max(generations):
            raise InputError(f"{str(path)!r}: 'generations' lists epoch {epoch} twice or out of order")
        generations[epoch] = Generation(
            epoch,
            part.word("file", rows_file(epoch)),
            part.whole("bytes", kind.file_bytes, kind.file_bytes),
            part.whole("crc32", 0, 2**32 - 1),
            part.whole("carried", 0, kind.samples),
        )
        part.end()
    content.end()
    return Manifest(kind, generations)


def check_file(path: Path, kind: Kind, epoch: int) -> int:
    """Check a generation's size and header, and return the CRC-32 of all its bytes. Raises InputError."""
    descriptor = open_regular(path)
    with open(descriptor, "rb", buffering=0):
        size = os.fstat(descriptor).st_size
        if size != kind.file_bytes:
            raise InputError(f"{str(path)!r} has {size:,} bytes, but its rows need {kind.file_bytes:,}")
        check_written(descriptor, path)
        with os_errors_named(path, "read"):
            first = os.pread(descriptor, ROWS_AT, 0)
            found, found_epoch = read_header(first, path)
            if (found, found_epoch) != (kind, epoch):
                raise InputError(f"{str(path)!r}: its header is not that of epoch {epoch} in {MANIFEST}")
            crc, at = zlib.crc32(first), ROWS_AT
            while part := os.pread(descriptor, CHUNK, at):
                crc, at = zlib.crc32(part, crc), at + len(part)
    if at != size:
        raise InputError(f"{str(path)!r} changed while it was read")
    return crc


def verify(folder: Path, kind: Kind, generation: Generation) -> None:
    """Raise InputError where the file of a generation is not, to the byte, the one that was committed."""
    path = folder / generation.file
    crc = check_file(path, kind, generation.epoch)
    if crc != generation.crc32:
        raise InputError(f"{str(path)!r} is damaged: its checksum is {crc:#010x}, and {MANIFEST} says {generation.crc32:#010x}")
    written = 0
    with open(open_regular(path), "rb") as file, os_errors_named(path, "read"):
        file.seek(kind.bitmap_at)
        while part := file.read(CHUNK):
            written += int(np.unpackbits(np.frombuffer(part, np.uint8)).sum())
    if written + generation.carried != kind.samples:
        raise InputError(
            f"{str(path)!r}: {written:,} rows were written and {generation.carried:,} carried forward, of {kind.samples:,}"
        )


def read_header(first: bytes, path: Path) -> tuple[Kind, int]:
    """Kind and epoch from a file's first `ROWS_AT` bytes. Raises InputError."""
    if len(first) < ROWS_AT or first[:8] != MAGIC:
        raise InputError(f"{str(path)!r} is not a file of error rows")
    _, version, length = PREFIX.unpack_from(first)
    if version != VERSION:
        raise InputError(f"{str(path)!r} has version {version} of the format; this program reads version {VERSION}")
    if length > ROWS_AT - PREFIX.size:
        raise InputError(f"{str(path)!r}: its header claims {length:,} bytes, at most {ROWS_AT - PREFIX.size:,} are allowed")
    if first[PREFIX.size + length :].strip(b"\0"):
        raise InputError(f"{str(path)!r}: there are bytes between its header and its rows")
    fields = _Fields(parse_object(first[PREFIX.size : PREFIX.size + length], path), path)
    epoch = fields.whole("epoch", 0, MAX_EPOCH - 1)
    return _kind(fields), epoch


def _kind(fields: _Fields) -> Kind:
    samples, width = fields.whole("samples", 1, MAX_SAMPLES), fields.whole("width", 1, MAX_WIDTH)
    word = fields.take("codec", str)
    try:
        codec = make_codec(word, width, torch.float32)
    except InputError:
        raise InputError(f"{str(fields.path)!r}: {fields.prefix}'codec' is {short(word)}, which is no error dtype") from None
    fields.word("codec", codec.word)
    row_bytes = fields.whole("row_bytes", codec.row_bytes, codec.row_bytes)
    data = fields.take("data", dict | None)
    if data is not None and not all(isinstance(value, str | int | None) for value in data.values()):
        raise InputError(f"{str(fields.path)!r}: 'data' holds something that is no text or number")
    fields.end()
    return Kind(samples, width, codec.word, row_bytes, data)


class _Fields:
    """A JSON object of which every field must be asked for, and be as it is asked for."""

    def __init__(self, content: dict, path: Path, within: str = "") -> None:
        self.content, self.path, self.prefix, self.asked = content, path, within and f"{within}: ", set()

    def take(self, name: str, kind: object) -> object:
        self.asked.add(name)
        if name not in self.content:
            raise InputError(f"{str(self.path)!r}: {self.prefix}{name!r} is missing")
        value = self.content[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InputError(f"{str(self.path)!r}: {self.prefix}{name!r} is {short(value)}, not of the right type")
        return value

    def whole(self, name: str, low: int, high: int) -> int:
        value = self.take(name, int)
        if not low <= value <= high:
            allowed = f"{low} to {high}" if low < high else str(low)
            raise InputError(f"{str(self.path)!r}: {self.prefix}{name!r} is {short(value)}; allowed: {allowed}")
        return value

    def word(self, name: str, allowed: str) -> str:
        value = self.take(name, str)
        if value != allowed:
            raise InputError(f"{str(self.path)!r}: {self.prefix}{name!r} is {short(value)}; allowed: {allowed!r}")
        return value

    def end(self) -> None:
        unknown = sorted(self.content.keys() - self.asked)
        if unknown:
            raise InputError(f"{str(self.path)!r}: {self.prefix}{short(unknown[0])} is unknown")
