"""Tables of strangers: columns of dates, and of more words than can be listed."""

import csv
import datetime
import io
import json
from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from test_data_tables import described, pair

from f3triton.base.exceptions import InputError
from f3triton.data import Preprocessing, dates, load_dataset, stream_dataset
from f3triton.data.tables import hashes_of

DAYS = np.datetime64("2023-12-30") + np.arange(60)


def table(values, **others):
    return {"when": values, **others, "y": [i / 7 for i in range(len(values))]}


@pytest.fixture(scope="module")
def fitted():
    return load_dataset(pair(table(DAYS.astype(str).tolist())))[0]


def test_the_calendar():
    values = np.array(["2024-02-29T06:00", "1969-12-28", "NaT"], "datetime64[s]")
    angle = 2 * np.pi * np.array([1 / 12, 3 / 7, 11 / 12, 6 / 7])  # February, Thursday, December, Sunday
    expected = [
        [2024, np.sin(angle[0]), np.cos(angle[0]), np.sin(angle[1]), np.cos(angle[1]), 19782.25],
        [1969, np.sin(angle[2]), np.cos(angle[2]), np.sin(angle[3]), np.cos(angle[3]), -4],
        [np.nan] * 6,
    ]
    np.testing.assert_allclose(dates.calendar(values), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("2024-02-29", "2024-02-29"),
        ("2024/2/9", "2024-02-09"),
        ("09.02.2024", "2024-02-09"),
        (" 2024-02-09 8:05 ", "2024-02-09T08:05"),
        ("2024-02-09T08:05:07.25+02:00", "2024-02-09T08:05:07"),
        ("31.12.1999 23:59:59 Z", "1999-12-31T23:59:59"),
        ("", "NaT"),
        (None, "NaT"),
        *(
            (wrong, None)
            for wrong in ("2023-02-29", "2024-13-01", "0000-00-00", "12.31.2024", "20240209", "2024-02", "2024-02/09")
        ),
        *((wrong, None) for wrong in ("2024-02-09T24:00", "2024-02-09 8", "١٢٣٤-01-01", "1.2.3", "2024-02-09x")),
    ],
)
def test_what_is_a_date(text, date):
    values, empty = dates._parse(pa.array([text], pa.string()))
    wanted = np.datetime64(date or "NaT", "s")
    assert values[0] == wanted or (np.isnat(values[0]) and np.isnat(wanted))
    assert empty[0] == (date == "NaT")


@pytest.mark.parametrize(
    "kind", ["text", pa.date32(), pa.date64(), pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.timestamp("s", "Asia/Tokyo")]
)
def test_every_type_of_date_column_gives_the_same(kind, fitted):
    """Six standardised inputs, whatever holds the dates."""
    values = pa.array(DAYS.astype("datetime64[s]"))
    if kind == "text":
        values = pa.array([f"{d:%d.%m.%Y}" for d in DAYS.tolist()])
    elif getattr(kind, "tz", None):
        values = pa.compute.assume_timezone(values, kind.tz)
    values = values if kind == "text" else values.cast(kind)
    rows = datasets.Dataset(pa.table({"when": values, "y": [i / 7 for i in range(60)]}))
    train, _ = load_dataset({"train": rows, "test": rows})
    assert train.preprocessing.columns == fitted.preprocessing.columns
    np.testing.assert_array_equal(train.inputs, fitted.inputs)
    np.testing.assert_allclose(train.inputs.mean(0), 0, atol=1e-5)
    assert train.in_features == 6
    assert "when (date)" in described(train)
    assert "dates, as year, month (sin, cos), weekday (sin, cos), elapsed days: when (6 inputs)" in described(train)


def test_raw_rows_of_every_kind(fitted):
    stored = Preprocessing.from_json(json.loads(json.dumps(fitted.preprocessing.to_json(), allow_nan=False)))
    assert stored == fitted.preprocessing
    day = DAYS[7]
    as_date, array = day.item(), np.array([day, np.datetime64("NaT")])
    noon = datetime.datetime.combine(as_date, datetime.time())
    zoned = noon.replace(tzinfo=datetime.timezone(datetime.timedelta(hours=9)))
    for value in (str(day), as_date, noon, zoned, day, day.astype("datetime64[ns]"), pd.Timestamp(noon)):
        assert stored.encode([{"when": value}]).tolist() == fitted.inputs[7:8].tolist(), value
    expected = [fitted.inputs[7].tolist(), [0] * 6]
    series = pd.Series(pd.to_datetime([str(day), None]))
    for values in (array, array.astype("datetime64[ns]"), series, series.dt.tz_localize("Europe/Berlin"), [str(day), ""]):
        assert stored.encode({"when": values}).tolist() == expected
        assert stored.encode(pd.DataFrame({"when": values})).tolist() == expected
    read = list(csv.DictReader(io.StringIO(f"when,other\n{day},x\n,y\n")))
    assert stored.encode(read).tolist() == expected
    assert stored.encode([{"when": None}]).tolist() == stored.encode([{"when": float("nan")}]).tolist() == [[0] * 6]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yesterday", "column 'when' holds 'yesterday' in row 1 of the rows given, where a date is needed, such as 2024-03-31"),
        ("2024-02-30", "'2024-02-30' in row 1"),
        ("x" * 10_000, r"'x{95,}\.\.\. in row 1"),
        (3, "mixes kinds of values"),
    ],
)
def test_what_is_no_date_in_raw_rows(value, message, fitted):
    with pytest.raises(InputError, match=message) as caught:
        fitted.preprocessing.encode([{"when": "2024-02-03"}, {"when": value}])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "value", [3, 2.5, True, b"2024-02-03", datetime.time(3), datetime.timedelta(3), ["2024-02-03"], {"a": 1}]
)
def test_what_cannot_be_a_date(value, fitted):
    with pytest.raises(InputError, match=r"column 'when' of the rows given holds .*, where dates are needed"):
        fitted.preprocessing.encode([{"when": value}])


