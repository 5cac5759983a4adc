"""Recipes: every run is made of options that exist, and trains on made-up rows of the data set's own columns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train_script import main

from f3triton.base.exceptions import InputError
from f3triton.data import load_dataset
from f3triton.recipes import read_recipe, recipe_names
from f3triton.recipes.tables import open_data
from f3triton.run.options import make_parser, parse

ROWS = 60


def made_up(schema: dict[str, str], header: bool, folder: Path) -> Path:
    """A file of rows of the columns that a recipe's schema describes, every class and word in it."""
    generator = np.random.default_rng(0)
    columns = {}
    for name, kind in schema.items():
        word, *rest = kind.split()
        if word == "integer":
            low, high = map(int, rest)
            columns[name] = [low, high, *generator.integers(low, high, ROWS - 2, endpoint=True)]
        elif word == "number":
            columns[name] = generator.normal(size=ROWS).round(4).tolist()
        elif word == "word":
            columns[name] = [rest[i % len(rest)] for i in range(ROWS)]
        elif word == "class":
            columns[name] = [i % int(rest[0]) for i in range(ROWS)]
        else:
            width, height = map(int, rest[0].split("x"))
            shape = (height, width) if rest[1] == "grey" else (height, width, 3)
            columns[name] = [Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8)) for _ in range(ROWS)]
    if any(kind.startswith("image") for kind in schema.values()):
        import datasets

        features = {name: datasets.Image() if kind.startswith("image") else datasets.ClassLabel(num_classes=10)
                    for name, kind in schema.items()}  # fmt: skip
        datasets.Dataset.from_dict(columns, datasets.Features(features)).save_to_disk(folder / "rows")
        return folder / "rows"
    path = folder / "rows.csv"
    lines = [",".join(columns)] if header else []
    lines += [", ".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_every_run_is_made_of_options_that_exist(name: str) -> None:
    recipe = read_recipe(name)
    options = {action.dest: action for action in make_parser()._actions}
    assert set(recipe.published) <= set(recipe.runs)
    for run in [None, *recipe.runs]:
        for key, value in recipe.options_of(run).items():
            assert key in options, f"{run}: {key}"
            allowed = options[key].choices
            assert allowed is None or value in allowed, f"{run}: {key} = {value!r}"
        parsed = parse(["--recipe", f"{name}/{run}" if run else name])
        assert all(isinstance(size, int) for size in parsed.hidden or [])
    assert parse(["--recipe", name, "--lr", "0.5"]).lr == 0.5


@pytest.mark.parametrize("name", recipe_names())
def test_trains_on_rows_of_its_schema(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name)
    run = next(run for run in recipe.runs if run.startswith("f3"))
    schema = {column: recipe.schema.get(column, "number") for column in recipe.data.get("names", recipe.schema)}
    data = made_up(schema, "names" not in recipe.data, tmp_path)
    arguments = ["--recipe", f"{name}/{run}", "--dataset", str(data), "--epochs", "1", "--quiet", "--device", "cpu"]
    if recipe.options["model"] == "mlp":
        arguments += ["--hidden", "8"]
    assert main([*arguments, "--output-dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["epochs"] == 1
    assert summary["task"] == recipe.options.get("task", "classification")
    assert main(["--evaluate", str(tmp_path / "run"), "--quiet"]) == 0


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--recipe", "mnist/nothing"]) == 2
    assert "has no run 'nothing'" in capsys.readouterr().err
    assert main(["--recipe", "sgemm"]) == 2
    assert "needs its data: sgemm_product.csv" in capsys.readouterr().err
    short = tmp_path / "short.csv"
    short.write_text("1,2,3\n4,5,6\n")
    with pytest.raises(InputError, match="has 3 columns, the recipe names 15"):
        open_data(read_recipe("census-income"), str(short))
    with pytest.raises(InputError, match=r"no column 'MWG', which recipe 'sgemm' needs"):
        open_data(read_recipe("sgemm"), str(short))


def test_the_mean_of_columns_is_the_target(tmp_path: Path) -> None:
    recipe = read_recipe("sgemm")
    path = made_up(recipe.schema, True, tmp_path)
    rows = open_data(recipe, str(path))["train"]
    runs = np.array([[float(value) for value in line.split(", ")[-4:]] for line in path.read_text().splitlines()[1:]])
    np.testing.assert_allclose(rows["runtime"], runs.mean(1))
    assert "Run1 (ms)" not in rows.column_names
    path.write_text(path.read_text().replace(f"{runs[3, 1]}", "slow", 1))
    with pytest.raises(InputError, match=r"'runtime' is the mean of .*, which are no numbers"):
        open_data(recipe, str(path))


@pytest.mark.parametrize("name", [name for name in recipe_names() if read_recipe(name).data.keys() & {"names", "mean"}])
def test_a_table_in_any_form(name: str, tmp_path: Path) -> None:
    """A text file with a header and packed, a parquet file, a folder, a saved data set and a stream give the same rows."""
    import pandas

    recipe = read_recipe(name)
    plain = made_up(recipe.schema, True, tmp_path)
    frame = pandas.read_csv(plain, skipinitialspace=True)
    for column in recipe.data.get("names", []):  # one that is no feature
        if column not in frame:
            frame[column] = 1.0
    frame = frame[recipe.data.get("names", list(frame))]
    (tmp_path / "folder").mkdir()
    forms = [tmp_path / "packed.csv.gz", tmp_path / "one.parquet", tmp_path / "folder", tmp_path / "saved"]
    frame.to_csv(forms[0], index=False)
    frame.to_parquet(forms[1], index=False)
    frame.to_parquet(forms[2] / "train.parquet", index=False)
    import datasets

    datasets.Dataset.from_pandas(frame).save_to_disk(forms[3])
    options = {"target": recipe.options["target"], "task": recipe.options["task"], "test_fraction": 0.2}
    found = [load_dataset(open_data(recipe, str(form)), **options) for form in forms]
    for train, test in found[1:]:
        assert torch.equal(train.inputs, found[0][0].inputs)
        assert torch.equal(test.targets, found[0][1].targets)
    assert main(["--recipe", name, "--dataset", str(forms[2]), "--streaming", "--epochs", "5", "--hidden", "8", "--quiet",
                 "--device", "cpu", "--output-dir", str(tmp_path / "run")]) == 0  # fmt: skip


REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize(
    ("name", "where", "inputs"),
    [
        ("sgemm", "sgemm", 14),
        ("sgemm", "originals/sgemm_product.csv.gz", 14),
        ("kddcup99", "kddcup99", None),
        ("census-income-kdd", "census-income-kdd", None),
        ("wine-quality", "wine-quality", 12),
        ("wine-quality-classes", "wine-quality", 12),
        ("mnist", "mnist", 784),
        ("cifar10", "cifar10", 3072),
    ],
)
def test_real_files(name: str, where: str, inputs: int | None, tmp_path: Path) -> None:
    """A slice of the published data; of a folder's parquet files every n-th row, to be read quickly."""
    source = REAL / where
    if not source.exists():
        pytest.skip(f"the published files are not there: {source}")
    if source.is_dir():
        import pyarrow.parquet as pq

        for path in source.glob("*.parquet"):
            rows = pq.read_table(path)
            pq.write_table(rows.take(np.arange(0, len(rows), len(rows) // 1500)), tmp_path / path.name)
        source = tmp_path if list(tmp_path.iterdir()) else source
    run = next(run for run in read_recipe(name).runs if run.startswith("f3"))
    arguments = ["--recipe", f"{name}/{run}", "--dataset", str(source), "--epochs", "1", "--hidden", "8", "--quiet", "--device",
                 "cpu", "--max-train-samples", "1000", "--max-test-samples", "200"]  # fmt: skip
    assert main([*arguments, "--output-dir", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert inputs is None or np.prod(config["preprocessing"]["shape"]) == inputs
    assert "instance_weight" not in json.dumps(config["preprocessing"])
