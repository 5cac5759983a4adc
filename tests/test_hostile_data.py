"""Data sets that somebody damaged or made up: a run, or one line, in bounded time and memory."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sandbox import attempt
from test_train_script import main

if sys.platform != "linux":
    pytest.skip("processes are bounded as Linux does it", allow_module_level=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("F3TRITON_CACHE", str(tmp_path / "images"))
    monkeypatch.chdir(tmp_path)


def train(*arguments: object) -> int:
    return main(["--no-compare", "--quiet", "--hidden", "8", "--epochs", "1", "--output-dir", "run", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """The one line that ends such a run."""
    found = attempt(lambda: train(*arguments), seconds=15, memory=1 << 30)
    assert not found.wrong, found
    assert found.code == 2, found
    assert found.peak < 1 << 29, found
    return found.err


def png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder in which a parquet file has 20 images, and one more to come by its path."""
    (tmp_path / "data").mkdir()
    (tmp_path / "outside.png").write_bytes(png(0))
    (tmp_path / "data" / "inside.png").write_bytes(png(1))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "outside.png")
    os.mkfifo(tmp_path / "data" / "pipe")
    return tmp_path / "data"


def write(folder: Path, path: str) -> None:
    rows = [*({"bytes": png(i), "path": None} for i in range(20)), {"bytes": None, "path": path}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, kind), "label": [i % 2 for i in range(21)]}), folder / "train.parquet")


@pytest.mark.parametrize(
    "path",
    ["/dev/zero", "pipe", "a\0b", "../outside.png", "{}/outside.png", "link.png", "x" * 5000, "/", "http://localhost:1/"],
)
@pytest.mark.parametrize("way", ["file", "folder", "stream"])
def test_paths_of_images(path: str, way: str, images: Path) -> None:
    write(images, path.format(images.parent))
    stream = ["--streaming", "--epochs", "5"] * (way == "stream")
    source = images / "train.parquet" if way == "file" else images
    assert "the image " in refused("--dataset", source, *stream)


def test_a_path_inside_of_the_folder(images: Path) -> None:
    write(images, "inside.png")
    for source in (images / "train.parquet", images):
        assert not attempt(lambda source=source: train("--dataset", source, "--overwrite")).code


def test_a_parquet_file_of_more_rows_than_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("f3triton.data.sources.available_memory", lambda: 1 << 20)
    pq.write_table(pa.table({name: np.zeros(100_000, np.int8) for name in ("a", "y")}), "rows.parquet")
    assert (tmp_path / "rows.parquet").stat().st_size < 5000
    assert "the parquet files hold 1.5 MiB" in refused("--dataset", "rows.parquet")


PICTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "wide": (lambda path: Image.new("1", (12_000, 12_000)).save(path), "12000x12000 pixels; allowed are"),
    "postscript": (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"), "it is no image file"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(kind: str, tmp_path: Path) -> None:
    make, message = PICTURES[kind]
    for label in "ab":
        (tmp_path / "data" / "train" / label).mkdir(parents=True)
        for i in range(3):
            make(tmp_path / "data" / "train" / label / f"{i}.png")
    for size in ([], ["--image-size", 8]):
        assert message in refused("--dataset", tmp_path / "data", *size)


@pytest.mark.parametrize("side", [4096, 1 << 40])
def test_sizes_of_images_that_no_memory_holds(side: int, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("f3triton.data.images.available_memory", lambda: 1 << 20)
    write(images, "inside.png")
    assert "272.0 MiB" in (told := refused("--dataset", images, "--image-size", side)) or "allowed: a whole number" in told


END = ((1 << 63) - 1) // 1000  # parquet has milliseconds


@pytest.mark.parametrize(
    "kind", [*map(pa.timestamp, ("s", "ms", "us", "ns")), pa.timestamp("s", "Asia/Tokyo"), "zone"], ids=str
)
def test_dates_at_the_end_of_time(kind: object) -> None:
    unknown = kind == "zone"
    values = pa.array([END, -END, 0, None] * 10, pa.timestamp("s", "Mars/" + "x" * 999) if unknown else kind)
    pq.write_table(pa.table({"when": values, "y": [0, 1] * 20}), "rows.parquet")
    if unknown:
        assert "column 'when' of split 'train' cannot be read as dates" in refused("--dataset", "rows.parquet")
        return
    found = attempt(lambda: train("--dataset", "rows.parquet"), seconds=15)
    assert not found.wrong, found


@pytest.mark.parametrize("text", ["9" * 1_000_000, "2024-01-01" + " " * 1_000_000, "2024-01-01T" + "0" * 1_000_000, "\\0-1-1"])
def test_text_that_is_nearly_a_date(text: str) -> None:
    rows = pa.table({"when": ["2024-01-01", "2024-01-02", text] * 20, "y": [0, 1, 1] * 20})
    pq.write_table(rows, "rows.parquet")
    found = attempt(lambda: train("--dataset", "rows.parquet"), seconds=15, memory=1 << 30)
    assert not found.wrong, found


def test_more_images_than_memory_holds(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("f3triton.data.images.available_memory", lambda: 1000)
    write(images, "inside.png")
    assert "holds 17 images of 8x8, which need 1.1 KiB" in refused("--dataset", images)


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "null\n",
        '\ufeffnull\n{"a":1}',
        '[null, {"a": 1}]',
        '{"a": 1}\nnull\n',
        "[" * 99_999,
        '{"a": ' * 99_999 + "1" + "}" * 99_999,
        f'{{"a": {"[" * 99_999}{"]" * 99_999}}}',
        f'{{"a": 1, "y": "{"x" * 5_000_000}"}}\nnull\n',
    ],
    ids=range(9),
)
def test_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(content)
    for source in ("data", "data/train.jsonl"):
        assert "file 'train.jsonl' holds " in refused("--dataset", source)


def test_json_that_only_looks_so(tmp_path: Path) -> None:
    row = '{"a": %d, "b": null, "y": "null [[[[{ \\" null", "z": "\\\\"}\n'
    (tmp_path / "data.json").write_text("".join(row.replace("null [", f"{i % 2} [") % i for i in range(40)))
    assert not attempt(lambda: train("--dataset", "data.json", "--target", "y")).code


@pytest.mark.parametrize("name", ["../outside.csv", "{}/outside.csv"])
def test_a_description_that_names_files_outside(name: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for path in (tmp_path / "data" / "x.csv", tmp_path / "outside.csv"):
        path.write_text("a,y\n" + "1,0\n2,1\n" * 20)
    text = f"---\nconfigs:\n- config_name: default\n  data_files: {name.format(tmp_path)}\n---\n"
    (tmp_path / "data" / "README.md").write_text(text)
    assert "outside.csv" in refused("--dataset", "data")


@pytest.mark.parametrize("options", [["--target", "y"], ["--target", "a"], ["--text", "a"]], ids=str)
def test_text_that_is_none(options: list[str]) -> None:
    raw = pa.array([b"one", b"two\xff", b"three"] * 20).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"a": text, "y": [0, 1, 2] * 20}), "rows.parquet")
    found = attempt(lambda: main(["--dataset", "rows.parquet", "--epochs", "1", "--output-dir", "run", *options]), seconds=15)
    assert not found.wrong, found
    assert found.code == 2, found


def test_targets_beyond_the_scale_of_training(tmp_path: Path) -> None:
    for split, last in (("train", 2.0), ("test", 1e200)):
        rows = "".join(f"{i},{i / 7}\n" for i in range(20)) + f"1,{last}\n"
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.csv").write_text(f"a,y\n{rows}")
    assert "holds values too large" in refused("--dataset", "data", "--task", "regression")


def test_json_in_an_archive(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "train.zip", "w") as archive:
        archive.writestr("train.json", "null\n")
    assert "file 'train.json' holds a row that is null" in refused("--dataset", "data")


@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "/dev/zero", 3])
def test_a_saved_data_set_that_names_files_outside(name: object, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"a": list(range(40)), "y": [0, 1] * 20})
    for folder in ("data", "other"):
        rows.save_to_disk(str(tmp_path / folder))
    state = json.loads((tmp_path / "data" / "state.json").read_text())
    (tmp_path / "data" / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
    assert "names the file" in refused("--dataset", "data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--hidden 8x99999999", "has more than 1000 layers"),
        ("--hidden 30000000 30000000", "not enough memory: the weights need 3.2 PiB"),
        ("--text /dev/zero", "'/dev/zero' is not a regular file"),
    ],
)
def test_sizes_that_are_computed_first(arguments: str, message: str) -> None:
    assert message in refused(*arguments.split())
