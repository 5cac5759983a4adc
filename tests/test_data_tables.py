"""Tables: numbers, booleans, words, vectors; missing and unseen values; targets of every kind."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from f3triton.base.exceptions import InputError
from f3triton.data import Preprocessing, load_dataset
from f3triton.data.columns import Table

WINE = Path(__file__).parents[2] / "shared" / "data" / "wine-quality"


def pair(train, test=None, features=None):
    """A training and a test split from dicts of columns."""
    make = lambda columns: datasets.Dataset.from_dict(columns, features=features)  # noqa: E731
    return datasets.DatasetDict(train=make(train), test=make(test or train))


def described(dataset):
    return "\n".join(dataset.preprocessing.describe())


@pytest.fixture
def wine():
    if not WINE.is_dir():
        pytest.skip(f"no {WINE}")
    # Read with pandas, not through the folder, so that the test leaves no cache behind.
    files = {split: pd.read_csv(WINE / f"{split}.csv") for split in ("train", "test")}
    return datasets.DatasetDict({split: datasets.Dataset.from_pandas(frame) for split, frame in files.items()}), files


def test_wine_quality(wine):
    splits, files = wine
    train, test = load_dataset(splits, target="quality", task="regression")
    columns = {column.name: column for column in train.preprocessing.columns}
    assert columns["fixed acidity"].mean[0] == pytest.approx(7.218838, abs=5e-7)
    assert train.preprocessing.target.mean[0] == pytest.approx(5.825476, abs=5e-7)
    assert (len(train), len(test), train.in_features, train.targets.shape) == (5197, 1300, 12, (5197, 1))
    assert columns["color"].categories == ("red", "white")
    for part in (train.inputs, train.targets):
        torch.testing.assert_close(part.mean(0), torch.zeros(part.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.std(0, unbiased=False), torch.ones(part.shape[1]), atol=1e-5, rtol=0)
    white = (files["train"]["color"] == "white").to_numpy().astype(float)
    expected = (white - white.mean()) / white.std()
    np.testing.assert_allclose(train.inputs[:, 11], expected, rtol=1e-6)
    quality = train.preprocessing.unstandardise(test.targets)
    np.testing.assert_allclose(quality[:, 0], files["test"]["quality"], rtol=1e-6)


def test_wine_quality_other_tasks(wine):
    splits, _ = wine
    train, _ = load_dataset(splits, target="quality")
    assert (train.task, train.preprocessing.target_names) == ("classification", ("3", "4", "5", "6", "7", "8", "9"))
    train, _ = load_dataset(splits, target="color", features=["alcohol", "pH"])
    assert (train.task, train.in_features, train.preprocessing.target_names) == ("classification", 2, ("red", "white"))
    train, test = load_dataset(splits, target="pH,density", task="auto")
    assert (train.task, train.outputs, test.targets.shape) == ("regression", 2, (1300, 2))
    with pytest.raises(
        InputError, match=r"no column has a usual name for a target; .*--target.*columns: fixed acidity, .*color"
    ):
        load_dataset(splits)


def test_encodings():
    train, test = load_dataset(
        pair(
            {
                "number": [1.0, 2.0, 3.0, 6.0],
                "whole": [1, 1, 1, 5],
                "flag": [True, False, False, False],
                "two": ["b", "a", "a", "a"],
                "three": ["r", "g", "b", "g"],
                "constant": [0.1, 0.1, 0.1, 0.1],
                "pair": [[1.0, 10.0], [2.0, 10.0], [3.0, 10.0], [6.0, 10.0]],
                "label": [0, 1, 0, 1],
            }
        ),
    )
    std = np.sqrt(3.5)
    number = np.array([-2, -1, 0, 3]) / std
    flag = (np.array([1, 0, 0, 0]) - 0.25) / np.sqrt(3 / 16)
    expected = np.stack(
        [
            number,
            (np.array([1, 1, 1, 5]) - 2) / np.sqrt(3),
            flag,
            flag,
            *np.eye(3)[[2, 1, 0, 1]].T,
            np.zeros(4),
            number,
            np.zeros(4),
        ],
        axis=1,
    )
    np.testing.assert_allclose(train.inputs, expected, rtol=1e-6, atol=1e-7)
    assert train.inputs.dtype == torch.float32
    assert torch.equal(train.inputs, test.inputs)
    assert "7 columns as 10 inputs" in described(train)
    assert "three (b, g, r)" in described(train)


def test_missing_and_unseen_values():
    nan = float("nan")
    train, test = load_dataset(
        pair(
            {
                "n": [1.0, nan, 3.0, None],
                "flag": [True, None, False, False],
                "two": ["a", "b", None, "a"],
                "three": ["r", "g", "b", None],
                "label": [0, 1, 0, 1],
            },
            {
                "n": [None, 2.0],
                "flag": [None, True],
                "two": ["zzz", "a"],
                "three": ["purple", "r"],
                "label": [1, 0],
            },
        )
    )
    assert train.inputs[1, 0] == 0
    assert train.inputs[3, 0] == 0
    assert train.inputs[2, 2] == 0
    assert train.inputs[3, 3:].tolist() == [0, 0, 0]
    assert test.inputs[0].tolist() == [0] * 6
    assert test.inputs[1, 3:].tolist() == [0, 0, 1]
    text = described(train)
    assert "missing values filled in training rows: n 2, flag 1, two 1, three 1" in text
    assert "missing values filled in test rows: n 1, flag 1" in text
    assert "values in test rows that training did not have: two 1, three 1" in text


def test_columns_left_out():
    rows = 40
    columns = {
        "id": list(range(rows)),
        "Unnamed: 0": list(range(rows)),
        "text": [f"a sentence of its own, number {i}" for i in range(rows)],
        "nothing": [None] * rows,
        "ragged": [[1.0] * (1 + i % 2) for i in range(rows)],
        "record": [{"a": 1}] * rows,
        "x": [float(i) for i in range(rows)],
        "label": [i % 2 for i in range(rows)],
    }
    train, _ = load_dataset(pair(columns))
    assert [column.name for column in train.preprocessing.columns] == ["x"]
    for name in ("id", "Unnamed: 0", "text", "nothing", "ragged", "record"):
        assert f"left out: column '{name}' (" in described(train)
    train, _ = load_dataset(pair(columns), features="id, x")
    assert train.in_features == 2
    for name, why in {"text": "free text", "nothing": "no values", "ragged": "differing", "record": "type struct"}.items():
        with pytest.raises(InputError, match=f"column '{name}' of split 'train' cannot be a feature: .*{why}"):
            load_dataset(pair(columns), features=[name])
    with pytest.raises(
        InputError, match="no column of split 'train' can be a feature beside the target label; columns: text, label; left out"
    ):
        load_dataset(pair({k: columns[k] for k in ("text", "label")}))


def test_class_label_feature():
    features = datasets.Features(
        {
            "colour": datasets.ClassLabel(names=["red", "green", "blue"]),
            "x": datasets.Value("float32"),
            "y": datasets.Value("int8"),
        }
    )
    data = pair({"colour": [0, 1, 1, -1], "x": [0.0, 1, 2, 3], "y": [0, 1, 0, 1]}, features=features)
    train, _ = load_dataset(data, target="y")
    assert train.inputs[:, :3].tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0]]
    encode = train.preprocessing.encode
    assert torch.equal(encode({"colour": [1], "x": [1.0]}), encode({"colour": ["green"], "x": [1.0]}))
    with pytest.raises(InputError, match="holds 3 in row 0 of the rows given: allowed are 0 to 2"):
        encode({"colour": [3], "x": [1.0]})


def test_infinity_and_overflow():
    good = {"x": [1.0, 2.0, 3.0], "label": [0, 1, 0]}
    bad = {"x": [1.0, 2.0, float("-inf")], "label": [0, 1, 0]}
    with pytest.raises(InputError, match=r"column 'x' holds infinity .* in row 2 of split 'train'"):
        load_dataset(pair(bad))
    with pytest.raises(InputError, match=r"column 'x' holds infinity .* in row 2 of split 'test'"):
        load_dataset(pair(good, bad))
    with pytest.raises(InputError, match=r"row 1 of split 'test'"):
        load_dataset(pair(good, {"x": [1.0, 1e300], "label": [0, 1]}))
    with pytest.raises(InputError, match="too large to standardise"):
        load_dataset(pair({"x": [1e308, -1e308], "label": [0, 1]}))


def test_rows_are_named_as_in_the_source():
    """After a cut and a subset, a message still names the row where the user finds it."""
    columns = {"x": [float(i) for i in range(50)], "label": [i % 2 for i in range(50)]}
    columns["x"][37] = float("inf")
    with pytest.raises(InputError, match="row 37 of split 'train'"):
        load_dataset(datasets.Dataset.from_dict(columns), max_train_samples=39, max_test_samples=10, seed=0)


class TestTargets:
    @pytest.mark.parametrize(
        ("values", "task", "names"),
        [
            (["b", "a", "b", "a"], "classification", ("a", "b")),
            ([True, False, True, True], "classification", ("False", "True")),
            ([-1, 7, 7, 30], "classification", ("-1", "7", "30")),
            ([1.5, 2.0, 3.0, 4.0], "regression", ("label",)),
            ([1.0, 2.0, 3.0, 4.0], "regression", ("label",)),
            ([[1.0, 2.0], [2.0, 3.0], [1.0, 0.5], [0.0, 0.0]], "regression", ("label[0]", "label[1]")),
        ],
    )
    def test_auto(self, values, task, names):
        train, _ = load_dataset(pair({"x": [1.0, 2.0, 3.0, 4.0], "label": values}))
        assert (train.task, train.preprocessing.target_names) == (task, names)
        if task == "classification":
            assert [names[i] for i in train.targets] == [str(v) for v in values]
        else:
            back = train.preprocessing.unstandardise(train.targets)
            np.testing.assert_allclose(back, np.array(values).reshape(4, -1), rtol=1e-5, atol=1e-6)

    def test_many_integers_are_numbers(self):
        columns = {"x": [float(i) for i in range(101)], "y": list(range(101))}
        assert load_dataset(pair(columns))[0].task == "regression"
        assert load_dataset(pair(columns), task="classification")[0].outputs == 101
        assert load_dataset(pair({k: v[:100] for k, v in columns.items()}))[0].task == "classification"

    def test_whole_floats_can_be_classes(self):
        train, _ = load_dataset(pair({"x": [1.0, 2.0, 3.0], "y": [4.0, 5.0, 4.0]}), task="classification")
        assert (train.targets.tolist(), train.preprocessing.target_names) == ([0, 1, 0], ("4", "5"))

    @pytest.mark.parametrize(
        ("columns", "options", "message"),
        [
            ({"y": ["a", "b", "a"]}, {"task": "regression"}, r"target column 'y' holds class names, .* task classification"),
            ({"y": [0.5, 1.0, 2.0]}, {"task": "classification"}, r"holds 0.5 in row 0 .* use task regression"),
            ({"y": [0, 1, 0]}, {"task": "ranking"}, "task 'ranking' is unknown; allowed: auto, classification, regression"),
            ({"y": [1, 1, 1]}, {}, r"one class only \(1\)"),
            ({"y": [0.5, None, 1.0]}, {}, "target column 'y' is missing in row 1 of split 'train'"),
            ({"y": [0.5, float("nan"), 1.0]}, {}, "target column 'y' is missing in row 1"),
            ({"y": [0.5, float("inf"), 1.0]}, {}, "target column 'y' is infinite in row 1"),
            ({"y": ["a", "b", None]}, {}, "target column 'y' is missing in row 2"),
            ({"y": [{"a": 1}] * 3}, {}, "target column 'y' cannot be predicted: type struct"),
            ({"y": [0, 1, 0]}, {"target": "z"}, "no column 'z' in split 'train'; columns: x, y"),
            ({"y": [0, 1, 0]}, {"target": ""}, "names no column"),
            ({"y": [0, 1, 0]}, {"target": "x,y", "task": "classification"}, "one target column"),
            ({"y": [0, 1, 0]}, {"features": ["y"]}, "column 'y' is the target and cannot be a feature"),
            ({"y": [0, 1, 0]}, {"features": ["z"]}, "no column 'z' in split 'train'"),
            ({"y": [0, 1, 0]}, {"image": "x"}, "column 'x' holds no images but double"),
        ],
    )
    def test_errors(self, columns, options, message):
        with pytest.raises(InputError, match=message) as caught:
            load_dataset(pair({"x": [1.0, 2.0, 3.0], **columns}), **options)
        assert "\n" not in str(caught.value)

    def test_class_only_in_test(self):
        train = {"x": [1.0, 2.0, 3.0], "y": ["a", "b", "a"]}
        with pytest.raises(InputError, match=r"class 'c' in row 1 of split 'test', which no training row has; .*: a, b"):
            load_dataset(pair(train, {"x": [1.0, 2.0], "y": ["a", "c"]}))
        with pytest.raises(InputError, match="class 9 in row 0 of split 'test'"):
            load_dataset(pair({"x": [1.0, 2.0], "y": [1, 2]}, {"x": [1.0], "y": [9]}))

    def test_a_rare_class_survives_our_own_split(self):
        columns = {"x": [float(i) for i in range(50)], "y": ["rare"] + ["a", "b"] * 24 + ["a"]}
        widths = {load_dataset(datasets.Dataset.from_dict(columns), seed=seed)[0].outputs for seed in range(8)}
        assert widths == {3}

    def test_class_label(self):
        features = datasets.Features(
            {"x": datasets.Value("float32"), "animal": datasets.ClassLabel(names=["dog", "cat", "eel"])}
        )
        train, test = load_dataset(pair({"x": [1.0, 2.0, 3.0], "animal": [0, 1, 0]}, features=features))
        assert (train.outputs, train.preprocessing.target_names) == (3, ("dog", "cat", "eel"))
        encode = train.preprocessing.encode_targets
        assert encode({"animal": ["eel", "dog"]}).tolist() == encode([{"animal": 2}, {"animal": 0}]).tolist() == [2, 0]
        with pytest.raises(InputError, match=r"missing in row 1 of split 'train'.*-1 stands for none"):
            load_dataset(pair({"x": [1.0, 2.0, 3.0], "animal": [0, -1, 0]}, features=features))
        assert test.targets.tolist() == [0, 1, 0]

    def test_class_labels_in_another_order(self):
        def rows(names):
            features = datasets.Features({"x": datasets.Value("float32"), "y": datasets.ClassLabel(names=names)})
            return datasets.Dataset.from_dict({"x": [1.0, 2.0], "y": [0, 1]}, features=features)

        _, test = load_dataset({"train": rows(["dog", "cat"]), "test": rows(["cat", "dog"])})
        assert test.targets.tolist() == [1, 0]

    def test_two_class_labels(self):
        label = datasets.ClassLabel(names=["a", "b"])
        features = datasets.Features({"x": datasets.Value("float32"), "fine": label, "coarse": label})
        columns = {"x": [1.0, 2.0], "fine": [0, 1], "coarse": [1, 0]}
        with pytest.raises(InputError, match=r"several columns hold class labels \(fine, coarse\).*columns: x, fine, coarse"):
            load_dataset(pair(columns, features=features))
        assert load_dataset(pair(columns, features=features), target="fine")[0].targets.tolist() == [0, 1]

    def test_names_in_order(self):
        columns = {"x": [1.0, 2.0], "class": ["c", "d"], "Label": ["a", "b"], "z": [0.0, 1.0]}
        assert load_dataset(pair(columns))[0].preprocessing.target.columns == ("Label",)


def test_test_split_must_agree():
    train = {"x": [1.0, 2.0], "v": [[1, 2], [3, 5]], "label": [0, 1]}
    for test, message in [
        ({"v": [[1, 2], [3, 4]], "label": [0, 1]}, "no column 'x' in split 'test'; columns: v, label"),
        ({"x": [1.0, 2.0], "v": [[1, 2], [3, 4]]}, "no column 'label' in split 'test'"),
        ({"x": ["a", "b"], "v": [[1, 2], [3, 4]], "label": [0, 1]}, "column 'x' of split 'test' holds .*string, where numbers"),
        (
            {"x": [1.0, 2.0], "v": [[1], [3]], "label": [0, 1]},
            "column 'v' of split 'test' holds 1 values a row; training had 2",
        ),
        ({"x": [1.0, 2.0], "v": [[1], [3, 4]], "label": [0, 1]}, "lists of 1 and of 2 values: they must have one length"),
    ]:
        splits = {"train": datasets.Dataset.from_dict(train), "test": datasets.Dataset.from_dict(test)}
        with pytest.raises(InputError, match=message):
            load_dataset(splits)


def test_vectors():
    values = np.random.default_rng(0).normal(size=(20, 64))
    features = datasets.Features(
        {"pixels": datasets.Sequence(datasets.Value("float64"), length=64), "label": datasets.Value("int64")}
    )
    train, _ = load_dataset(pair({"pixels": values, "label": [i % 2 for i in range(20)]}, features=features))
    np.testing.assert_allclose(train.inputs, (values - values.mean(0)) / values.std(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(train.preprocessing.encode({"pixels": values}), train.inputs)
    lists = [None if i == 3 else list(row) for i, row in enumerate(values)]
    train, _ = load_dataset(pair({"pixels": lists, "label": [i % 2 for i in range(20)]}))
    assert train.inputs[3].tolist() == [0] * 64
    assert "filled in training rows: pixels 64" in described(train)


class TestEncode:
    @pytest.fixture
    def trained(self):
        return load_dataset(pair({"n": [1.0, 2.0, 4.0], "c": ["a", "b", "c"], "f": [True, False, True], "label": [0, 1, 0]}))[0]

    def test_raw_rows_in_every_form(self, trained):
        frame = pd.DataFrame({"n": [1.0, 4.0], "c": ["a", "c"], "f": [True, True], "ignored": [object(), None]})
        expected = trained.inputs[[0, 2]]
        forms = [
            frame,
            frame.drop(columns="ignored").to_dict("list"),
            frame.to_dict("records"),
            datasets.Dataset.from_pandas(frame.drop(columns="ignored")),
            {"n": torch.tensor([1.0, 4.0]), "c": np.array(["a", "c"]), "f": [1, 1]},
            frame.astype({"c": "category"}),
        ]
        for form in forms:
            out = trained.preprocessing.encode(form)
            assert torch.equal(out, expected)
            assert torch.equal(trained.preprocessing.normalise(out), expected)

    def test_a_stored_copy_encodes_alike(self, trained):
        stored = Preprocessing.from_json(json.loads(json.dumps(trained.preprocessing.to_json(), allow_nan=False)))
        assert stored == trained.preprocessing
        rows = [{"n": 3.0, "c": "c", "f": False}, {"n": None, "c": "unseen", "f": None}]
        assert torch.equal(stored.encode(rows), trained.preprocessing.encode(rows))
        assert stored.encode(rows)[1].tolist() == [0] * 5

    def test_errors(self, trained):
        encode = trained.preprocessing.encode
        with pytest.raises(InputError, match="no column 'c' in the rows given; columns: n, f"):
            encode([{"n": 1.0, "f": True}])
        with pytest.raises(InputError, match="no column 'c' in the rows given"):
            encode(pd.DataFrame({"n": [1.0], "f": [True]}))
        with pytest.raises(InputError, match="column 'n' of the rows given mixes kinds"):
            encode([{"n": 1.0, "c": "a", "f": True}, {"n": "x", "c": "a", "f": True}])
        with pytest.raises(InputError, match="where numbers are needed"):
            encode([{"n": "x", "c": "a", "f": True}])
        with pytest.raises(InputError, match="holds infinity"):
            encode([{"n": float("inf"), "c": "a", "f": True}])
        with pytest.raises(InputError, match="differ in length"):
            encode({"n": [1.0], "c": ["a", "b"], "f": [True]})
        with pytest.raises(InputError, match="single float; give a list of dicts"):
            encode({"n": 1.0, "c": "a", "f": True})
        with pytest.raises(InputError, match="are a Tensor: give"):
            encode(torch.zeros(2, 3))

    def test_no_rows(self, trained):
        assert trained.preprocessing.encode([]).shape == (0, 5)

    def test_unstandardise(self):
        train, _ = load_dataset(pair({"x": [1.0, 2.0, 3.0], "a": [1.0, 2.0, 6.0], "b": [10.0, 0.0, 5.0]}), target=["a", "b"])
        out = train.preprocessing.unstandardise(train.targets.double())
        np.testing.assert_allclose(out, [[1, 10], [2, 0], [6, 5]], rtol=1e-6, atol=1e-6)
        assert train.preprocessing.target_names == ("a", "b")


def test_the_work_grows_with_the_columns_and_not_with_their_square(monkeypatch):
    """The names of a table are asked for once, however many columns are looked up."""
    columns = {f"c{i}": [float(i % 3 + j) for j in range(4)] for i in range(300)}
    asked = []

    class Counted:
        def __init__(self, table):
            self.table = table

        @property
        def column_names(self):
            asked.append(1)
            return self.table.column_names

        def __getattr__(self, name):
            return getattr(self.table, name)

    from_dataset = Table.from_dataset
    monkeypatch.setattr(Table, "from_dataset", lambda *a: replace(t := from_dataset(*a), table=Counted(t.table)))
    train, _ = load_dataset(pair({**columns, "y": ["no", "yes"] * 2}))
    assert train.in_features == 300
    assert len(asked) < 20

    class Row(dict):
        def __iter__(self):
            raise AssertionError("all keys of a row were gone through")

    rows = [Row(dict.fromkeys(columns, 1.0)) for _ in range(3)]
    assert train.preprocessing.encode(rows).shape == (3, 300)


def test_classes_that_hold_a_comma_are_told_apart():
    train, _ = load_dataset(pair({"x": [1.0, 2.0, 3.0, 4.0], "label": ["No", "Yes, sir"] * 2}))
    assert "2 classes: No, 'Yes, sir'" in described(train)


def told_of(**columns):
    return described(load_dataset(pair(columns), target="y")[0])


def test_numbers_that_are_words_are_told():
    values = [f"{i / 8}" for i in range(60)]
    for odd, why in (("?", "numbers but for '?': leave missing ones empty"), ("1,5", "numbers with commas, such as '1,5': ")):
        told = told_of(x=[*values[:59], odd], few=[odd, *values[:11]] * 5, w=[0.5] * 60, y=["a", "b"] * 30)
        assert f"left out: column 'x' (words, 60 distinct values in 60 rows; {why}" in told
        assert f"taken for words: column 'few' ({why}" in told
    assert "taken" not in told_of(x=[f"word {i % 20}" for i in range(60)], y=["a", "b"] * 30)


def test_odd_targets_are_told():
    x = [float(i) for i in range(60)]
    told = told_of(x=x, y=[float(i % 3) for i in range(60)])
    assert "target: only 3 different numbers, all whole; --task classification would make classes of them" in told
    assert "--task" not in told_of(x=x, y=[i / 2 for i in range(60)])
    told = described(load_dataset(datasets.Dataset.from_dict({"x": x, "y": [f"c{i}" for i in range(60)]}))[0])
    assert "target: 12 of 12 test rows are of classes that no training row has" in told
    with pytest.raises(
        InputError, match="target y of split 'train' is the same in every row; training needs two values or more"
    ):
        told_of(x=x, y=[2.5] * 60)
    with pytest.raises(InputError, match="target column 'y' is missing in row 1 of split 'train' and 2 more; drop such"):
        told_of(x=x, y=[1.0, None, None, None, *x[4:]])


def test_splits_that_are_not_used_are_told():
    rows = datasets.Dataset.from_dict({"x": [1.0, 2.0, 3.0] * 4, "y": ["a", "b", "a"] * 4})
    train, _ = load_dataset(datasets.DatasetDict({"train": rows, "eval": rows}))
    assert "kept for testing (seed 0); splits not used: eval" in described(train)
    with pytest.raises(InputError, match="split 'train' has 1 row, which cannot be split; columns: x, y"):
        load_dataset(rows.select([0]))
