"""What people bring: a table with dates, a folder of photographs, and rows to predict as they come out of a file."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_train_script import fails, run

import f3triton as f3

SMALL = ["--hidden", "8", "--epochs", "2"]


def write_sales(path: Path, rows: int = 300) -> Path:
    """Sold is more on weekends, and more each day."""
    days = np.datetime64("2023-11-01") + np.arange(rows)
    lines = [
        f"{day},{['north', 'south'][i % 2]},{i / 50 + 3 * (day.item().weekday() > 4):.2f}" if i % 29 else f",,{i / 50:.2f}"
        for i, day in enumerate(days)
    ]
    path.write_text("day,shop,sold\n" + "\n".join(lines) + "\n")
    return path


def write_photos(folder: Path, count: int = 12) -> Path:
    """Light and dark ones, no two of the same size, some of them grey."""
    draw = np.random.default_rng(0)
    for i in range(2 * count):
        label = ("dark", "light")[i % 2]
        (folder / label).mkdir(parents=True, exist_ok=True)
        shape = (9 + i, 40 - i, 3)[: 2 if i % 5 == 0 else 3]
        pixels = draw.integers(0, 128, shape, dtype=np.uint8) + 127 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{i}.{'png' if i % 3 else 'jpg'}")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and the runs on it."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("own")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
        patch.setenv("F3TRITON_CACHE", str(place / "images"))
        yield place


@pytest.fixture(scope="module")
def sales(place: Path) -> Path:
    data = write_sales(place / "sales.csv")
    assert (
        run(
            "--dataset",
            data,
            "--target",
            "sold",
            "--output-dir",
            place / "sales",
            "--hidden",
            "64",
            "--epochs",
            "40",
            "--quiet",
        )
        == 0
    )
    return place / "sales"


@pytest.fixture(scope="module")
def photos(place: Path) -> Path:
    data = write_photos(place / "photos")
    assert run("--dataset", data, "--image-size", "8", "--output-dir", place / "light", *SMALL, "--epochs", "30") == 0
    return place / "light"


def test_a_table_with_dates(sales: Path, place: Path, capsys: pytest.CaptureFixture) -> None:
    assert json.loads((sales / "config.json").read_text())["network"]["sizes"][0] == 7
    assert json.loads((sales / "summary.json").read_text())["test_mse"] < 0.4  # of the standardised target: 1 would be its mean
    assert run("--dataset", place / "sales.csv", "--target", "sold", "--dry-run", *SMALL) == 0
    out = capsys.readouterr().out
    assert "features: 2 columns as 7 inputs: day (date), shop (north, south)" in out
    assert "dates, as year, month (sin, cos), weekday (sin, cos), elapsed days: day (6 inputs)" in out
    assert run("--evaluate", sales) == 0
    assert "exactly as stored" in capsys.readouterr().out


def test_its_rows_as_strings(sales: Path, place: Path) -> None:
    with open(place / "sales.csv", newline="") as file:
        rows = list(csv.DictReader(file))[:40]
    model = f3.load(sales)
    found = model.predict(rows)
    new = place / "new.csv"
    new.write_text("shop,day\n" + "".join(f"{row['shop']},{row['day']}\n" for row in rows))
    assert run("--predict", sales, new, "--output-dir", place / "there", "--quiet") == 0
    with open(place / "there" / "new-predictions.csv", newline="") as file:
        assert [float(row["prediction"]) for row in csv.DictReader(file)] == pytest.approx(found, rel=1e-5)
    later, earlier = model.predict([{"day": day, "shop": "north"} for day in ("2024-03-09", "2023-11-04")])
    assert later > earlier


def test_a_date_that_is_none(sales: Path, place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "wrong.csv").write_text("day,shop\n2024-01-01,north\n2024-02-30,south\n")
    error = fails(capsys, "--predict", sales, place / "wrong.csv", "--output-dir", place / "there")
    assert "column 'day' holds '2024-02-30' in row 1 of 'wrong.csv', where a date is needed" in error
    assert not (place / "there" / "wrong-predictions.csv").exists()
    (place / "empty.csv").write_text("day,shop\n,\n,\n")
    assert run("--predict", sales, place / "empty.csv", "--output-dir", place / "there", "--quiet") == 0


def test_a_folder_of_photographs(photos: Path, place: Path, capsys: pytest.CaptureFixture) -> None:
    assert json.loads((photos / "summary.json").read_text())["test_error"] == 0
    assert run("--evaluate", photos) == 0
    assert "exactly as stored" in capsys.readouterr().out
    assert run("--dataset", place / "photos", "--image-size", "8", "--dry-run") == 0
    assert "images: resized to 8x8 colour" in capsys.readouterr().out
    assert "--image-size" in fails(capsys, "--dataset", place / "photos", *SMALL)


def test_its_files_are_predicted(photos: Path, place: Path) -> None:
    files = [place / "photos" / "light" / "1.png", place / "photos" / "dark" / "0.jpg"]
    assert f3.load(photos).predict([str(file) for file in files]) == ["light", "dark"]
    (place / "files.csv").write_text("image\nphotos/light/1.png\nphotos/dark/0.jpg\n")
    for source, wanted in ((files[0], ["light"]), (place / "files.csv", ["light", "dark"])):
        assert run("--predict", photos, source, "--output-dir", place / "there", "--overwrite", "--quiet") == 0
        with open(place / "there" / f"{source.stem}-predictions.csv", newline="") as file:
            assert [row["prediction"] for row in csv.DictReader(file)] == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dataset digits --image-size 0", "image_size (--image-size) is 0; allowed: a whole number from 1 to 4096"),
        ("--dataset digits --image-size big", "argument --image-size: invalid int value: 'big'"),
        ("--dataset {}/sales.csv --target sold --image-size 8", "image_size (--image-size) 8 has no effect"),
        ("--text {}/sales.csv --image-size 8", "--image-size has no effect with --text"),
        ("--predict {}/light {}/new.csv --image-size 8", "--predict goes with"),
    ],
)
def test_sizes_that_are_refused(options: str, message: str, place: Path, photos: Path, sales: Path, capsys) -> None:
    assert message in fails(capsys, *options.replace("{}", str(place)).split())


def test_one_answer_to_everything_stands_beside_a_figure(place: Path, capsys: pytest.CaptureFixture) -> None:
    """By hand: rows 0, 1, 2, ... of which the first hundred are for training."""
    values = [float(i % 7) for i in range(120)]
    for part, rows in (("train", values[:100]), ("test", values[100:])):
        lines = [f"{v},{3 * v},{'many' if v < 5 else 'few'}" for v in rows]
        (place / "plain").mkdir(exist_ok=True)
        (place / "plain" / f"{part}.csv").write_text("\n".join(["a,amount,word", *lines]))
    mean = sum(values[:100]) / 100
    mse = sum(9 * (v - mean) ** 2 for v in values[100:]) / 20
    wrong = 100 * sum(v >= 5 for v in values[100:]) / 20
    command = ["--dataset", place / "plain", *SMALL, "--epochs", "2", "--output-dir"]
    assert run(*command, place / "number", "--target", "amount", "--features", "a") == 0
    summary, out = json.loads((place / "number" / "summary.json").read_text()), capsys.readouterr().out
    assert summary["guess"]["test_mse_in_units"]["amount"] == pytest.approx(mse)
    got = summary["test_mse_in_units"]["amount"]
    told = f"amount {got**0.5:.4g} (always the training mean: {mse**0.5:.4g}; R2 {1 - got / mse:.2f})"
    assert f"root mean squared error of f3 in the target's own units: {told}\n" in out
    assert f"\nthe mean  {summary['guess']['test_mse']:13.4f}\n" in out
    assert run(*command, place / "class", "--target", "word", "--features", "a") == 0
    assert f"\nalways many  {wrong:.2f} %\n" in capsys.readouterr().out
    (place / "abab.txt").write_text("ab" * 300)
    text = ["--text", place / "abab.txt", "--context", "8", "--dim", "8", "--depth", "1", "--epochs", "1"]
    assert run(*text, "--output-dir", place / "text") == 0
    assert re.search(r"\nby frequency +1\.0000\n", capsys.readouterr().out)


def test_a_data_frame_is_a_data_set() -> None:
    frame = pd.DataFrame({"a": [float(i) for i in range(60)], "word": ["no", "yes"] * 30}, index=range(100, 160))
    train, test = f3.load_dataset(frame, target="word")
    assert (train.in_features, train.outputs, len(train), len(test)) == (1, 2, 48, 12)
    assert len(f3.load_dataset({"train": frame, "test": frame[:5]}, target="word")[1]) == 5
    with pytest.raises(f3.InputError, match="data set 'DataFrame' cannot be read: Duplicate column names"):
        f3.load_dataset(pd.concat([frame, frame], axis=1))
    with pytest.raises(f3.InputError, match=r"targets are a Series, .*: they are words, .* f3triton.load_dataset takes a data"):
        f3.Trainer(f3.models.MLP([1, 2])).fit((frame[["a"]], frame["word"]), 1)


def test_predictions_of_images_name_them(photos: Path, place: Path) -> None:
    assert run("--predict", photos, place / "photos", "--output-dir", place / "named", "--quiet") == 0
    with open(place / "named" / "photos-predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(Path(row["image"]).parent.name == row["prediction"] for row in rows)


def test_a_run_is_named_by_its_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert run("--dataset", place / "sales.csv", "--target", "sold", *SMALL, "--quiet") == 0
    assert [folder.name[:9] for folder in (place / "runs").iterdir()] == ["sales-f3-"]


def test_a_figure_that_is_no_better_than_one_answer_is_told(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "noise.csv").write_text("a,y\n" + "".join(f"{i * 37 % 11},{i % 20 == 3}\n" for i in range(60)))
    command = ["--dataset", place / "noise.csv", "--lr", "1e-9", *SMALL, "--output-dir"]
    for method, also in (("f3", ", --method local or bp"), ("bp", "")):
        assert run(*command, place / f"noise-{method}", "--method", method) == 0
        told = (
            f"{method} is no better than one answer to everything after 2 steps; to try: more --epochs, a smaller --batch-size"
        )
        assert f"{told}, another --lr{also}\n" in capsys.readouterr().out


def test_images_without_classes_and_broken_ones_are_told(place: Path, capsys: pytest.CaptureFixture) -> None:
    write_photos(place / "broken")
    kind = next(folder for folder in (place / "broken").iterdir() if folder.is_dir())
    assert "holds images and no classes; a folder of images needs a folder for each class" in fails(capsys, "--dataset", kind)
    (kind / "x.png").write_bytes(b"no image")
    assert f"({str(kind / 'x.png')!r}): it is no image file" in fails(capsys, "--dataset", place / "broken", "--image-size", 8)