def test_missing_dates_and_a_broken_one_in_test_rows():
    values = DAYS.astype(str).tolist()
    train, _ = load_dataset(pair(table([None, "", *values[2:]])))
    assert train.inputs[:2].tolist() == [[0] * 6] * 2
    assert "missing values filled in training rows: when 2" in described(train)
    with pytest.raises(InputError, match="column 'when' holds 'soon' in row 3 of split 'test', where a date is needed"):
        load_dataset(pair(table(values), table([*values[:3], "soon"])))
    with pytest.raises(InputError, match=r"cannot be read as dates: .*Mars"):
        load_dataset(
            datasets.Dataset(
                pa.table({"when": pa.array([1] * 9, pa.timestamp("s", "Mars/One")), "y": [i / 8 for i in range(9)]})
            )
        )


def test_one_word_among_dates_makes_words_of_them():
    values = ["2024-01-01", "2024-01-02", "unknown"] * 4
    train, _ = load_dataset(pair(table(values)))
    assert [column.kind for column in train.preprocessing.columns] == ["category"]
    assert load_dataset(pair({"x": [0.5] * 12, "y": values[:2] * 6}))[0].preprocessing.target_names == (
        "2024-01-01",
        "2024-01-02",
    )


def test_dates_are_no_targets():
    rows = datasets.Dataset(pa.table({"x": [0.5] * 60, "y": pa.array(DAYS)}))
    with pytest.raises(InputError, match="target column 'y' cannot be predicted: it holds dates"):
        load_dataset(rows)


def test_dates_of_a_stream(tmp_path):
    path = tmp_path / "rows.csv"
    values = [*DAYS.astype(str), "later"]
    path.write_text("when,y\n" + "".join(f"{value},{i}.5\n" for i, value in enumerate(values * 2)))
    stream = stream_dataset(path, statistics_rows=25, max_test_samples=9, target="y", test_fraction=0.5)[0]
    with pytest.raises(InputError, match=r"'later' in row .*where a date is needed"):
        stream.read(stream.reader(), len(stream))


WORDS = [f"word {i * 7 % 1500}" for i in range(3200)]


@pytest.fixture(scope="module")
def hashed():
    return load_dataset(pair({"word": WORDS, "y": [i / 7 for i in range(3200)]}))[0]


def test_too_many_words_are_hashed(hashed):
    (column,) = hashed.preprocessing.columns
    assert (column.kind, column.buckets, column.categories, hashed.in_features) == ("hashed", 256, (), 256)
    assert (hashed.inputs.sum(1) == 1).all()
    assert hashed.inputs[0].equal(hashed.inputs[1500])
    assert "more than 1000 words each, hashed: word (256 inputs)" in described(hashed)
    stored = Preprocessing.from_json(json.loads(json.dumps(hashed.preprocessing.to_json())))
    assert stored == hashed.preprocessing
    out = stored.encode([{"word": "word 0"}, {"word": "never seen"}, {"word": None}])
    assert out[0].equal(hashed.inputs[0])
    assert out.sum(1).tolist() == [1, 1, 0]


def test_the_hash_is_the_same_everywhere():
    assert hashes_of(256, pa.array(["word 0", "Grün", "", None])).tolist()[:3] == [98, 212, 228]


def test_words_that_name_their_rows_are_left_out():
    train, _ = load_dataset(
        pair({"word": [f"row {i}" for i in range(3000)], "x": [0.5] * 3000, "y": [i / 7 for i in range(3000)]})
    )
    assert "left out: column 'word' (free text, 3000 distinct values in 3000 rows)" in described(train)


def test_a_run_from_before_there_were_dates_is_evaluated_as_it_was_trained(monkeypatch):
    """Its dates were words, one-hot; many words and arrow's dates were left out."""
    days = [str(day) for day in DAYS] * 60
    columns = {
        "when": days,
        "exact": [datetime.date(2024, 1, 1 + i % 9) for i in range(3600)],
        "y": [i / 7 for i in range(3600)],
    }
    data = pair({**columns, "word": (WORDS * 2)[:3600]})
    with monkeypatch.context() as before:
        before.setattr("f3triton.data.tables.are_dates", lambda text: False)
        old, _ = load_dataset(data, features=["when"])
    again, _ = load_dataset(data, preprocessing=replace(old.preprocessing))
    assert again.inputs.equal(old.inputs)
    assert "buckets" not in old.preprocessing.to_json()["columns"][0]  # so nothing that is noted of such data has changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buckets": 0}, "buckets is 0"),
        ({"buckets": 1 << 40}, "buckets is 1099511627776"),
        ({"kind": "number"}, "buckets"),
        ({"categories": ["a"]}, "categories"),
        ({"mean": [0.0], "std": [1.0]}, "statistics"),
        ({"buckets": 255}, "shape and columns disagree"),
        ({"kind": "date"}, "buckets"),
    ],
)
def test_stored_columns_that_are_broken(change, message, hashed):
    content = json.loads(json.dumps(hashed.preprocessing.to_json()))
    content["columns"][0].update(change)
    with pytest.raises(InputError, match=f"stored preprocessing is broken: .*{message}"):
        Preprocessing.from_json(content)
