"""Stores that someone damaged or made up: one clear error, nothing allocated by what they claim, nothing changed."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sandbox import attempt
from test_error_file import files, spec, visit

import f3triton as f3
from f3triton.error_store import FileStore
from f3triton.error_store.disk.format import ROWS_AT, Generation, Kind, Manifest, header, rows_file, write_manifest
from f3triton.error_store.disk.inspect import inspect, main

FILE = rows_file(1)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a sound store after two epochs."""
    folder = tmp_path_factory.mktemp("sound")
    store = FileStore.create(folder, spec())
    for epoch in range(2):
        visit([store], epoch, missing=4 * epoch)
        store.commit()
        store.release(store.epoch)
    store.close()
    return files(folder)


def refused(folder: Path, content: dict[str, bytes]) -> str:
    """The one line with which opening and inspecting such a store are refused; little memory is used, nothing changed."""
    for path in folder.iterdir():
        path.unlink()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    tracemalloc.start()
    with pytest.raises(f3.InputError) as opening:
        FileStore.open(folder, spec())
    with pytest.raises(f3.InputError) as inspecting:
        list(inspect(folder))
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()
    for error in (opening, inspecting):
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600
        assert str(error.value).isprintable()
    assert files(folder) == content
    return str(inspecting.value)


def with_manifest(content: dict[str, bytes], change: Callable[[dict], object]) -> dict[str, bytes]:
    manifest = json.loads(content["manifest.json"])
    change(manifest)
    return {**content, "manifest.json": json.dumps(manifest).encode()}


def with_header(content: dict[str, bytes], change: Callable[[dict], object], prefix: bytes = b"") -> dict[str, bytes]:
    """The header changed, and the checksum in the manifest made to fit."""
    data = content[FILE]
    fields = json.loads(data[16 : 16 + struct.unpack_from("<I", data, 12)[0]])
    change(fields)
    text = json.dumps(fields).encode()
    start = struct.pack("<8sII", b"F3ERRORS", 1, len(text))
    start = prefix + start[len(prefix) :]
    return with_crc({**content, FILE: (start + text).ljust(ROWS_AT, b"\0") + data[ROWS_AT:]})


def with_crc(content: dict[str, bytes]) -> dict[str, bytes]:
    def fit(manifest: dict) -> None:
        manifest["generations"][0]["crc32"] = zlib.crc32(content[FILE])

    return with_manifest(content, fit)


VALUES = [
    0,
    -1,
    1,
    36,
    38,
    2**31,
    2**40,
    2**63,
    2**64,
    -(2**70),
    10**30,
    1.5,
    1e300,
    True,
    None,
    "",
    "37",
    "x" * 5000,
    [],
    {},
    [[]],
]
ROWS = ("samples", "width", "codec", "row_bytes", "data")
MANIFEST = ("format", "version", "rows", "generations")
GENERATION = ("epoch", "file", "bytes", "crc32", "carried")


def same(a: object, b: object) -> bool:
    return type(a) is type(b) and a == b


def part_of(manifest: dict, part: str) -> dict:
    return {"manifest": manifest, "rows": manifest["rows"], "generation": manifest["generations"][0]}[part]


FIELDS = [("manifest", n) for n in MANIFEST] + [("rows", n) for n in ROWS] + [("generation", n) for n in GENERATION]


@pytest.mark.parametrize(("part", "name"), FIELDS)
def test_every_field_of_the_manifest(part: str, name: str, content: dict[str, bytes], tmp_path: Path) -> None:
    """Another value, another type, twice, or not there."""
    sound = part_of(json.loads(content["manifest.json"]), part)[name]
    for value in VALUES:
        fine = same(value, sound) or (name == "generations" and value == [])
        if not fine:
            refused(tmp_path, with_manifest(content, lambda m, v=value: part_of(m, part).update({name: v})))
    assert "missing" in refused(tmp_path, with_manifest(content, lambda m: part_of(m, part).pop(name)))
    text = content["manifest.json"].replace(b'"%s":' % name.encode(), b'"%s": 1, "%s":' % (name.encode(), name.encode()), 1)
    assert "twice" in refused(tmp_path, {**content, "manifest.json": text})
    assert "unknown" in refused(tmp_path, with_manifest(content, lambda m: part_of(m, part).update({"more": 1})))


