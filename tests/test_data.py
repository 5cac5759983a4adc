"""Data sets as tensors: the bundled digits, rows by index, splits, subsets, and data sets made of tensors."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch

from f3triton.base.exceptions import InputError
from f3triton.data import Dataset, Preprocessing, load_dataset


def table(rows=40, **columns):
    """A `datasets.Dataset` of numbers x, a balanced integer label, and whatever else is given."""
    return datasets.Dataset.from_dict({"x": [float(i) for i in range(rows)], "label": [i % 2 for i in range(rows)], **columns})


@pytest.fixture(scope="module")
def digits():
    return load_dataset()


def test_import_is_light():
    code = "import sys, f3triton.data; print([m for m in ('datasets', 'pandas', 'pyarrow') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_digits(digits):
    train, test = digits
    assert (len(train), len(test)) == (1438, 359)
    assert train.inputs.dtype == torch.uint8
    assert train.inputs.is_contiguous()
    assert (train.name, train.task, train.outputs, train.in_features) == ("digits", "classification", 10, 64)
    assert train.targets.dtype == torch.int64
    assert test.targets.bincount().min() >= 35
    assert train.preprocessing is test.preprocessing
    assert train.preprocessing.target_names == tuple("0123456789")
    # Seventeen grey levels, 0 to 16, from which the source's numbers come back.
    levels = (train.inputs.double() * 16 / 255).round()
    assert torch.equal((levels * 255 / 16).round().to(torch.uint8), train.inputs)
    assert levels.max() == 16


def test_fetch_normalises_by_training_statistics(digits):
    train, _ = digits
    everything = torch.arange(len(train))
    x = train.fetch(everything, torch.float64)
    assert x.shape == (1438, 64)
    assert x.mean().abs() < 1e-12
    assert (x.std(unbiased=False) - 1).abs() < 1e-12
    mean, std = train.preprocessing.mean[0], train.preprocessing.std[0]
    torch.testing.assert_close(x, (train.inputs.double() / 255 - mean) / std)
    index = torch.tensor([5, 0, 5, 1437])
    torch.testing.assert_close(train.fetch(index), x[index].float())
    assert train.fetch(index, torch.bfloat16).dtype == torch.bfloat16
    assert train.fetch(index).data_ptr() != train.fetch(index).data_ptr()


def test_one_hot(digits):
    train, _ = digits
    index = torch.tensor([3, 1, 2])
    out = train.one_hot(index, torch.float64)
    assert torch.equal(out, torch.nn.functional.one_hot(train.targets[index], 10).double())
    assert train.one_hot(index).dtype == torch.float32


def test_to_gives_the_same_rows(digits):
    _, test = digits
    moved = test.to("cpu")
    assert moved.inputs is test.inputs
    assert moved.preprocessing is test.preprocessing
    assert "359 rows" in repr(moved)


def test_digits_need_no_writable_cache(tmp_path):
    code = "import f3triton.data as d; print(len(d.load_dataset('digits')[0]))"
    env = {"HF_HOME": "/dev/null/nowhere", "F3TRITON_CACHE": "/dev/null/nowhere", "HOME": str(tmp_path), "PATH": ""}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert out.strip() == "1438"
    assert not list(tmp_path.iterdir())


def test_splits_by_name():
    splits = datasets.DatasetDict(train=table(20), validation=table(10), other=table(8))
    train, test = load_dataset(splits)
    assert (len(train), len(test)) == (20, 10)
    train, test = load_dataset(splits, train_split="other", test_split="train")
    assert (len(train), len(test)) == (8, 20)
    train, test = load_dataset(datasets.DatasetDict(anything=table(20)))
    assert (len(train), len(test)) == (16, 4)
    with pytest.raises(InputError, match=r"test split 'nope' does not exist; splits: train, validation, other"):
        load_dataset(splits, test_split="nope")
    with pytest.raises(InputError, match=r"train split 'nope' does not exist"):
        load_dataset(splits, train_split="nope")
    with pytest.raises(InputError, match=r"no split 'train'; name one .*; splits: a, b"):
        load_dataset(datasets.DatasetDict(a=table(), b=table()))


def test_cut_is_seeded_and_complete():
    def rows(part):
        return (
            part.inputs[:, 0].double() * part.preprocessing.columns[0].std[0] + part.preprocessing.columns[0].mean[0]
        ).round()

    train, test = load_dataset(table(100), test_fraction=0.3, seed=1)
    again, _ = load_dataset(table(100), test_fraction=0.3, seed=1)
    other, _ = load_dataset(table(100), test_fraction=0.3, seed=2)
    assert (len(train), len(test)) == (70, 30)
    assert sorted(torch.cat([rows(train), rows(test)]).tolist()) == list(range(100))
    assert torch.equal(train.inputs, again.inputs)
    assert not torch.equal(rows(train), rows(other))
    assert torch.equal(rows(train), rows(train).sort().values)  # the order of the source is kept
    assert "30 of the 100 rows" in " ".join(train.preprocessing.describe())
    # The very rows, so that a change of the rule (or of NumPy) cannot pass unseen: stored runs depend on it.
    assert rows(test)[:8].tolist() == [2, 9, 16, 18, 19, 21, 27, 28]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_cut_fraction_is_checked(fraction):
    with pytest.raises(InputError, match=r"test_fraction .* allowed: between 0 and 1"):
        load_dataset(table(), test_fraction=fraction)


def test_subsets_keep_the_classes_of_sorted_data():
    splits = datasets.DatasetDict(train=table(200, label=[i // 100 for i in range(200)]), test=table(100))
    train, test = load_dataset(splits, max_train_samples=40, max_test_samples=10)
    assert (len(train), len(test)) == (40, 10)
    assert train.targets.bincount().min() > 10
    smaller, _ = load_dataset(splits, max_train_samples=20)
    larger, _ = load_dataset(splits, max_train_samples=10_000)
    assert len(larger) == 200

    def rows(part):
        column = part.preprocessing.columns[0]
        return set((part.inputs[:, 0].double() * column.std[0] + column.mean[0]).round().tolist())

    assert rows(smaller) < rows(train)
    with pytest.raises(InputError, match=r"max_train_samples \(--max-train-samples\) is 0; allowed: 1 or more"):
        load_dataset(splits, max_train_samples=0)
    with pytest.raises(InputError, match="seed"):
        load_dataset(splits, seed=-1)


def test_empty_split():
    with pytest.raises(InputError, match="split 'test' is empty"):
        load_dataset(datasets.DatasetDict(train=table(), test=table().select([])))
    with pytest.raises(InputError, match="split 'train' is empty"):
        load_dataset(table().select([]))
    with pytest.raises(InputError, match="cannot be split"):
        load_dataset(table(1))


def test_rows_of_a_filtered_data_set():
    """An indices mapping (shuffle, select, filter) is followed, and rows are numbered as the user sees them."""
    shuffled = table(30).select(range(29, -1, -1))
    train, _ = load_dataset(datasets.DatasetDict(train=shuffled, test=table(4)))
    assert train.inputs[0, 0] == train.inputs.max()
    broken = datasets.Dataset.from_dict({"x": [1.0, 2.0, float("inf"), 4.0], "label": [0, 1, 0, 1]}).select([2, 3, 0, 1])
    with pytest.raises(InputError, match=r"row 0 of split 'train'"):
        load_dataset(datasets.DatasetDict(train=broken, test=table(4)))


def test_what_is_no_data_set():
    with pytest.raises(InputError, match="a list is no data set"):
        load_dataset([1, 2])
    with pytest.raises(InputError, match="load it without streaming"):
        load_dataset(table().to_iterable_dataset())


class TestFromTensors:
    def test_float64_is_kept(self):
        x = torch.randn(5, 3, dtype=torch.float64)
        data = Dataset.from_tensors(x, torch.tensor([0, 1, 2, 1, 0]))
        assert data.inputs is x
        assert (data.task, data.outputs, data.in_features) == ("classification", 3, 3)
        index = torch.tensor([4, 2])
        assert torch.equal(data.fetch(index, torch.float64), x[index])
        assert data.fetch(index).dtype == torch.float32
        assert torch.equal(data.one_hot(index, torch.float64), torch.eye(3, dtype=torch.float64)[[0, 2]])

    def test_image_shape_is_kept(self):
        data = Dataset.from_tensors(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), classes=5)
        assert data.fetch(torch.tensor([1, 2])).shape == (2, 3, 8, 8)
        assert (data.in_features, data.outputs) == (192, 5)
        assert data.preprocessing.encode(torch.zeros(2, 3, 8, 8)).shape == (2, 3, 8, 8)
        with pytest.raises(InputError, match=r"shape \[2, 192\]; this model takes \[M, 3, 8, 8\]"):
            data.preprocessing.encode(torch.zeros(2, 192))

    def test_dense_class_targets(self):
        targets = torch.tensor([[1.0, 0, 1], [0, 1, 0]], dtype=torch.float64)
        data = Dataset.from_tensors(torch.randn(2, 4), targets)
        assert data.task == "classification"
        assert torch.equal(data.one_hot(torch.tensor([1, 0]), torch.float64), targets[[1, 0]])
        assert Dataset.from_tensors(torch.randn(2, 4), targets, task="regression").task == "regression"

    def test_regression(self):
        data = Dataset.from_tensors(torch.randn(3, 4), torch.tensor([0.5, 1.0, 2.0]))
        assert (data.task, data.outputs, data.targets.shape) == ("regression", 1, (3, 1))
        assert data.one_hot(torch.tensor([2])).tolist() == [[2.0]]
        assert torch.equal(data.preprocessing.unstandardise(data.targets), data.targets)
        assert Dataset.from_tensors(torch.randn(2, 4), torch.tensor([0.0, 1.0])).task == "regression"

    @pytest.mark.parametrize(
        ("inputs", "targets", "options", "message"),
        [
            (torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(3).long(), {}, "floating point"),
            (torch.zeros(3), torch.zeros(3).long(), {}, "floating point"),
            (torch.zeros(3, 2), torch.tensor([0, 1]), {}, "3 rows of inputs and 2 of targets"),
            (torch.zeros(3, 2), torch.tensor([0, 1, 4]), {"classes": 3}, "allowed: 0 to 2"),
            (torch.zeros(3, 2), torch.tensor([0, -1, 1]), {}, "from -1 to 1"),
            (torch.zeros(3, 2), torch.zeros(3).long(), {}, "two classes or more"),
            (torch.full((3, 2), torch.nan), torch.zeros(3).long(), {}, "NaN or infinity"),
            (torch.zeros(3, 2), torch.tensor([0.0, torch.inf, 1.0]), {}, "targets of 'tensors' hold NaN or infinity"),
            (torch.zeros(3, 2), torch.zeros(3, 2).long(), {}, "class ids have shape"),
            (torch.zeros(3, 2), torch.zeros(3, 2), {"classes": 4}, "classes is 4"),
            (torch.zeros(3, 2), torch.tensor([0, 1, 1]), {"task": "regression"}, "as floats"),
            (torch.zeros(3, 2), torch.tensor([0, 1, 1]), {"task": "ranking"}, "unknown; allowed"),
            (torch.zeros(0, 2), torch.zeros(0).long(), {}, "needed are"),
        ],
    )
    def test_errors(self, inputs, targets, options, message):
        with pytest.raises(InputError, match=message):
            Dataset.from_tensors(inputs, targets, **options)

    def test_json(self):
        data = Dataset.from_tensors(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
        assert Preprocessing.from_json(json.loads(json.dumps(data.preprocessing.to_json()))) == data.preprocessing


def test_json_round_trip(digits):
    train, test = digits
    text = json.dumps(train.preprocessing.to_json(), allow_nan=False)
    stored = Preprocessing.from_json(json.loads(text))
    assert stored == train.preprocessing
    index = torch.arange(10)
    assert torch.equal(stored.normalise(test.inputs[index]), test.fetch(index))
    assert stored.describe() == train.preprocessing.describe()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sound"}, "kind is 'sound'; allowed: image, table"),
        ({"format": 2}, "format is 2; allowed: a whole number from 1 to 1"),
        ({"std": [0.0]}, "a deviation is not positive"),
        ({"std": [float("nan")]}, r"std\[0\] is nan; allowed: a finite number"),
        ({"std": []}, "differ in length"),
        ({"shape": [64]}, "is not"),
        ({"shape": [1, 0, 8]}, r"shape\[1\] is 0"),
        ({"shape": [True, 8, 8]}, r"shape\[0\] is True"),
        ({"shape": "188"}, "shape is '188'; allowed: a list"),
        ({"mean": ["a"]}, r"mean\[0\] is 'a'; allowed: a finite number"),
        ({"target": {}}, "target is 'without task'; allowed: the fields task, columns"),
        ({"extra": 1}, "is 'with extra'; allowed: the fields"),
    ],
)
def test_broken_json(digits, change, message):
    content = digits[0].preprocessing.to_json()
    with pytest.raises(InputError, match=message):
        Preprocessing.from_json({**content, **change})
    with pytest.raises(InputError, match="allowed: an object"):
        Preprocessing.from_json([content])


def test_no_hidden_random_state():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    load_dataset(table(), max_train_samples=10)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
