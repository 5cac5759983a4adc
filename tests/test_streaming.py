"""Streams: read in order and once a pass, visited in windows, the same from any place on; against data that is loaded whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_train_script import fails, run

import f3triton as f3
from f3triton.data import streams
from f3triton.data.identity import identity
from f3triton.data.streams import Source, StreamDataset, StreamReader
from f3triton.visits.streams import StreamOrder, StreamWindows
from f3triton.visits.windows import Windows, steps_per_epoch

ROWS = 230


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK", 17)


def table(rows: int = ROWS) -> pa.Table:
    """`x` tells the rows apart; the class goes with the second column."""
    noise = np.random.default_rng(3).normal(size=rows)
    return pa.table({"x": np.arange(rows) / 2, "z": noise, "y": np.where(noise > 0, "yes", "no")})


def write(folder: Path, kind: str, rows: int = ROWS) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table(rows), path, row_group_size=40)
    elif kind == "csv":
        table(rows).to_pandas().to_csv(path, index=False)
    else:
        table(rows).to_pandas().to_json(path, orient="records", lines=True)
    return path


def ids(data: f3.Dataset, inputs: torch.Tensor) -> list[int]:
    """Which rows of `table` these are, from their first, standardised column."""
    (mean,), (std,) = data.preprocessing.columns[0].mean, data.preprocessing.columns[0].std
    return [round(2 * (value * std + mean)) for value in inputs[:, 0].double().tolist()]


def visits(data: StreamDataset, windows: Windows, epochs: int, batch: int = 8, skip: int = 0, state: object = None) -> list:
    """The rows of every batch after the first `skip` steps, and the view."""
    view = StreamWindows(data, windows, 0, torch.device("cpu"))
    view.restore(state)
    order = StreamOrder(len(data), batch, windows, 0)
    out = []
    try:
        for epoch in range(skip // order.steps_per_epoch, epochs):
            first = skip % order.steps_per_epoch if epoch == skip // order.steps_per_epoch else 0
            for visit in order.visits(epoch, first):
                view.load(visit.window)
                out.append(ids(data, view.fetch(visit.index, torch.float64)))
    finally:
        view.close()
    return out


def trained(train: f3.Dataset, test: f3.Dataset, epochs: int = 6, **settings: object) -> tuple[torch.Tensor, list[dict]]:
    torch.manual_seed(0)
    model = f3.models.MLP([train.in_features, 12, train.outputs])
    settings = {"batch_size": 50, "window": 200, "visits": 3, "device": "cpu", **settings}
    result = f3.Trainer(model, optimizer=f3.Adam(lr=0.01), **settings).fit(train, epochs, test)
    history = [{key: value for key, value in record.items() if key != "learning_seconds"} for record in result.history]
    return torch.cat([p.detach().flatten() for p in model.parameters()]), history


@pytest.mark.parametrize(
    "settings", [{}, {"first_visit": "target", "error_dtype": "int8"}, {"method": "dfa"}, {"method": "bp"}, {"method": "fa"}]
)
def test_a_stream_in_one_buffer_is_the_data_set_that_is_loaded(settings: dict) -> None:
    loaded = trained(*f3.load_dataset("digits"), **settings)
    streamed = trained(*f3.stream_dataset("digits"), **settings)
    assert torch.equal(loaded[0], streamed[0])
    assert loaded[1] == streamed[1]
    other = trained(*f3.stream_dataset("digits", shuffle_buffer=400), **settings)
    assert not torch.equal(loaded[0], other[0])  # the order matters, so it was the same


def test_smaller_buffers_learn_too() -> None:
    _, history = trained(*f3.stream_dataset("digits", shuffle_buffer=200, statistics_rows=150), 30)
    assert history[-1]["test_error"] < 25


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_each_row_is_visited_in_its_window_and_then_never_again(tmp_path: Path, kind: str) -> None:
    data, test = f3.stream_dataset(write(tmp_path, kind), shuffle_buffer=70, statistics_rows=50)
    held_out = list(range(4, ROWS, 5))
    training = [i for i in range(ROWS) if i not in held_out]
    assert ids(data, test.inputs) == held_out
    assert len(data) == len(training) == 184
    windows = Windows(20, 3)  # buffers of 3 windows, 60 rows
    steps = steps_per_epoch(184, 8, windows)
    seen = visits(data, windows, 6)
    assert len(seen) == 6 * steps
    for pass_ in range(2):
        rows = [row for batch in seen[pass_ * 3 * steps :][: 3 * steps] for row in batch]
        done: list[int] = []
        for start in range(0, 184, 20):
            size = min(20, 184 - start)
            parts = [rows[3 * start + i * size :][:size] for i in range(3)]
            assert all(sorted(part) == sorted(parts[0]) for part in parts)
            assert len({tuple(part) for part in parts}) == (3 if size > 4 else len({tuple(part) for part in parts}))
            buffer = training[start // 60 * 60 :][:60]
            assert set(parts[0]) <= set(buffer)
            done += parts[0]
        assert sorted(done) == training
    assert seen[: 3 * steps] != seen[3 * steps :]


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("every", [None, 3])
def test_a_reader_goes_on_from_any_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: bool, every: int | None
) -> None:
    if not noted:
        monkeypatch.setattr(datasets.IterableDataset, "state_dict", lambda self: None)
        monkeypatch.setattr(datasets.IterableDataset, "load_state_dict", None)
    rows = datasets.load_dataset("parquet", data_files=str(write(tmp_path, "parquet")), split="train", streaming=True)
    source = Source(rows, "rows", "train", every)

    def values(reader: StreamReader, count: int) -> list[float]:
        rows = reader.take(count)
        return rows.table.column("x").to_pylist() if len(rows) else []

    whole = values(StreamReader(source), 1000)
    expected = [i / 2 for i in range(ROWS) if every is None or (i + 1) % every]
    assert whole == expected
    for first in (0, 1, 16, 17, 18, 51, 100, len(whole) - 1):
        reader = StreamReader(source)
        assert values(reader, first) == whole[:first]
        state = json.loads(json.dumps(reader.state()))
        assert (state["stream"] is not None) == (noted and first >= (17 if every is None else 12))
        again = StreamReader(source, state)
        for other in (reader, again):
            assert values(other, 5) + values(other, 1000) == whole[first:]
    if every is not None:
        assert values(StreamReader(source, held_out=True), 1000) == [i / 2 for i in range(ROWS) if (i + 1) % every == 0]


def test_a_run_goes_on_from_any_step(tmp_path: Path) -> None:
    data, _ = f3.stream_dataset(write(tmp_path, "csv"), shuffle_buffer=70, statistics_rows=50)
    windows = Windows(20, 3)
    whole = visits(data, windows, 6)
    view = StreamWindows(data, windows, 0, torch.device("cpu"))
    order = StreamOrder(len(data), 8, windows, 0)
    step = 0
    for epoch in range(6):
        for visit in order.visits(epoch):
            view.load(visit.window)
            step += 1
            if step % 31 == 0:
                state = json.loads(json.dumps(view.state()))
                assert visits(data, windows, 6, skip=step, state=state) == whole[step:]
                assert visits(data, windows, 6, skip=step) == whole[step:]  # by reading all that came before
    view.close()
    assert step == len(whole)


def test_a_stream_that_changed_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, "csv")
    data, _ = f3.stream_dataset(path, shuffle_buffer=70, statistics_rows=50)
    view = StreamWindows(data, Windows(20, 3), 0, torch.device("cpu"))
    view.load((0, 4))
    state = view.state()
    view.close()
    text = path.read_text().splitlines()
    text[100 - 1] = text[100 - 1].replace("49.0", "49.25")  # row 98, which is not held out
    path.write_text("\n".join(text))
    with pytest.raises(f3.InputError, match="does not hold the rows any more that it held from training row 60 on"):
        visits(data, Windows(20, 3), 3, skip=steps_per_epoch(60, 8, Windows(20, 3)) * 3, state=state)


def test_rows_are_read_a_buffer_ahead_and_no_more() -> None:
    read: list[int] = []

    def rows() -> Iterator[dict]:
        i = 0
        while True:  # it has no end
            read.append(i)
            yield {"x": i / 2, "z": float(i % 7), "y": ["a", "b"][i % 2]}
            i += 1

    stream = {"train": datasets.IterableDataset.from_generator(rows), "test": datasets.Dataset.from_list(next_rows(20))}
    source = datasets.IterableDatasetDict({"train": stream["train"], "test": stream["test"].to_iterable_dataset()})
    with pytest.raises(f3.InputError, match="does not say how many rows its split 'train' has"):
        f3.stream_dataset(source, statistics_rows=30)
    data, test = f3.stream_dataset(source, statistics_rows=30, shuffle_buffer=50, max_train_samples=1000)
    assert (len(data), len(test)) == (1000, 20)
    assert max(read) < 30 + 2 * 17
    view = StreamWindows(data, Windows(25, 2), 0, torch.device("cpu"), passes=1)
    for window in range(40):
        read.clear()
        view.load((0, window))
        if view._next is not None:
            view._next.result()
        buffers = min(window // 2 + 2, 20)
        assert not read or max(read) < buffers * 50 + 3 * 17
    view.close()


def next_rows(count: int) -> list[dict]:
    return [{"x": i / 2, "z": float(i % 7), "y": ["a", "b"][i % 2]} for i in range(count)]


def test_text_files_whose_types_change_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "late.csv"
    rows = [f"{i if i < 180 else i + 0.5},{'' if i < 40 else i % 9},{['n', 'y'][i % 2]}" for i in range(200)]
    path.write_text("\n".join(["x,z,y", *rows]) + "\n")
    data, test = f3.stream_dataset(path, shuffle_buffer=60, statistics_rows=100)
    trained(data, test, 3, window=20, batch_size=8)


def test_images_and_regression(tmp_path: Path) -> None:
    for i in range(60):
        folder = tmp_path / "pictures" / "train" / ["dark", "light"][i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 120, (6, 5), dtype=np.uint8) + 120 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    pictures = str(tmp_path / "pictures")
    loaded, _ = f3.load_dataset(pictures, test_fraction=0.2)
    source = datasets.load_dataset(pictures, split="train").shuffle(seed=1)  # an image folder is sorted by class
    data, test = f3.stream_dataset(source, shuffle_buffer=24)
    assert data.preprocessing.shape == loaded.preprocessing.shape == (1, 6, 5)
    _, history = trained(data, test, 30, window=20, batch_size=8)
    assert history[-1]["test_error"] == 0
    from_files, _ = f3.stream_dataset(pictures, shuffle_buffer=24, test_fraction=0.5)
    assert from_files.preprocessing.shape == (1, 6, 5)
    assert len(visits_of_images(from_files)) == 30

    path = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"a": np.arange(100.0), "target": np.arange(100.0) ** 2}), path)
    _, history = trained(*f3.stream_dataset(path, shuffle_buffer=20), 12, window=20, batch_size=8)
    assert history[-1]["test_mse"] < 0.5


def visits_of_images(data: StreamDataset) -> torch.Tensor:
    return data.read(data.reader(), len(data))[0]


def test_a_sorted_stream_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "sorted.parquet"
    for order in ("ascending", "mixed"):
        rows = table(200).sort_by([("y", "ascending")] if order == "ascending" else [("z", "ascending")])
        if order == "mixed":
            rows = rows.take(np.random.default_rng(0).permutation(200))
        pq.write_table(rows, path)
        for buffer in (50, 200):
            data, test = f3.stream_dataset(path, shuffle_buffer=buffer)
            warned = [note for note in data.preprocessing.describe() if "WARNING" in note and "lack 1 of the 2 classes" in note]
            assert bool(warned) == (order == "ascending" and buffer == 50)
            assert data.preprocessing is test.preprocessing


def numbered(path: Path, targets: Sequence[object]) -> Path:
    pq.write_table(pa.table({"a": np.random.default_rng(0).normal(size=len(targets)), "y": list(targets)}), path)
    return path


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_runs_of_labels_are_warned_of_wherever_the_rows_fit(kind: str, tmp_path: Path) -> None:
    labels = [f"c{i // 200}" if kind == "classes" else i / 7 for i in range(1000)]
    mixed = np.random.default_rng(0).permutation(labels).tolist()
    for name, targets in (("runs", labels), ("mixed", mixed)):
        path = numbered(tmp_path / f"{name}.parquet", targets)
        for settings in ({}, {"max_train_samples": 300}, {"shuffle_buffer": 250}):
            notes = f3.stream_dataset(path, **settings)[0].preprocessing.describe()
            assert any("WARNING" in note and "as if they were sorted" in note for note in notes) == (name == "runs")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_test_samples": 20}, "the 20 test rows are all of the class 'c0'"),
        ({"max_train_samples": 100}, "the 100 training rows are all of the class 'c0'"),
        ({"statistics_rows": 100}, "holds one class only (c0); training needs two or more; shuffle the files, or raise"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rows_of_one_class_are_refused(settings: dict, told: str, tmp_path: Path) -> None:
    with pytest.raises(f3.InputError) as caught:
        f3.stream_dataset(numbered(tmp_path / "sorted.parquet", [f"c{i // 200}" for i in range(1000)]), **settings)
    assert told in str(caught.value)


def test_a_stream_has_an_identity(tmp_path: Path) -> None:
    one, _ = f3.stream_dataset(write(tmp_path, "csv"))
    same, _ = f3.stream_dataset(write(tmp_path, "csv"))
    mixed, _ = f3.stream_dataset(write(tmp_path, "csv"), shuffle_buffer=30)
    fitted, _ = f3.stream_dataset(write(tmp_path, "csv"), statistics_rows=30)
    (tmp_path / "other").mkdir()
    other, _ = f3.stream_dataset(write(tmp_path / "other", "csv", ROWS - 3))
    assert identity(one) == identity(same)
    assert len({json.dumps(identity(data)) for data in (one, other, mixed, fitted)}) == 4
    assert identity(one)["rows"] == 184


def test_what_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet")
    for settings, line in (
        ({"shuffle_buffer": 0}, "shuffle_buffer (--shuffle-buffer) is 0; allowed: a whole number of 1 or more"),
        ({"statistics_rows": 2.5}, "statistics_rows (--statistics-rows) is 2.5"),
        ({"test_fraction": 0.7}, "allowed for a stream: above 0, at most 0.5"),
        ({"target": "none"}, "no column 'none'"),
    ):
        with pytest.raises(f3.InputError, match=re.escape(line)):
            f3.stream_dataset(path, **settings)
    data, test = f3.stream_dataset(path, shuffle_buffer=100, statistics_rows=100)
    for settings, line in (
        ({"window": "off", "visits": None}, "choose a window"),
        ({"first_visit": "stale"}, "which a stream does not keep"),
        ({"window": 150}, "does not fit into a shuffle buffer of 100"),
    ):
        with pytest.raises(f3.InputError, match=line):
            trained(data, test, 3, **settings)
    longer, _ = f3.stream_dataset(path, shuffle_buffer=100, statistics_rows=100, max_train_samples=500)
    with pytest.raises(f3.InputError, match=r"ended after 184 training rows, .* 500; .* \(--max-train-samples\) 184 would fit"):
        trained(longer, test, 3, window=50)
    with pytest.raises(f3.InputError, match="same samples again and again"):
        f3.Diagnostics(f3.Trainer(f3.models.MLP([2, 4, 2])), data)
    rows = table().to_pandas()
    rows.loc[180, "y"] = "maybe"
    rows.to_csv(tmp_path / "late.csv", index=False)
    data, test = f3.stream_dataset(tmp_path / "late.csv", shuffle_buffer=60, statistics_rows=100)
    with pytest.raises(f3.InputError, match=r"class 'maybe' in row .* raise statistics_rows"):
        trained(data, test, 3, window=20, batch_size=8)
    (tmp_path / "broken.csv").write_text(path.with_suffix(".csv").name + "\n" + "1,2\n" * 30 + '"')
    with pytest.raises(f3.InputError):
        f3.stream_dataset(tmp_path / "broken.csv")


def test_the_script_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path, "csv"), tmp_path / "run"
    options = ["--dataset", path, "--streaming", "--window", 20, "--batch-size", 8, "--shuffle-buffer", 60, "--hidden", 8]
    assert run(*options, "--statistics-rows", 90, "--output-dir", out) == 0
    printed = capsys.readouterr().out
    assert "every 5th row of 'train' kept for testing" in printed
    assert "statistics: of the first 90 training rows, of 184" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["epochs"], summary["train_samples"], summary["error_store"]["bytes"]) == (5, 184, 20 * 8)
    assert run("--evaluate", out) == 0
    assert capsys.readouterr().out.count("exactly as stored") == 2
    assert run(*options, "--dry-run") == 0
    assert "in 5 epochs" in capsys.readouterr().out
    assert run(*options, "--method", "dfa", "--compare", "--quiet", "--output-dir", tmp_path / "dfa") == 0
    assert "has no effect without --streaming" in fails(capsys, "--dataset", path, "--shuffle-buffer", 60)
    assert "--streaming has no effect with --text" in fails(capsys, "--text", path, "--streaming")
    nowhere = tmp_path / "none"
    assert "--diagnose" in fails(capsys, *options, "--diagnose", "--output-dir", nowhere)
    assert not nowhere.exists()