@pytest.mark.parametrize("name", [*ROWS, "epoch"])
def test_every_field_of_the_header(name: str, content: dict[str, bytes], tmp_path: Path) -> None:
    sound = {**json.loads(content["manifest.json"])["rows"], "epoch": 1}[name]
    for value in VALUES:
        if not same(value, sound):
            refused(tmp_path, with_header(content, lambda h, v=value: h.update({name: v})))
    assert "missing" in refused(tmp_path, with_header(content, lambda h: h.pop(name)))
    assert "unknown" in refused(tmp_path, with_header(content, lambda h: h.update({"more": 1})))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (b"F3ERRORT", "is not a file of error rows"),
        (b"F3ERRORS\2\0\0\0", "version 2 of the format; this program reads version 1"),
        (b"F3ERRORS\0\0\0\1", "version 16777216"),
        (b"F3ERRORS\1\0\0\0\xff\xff\xff\xff", "claims 4,294,967,295 bytes, at most 16,368"),
        (b"F3ERRORS\1\0\0\0\0\0\0\0", "between its header and its rows"),
        (b"F3ERRORS\1\0\0\0\5\0\0\0", "between its header and its rows"),
    ],
)
def test_the_first_bytes(prefix: bytes, message: str, content: dict[str, bytes], tmp_path: Path) -> None:
    assert message in refused(tmp_path, with_header(content, lambda h: None, prefix))


def test_a_header_with_a_name_twice(content: dict[str, bytes], tmp_path: Path) -> None:
    data = content[FILE]
    length = struct.unpack_from("<I", data, 12)[0]
    text = b'{"epoch": 1, ' + data[17 : 16 + length]
    start = (struct.pack("<8sII", b"F3ERRORS", 1, len(text)) + text).ljust(ROWS_AT, b"\0")
    assert "twice" in refused(tmp_path, with_crc({**content, FILE: start + data[ROWS_AT:]}))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 100, ROWS_AT - 1, ROWS_AT, -1, -5, 4096])
def test_truncated_and_lengthened(size: int, content: dict[str, bytes], tmp_path: Path) -> None:
    data = content[FILE]
    for changed in (data[:size], data + bytes(max(size, 1))):
        message = refused(tmp_path, with_crc({**content, FILE: changed}))
        assert f"has {len(changed):,} bytes, but its rows need {len(data):,}" in message


def test_every_part_of_a_file_is_under_the_checksum(content: dict[str, bytes], tmp_path: Path) -> None:
    data = content[FILE]
    for at in (ROWS_AT, ROWS_AT + 333, len(data) - 1):
        changed = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        assert "is damaged: its checksum" in refused(tmp_path, {**content, FILE: changed})
    changed = data[:-1] + bytes([data[-1] ^ 4])
    assert "rows were written and 4 carried forward, of 37" in refused(tmp_path, with_crc({**content, FILE: changed}))


@pytest.mark.parametrize("name", ["/etc/passwd", "../errors-1.f3e", "./errors-1.f3e", "errors-0.f3e", "errors-01.f3e", "", "."])
def test_paths_in_the_manifest(name: str, content: dict[str, bytes], tmp_path: Path) -> None:
    message = refused(tmp_path, with_manifest(content, lambda m: m["generations"][0].update({"file": name})))
    assert "allowed: 'errors-1.f3e'" in message


def test_generations_out_of_order(content: dict[str, bytes], tmp_path: Path) -> None:
    changed = with_manifest(content, lambda m: m["generations"].append(m["generations"][0]))
    assert "lists epoch 1 twice or out of order" in refused(tmp_path, changed)


@pytest.mark.parametrize("name", [FILE, "manifest.json"])
def test_what_is_no_regular_file(name: str, content: dict[str, bytes], tmp_path: Path) -> None:
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    store.mkdir()
    elsewhere.write_bytes(content[name])
    for make in (
        lambda path: path.symlink_to(elsewhere),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.mkdir(),
        os.mkfifo,
        lambda path: None,
    ):
        for other, data in content.items():
            (store / other).write_bytes(data)
        (store / name).unlink()
        make(store / name)
        with pytest.raises(f3.InputError, match=name.replace(".", r"\.")):
            FileStore.open(store, spec())
        with pytest.raises(f3.InputError, match=name.replace(".", r"\.")):
            list(inspect(store))
        if (store / name).is_dir() and not (store / name).is_symlink():
            (store / name).rmdir()
        else:
            (store / name).unlink(missing_ok=True)
    assert elsewhere.read_bytes() == content[name]


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b'"', b"[" * 100_000, b"{" * 5, b"9" * 5000, b"NaN", b"\xff\xfe", b" " * 2**21]
)
def test_manifests_that_are_none(text: bytes, content: dict[str, bytes], tmp_path: Path) -> None:
    assert "manifest.json" in refused(tmp_path, {**content, "manifest.json": text})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
OFTEN = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@OFTEN
@given(data=st.binary(max_size=300))
def test_random_bytes(data: bytes, content: dict[str, bytes], tmp_path: Path) -> None:
    refused(tmp_path, {**content, "manifest.json": data})
    refused(tmp_path, {**content, FILE: data})
    length = len(content[FILE])
    refused(tmp_path, with_crc({**content, FILE: (data + bytes(length))[:length]}))


@OFTEN
@given(at=st.integers(0, ROWS_AT + 400), value=st.integers(1, 255))
def test_a_changed_byte(at: int, value: int, content: dict[str, bytes], tmp_path: Path) -> None:
    data = bytearray(content[FILE])
    data[at] ^= value
    refused(tmp_path, {**content, FILE: bytes(data)})


@OFTEN
@given(place=st.sampled_from(FIELDS), value=JSON)
def test_random_values(place: tuple[str, str], value: object, content: dict[str, bytes], tmp_path: Path) -> None:
    part, name = place
    sound = part_of(json.loads(content["manifest.json"]), part)[name]
    if same(value, sound) or name == "data" or value == []:
        return
    refused(tmp_path, with_manifest(content, lambda m: part_of(m, part).update({name: value})))


@OFTEN
@given(name=st.text(max_size=8), value=JSON)
def test_random_data_sets(name: str, value: object, content: dict[str, bytes], tmp_path: Path) -> None:
    """The header of the file says something else, or what it says is not of a data set at all."""
    refused(tmp_path, with_manifest(content, lambda m: m["rows"]["data"].update({name: value, "more": None})))


def test_a_data_set_whose_name_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(f3.InputError, match="too long"):
        FileStore.create(tmp_path / "store", spec(name="x" * 20_000))
    assert not (tmp_path / "store").exists()
    assert len(header(FileStore.create(tmp_path / "b", spec(name="é\ud800\n")).kind, 1)) == ROWS_AT


# --- inspect ---


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = FileStore.create(tmp_path, spec(name="a\x1b[2Jb\n"))
    assert main(["inspect", str(tmp_path)]) == 0
    assert "every row is its sample's target" in capsys.readouterr().out
    rows = torch.zeros(37, 5)
    rows[:, 1] = torch.tensor([0.0] * 10 + [-2.5e-3] * 20 + [1.0] * 6 + [7.0])
    rows[36, 0] = torch.nan
    store.write(torch.arange(37), rows)
    store.commit()
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "whole" not in out
    assert "a run is using the store" in out
    store.close()
    before = files(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert files(tmp_path) == before
    lines = out.splitlines()
    assert lines[1] == "  rows: 37 of 5 entries, float32, 20 bytes each"
    assert lines[2] == r"  data set: name 'a\x1b[2Jb\n', revision None, split 'train', rows 37, hash '00'"
    assert lines[3] == "  epoch 0: errors-0.f3e, 16.7 KiB, 0 rows carried forward, whole"
    mean, root = (6 - 0.05) / 180, ((6 + 20 * 2.5e-3**2) / 180) ** 0.5
    assert lines[5] == f"  smallest -0.0025, largest 1, mean {mean:.4g}, root mean square {root:.4g}"
    assert lines[6] == "  1 rows hold NaN or infinity"
    counts = {line[:11].strip(): int(line[11:25].replace(",", "")) for line in lines[8:]}
    assert {name: count for name, count in counts.items() if count} == {"0": 10, "to 0.003": 20, "to 1": 6}
    assert max(len(line) for line in lines) < 100


def test_inspect_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "none", tmp_path):
        assert main(["inspect", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("python -m f3triton.error_store: error: error store")
        assert error.count("\n") == 1


def made_up(folder: Path, kind: Kind, sparse: bool = False) -> Path:
    """A store whose manifest and header say the same, of zeros."""
    folder.mkdir()
    with open(folder / rows_file(0), "wb") as file:
        file.write(header(kind, 0))
        file.truncate(kind.file_bytes)
    crc = 0 if sparse else zlib.crc32((folder / rows_file(0)).read_bytes())
    write_manifest(folder, Manifest(kind, {0: Generation(0, rows_file(0), kind.file_bytes, crc, kind.samples)}))
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        Kind(1, 1 << 22, "top-1", 6, None),  # a row of 6 bytes stands for 16 MiB
        Kind(1, 1 << 22, "top-1x2000", 12_000, None),
        Kind(1, 1 << 31, "top-1", 6, None),
        Kind(1, 1 << 40, "top-1", 6, None),
        Kind(1 << 38, 10, "top-1", 4, None),
        Kind(1 << 26, 4, "float32", 16, {"name": "x" * 10_000}),
    ],
    ids=str,
)
def test_a_small_store_that_says_it_is_large(kind: Kind, tmp_path: Path) -> None:
    sparse = kind.samples > 1
    try:
        folder = made_up(tmp_path / "store", kind, sparse)
    except OSError:
        pytest.skip("this file system has no files of that size")
    found = attempt(lambda: main(["inspect", str(folder)]), seconds=30, memory=1 << 30)
    assert not found.wrong, found
    assert found.code == (2 if sparse or kind.width > 1 << 22 else 0), found
    assert max(map(len, found.out.splitlines()), default=0) < 300
