"""The paper's experiments as data: one TOML file a data set, which `train.py --recipe NAME` or `NAME/RUN` takes.

A file holds `title`, `source`, perhaps a `note`, and the tables

- `data`: `dataset`, a name on the Hugging Face hub, or `get`, where to find the file that is given by `--dataset`; `names`, the
  columns of a table without a header; `mean`, new columns that are the mean of others, which are dropped
- `options`: options of `train.py`, by their long names with underscores; `runs`: by name, those that differ
- `published`: by run, figures that others report for it; `schema`: the columns, for rows made up in tests
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ..base.choices import check_word
from ..base.exceptions import InputError
from ..base.files import LARGEST_JSON, read_bytes
from ..base.text import short

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Recipe:
    """One file of `f3triton/recipes`."""

    name: str
    title: str
    source: str
    data: dict[str, Any]
    options: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    published: dict[str, dict[str, float]] = field(default_factory=dict)
    schema: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def options_of(self, run: str | None) -> dict[str, Any]:
        """The options of `train.py` for a run, or those that all share. Raises InputError for an unknown run."""
        if run is None:
            return dict(self.options)
        if run not in self.runs:
            raise InputError(f"recipe {self.name!r} has no run {run!r}; it has: {', '.join(self.runs)}")
        return {**self.options, **self.runs[run]}


def recipe_names() -> list[str]:
    """The names of all recipes."""
    return sorted(
        file.name.removesuffix(".toml") for file in resources.files(__package__).iterdir() if file.name.endswith(".toml")
    )


def read_recipe(name: str) -> Recipe:
    """The recipe of a name. Raises InputError where there is none."""
    check_word("recipe", name, recipe_names())
    content = tomllib.loads((resources.files(__package__) / f"{name}.toml").read_text(encoding="utf-8"))
    return Recipe(name, **content)


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds. Raises InputError where it cannot be read, or is none."""
    text = read_bytes(path, LARGEST_JSON)
    try:
        return tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} holds no valid TOML: {short(' '.join(str(error).split()))}") from None


def split_name(name: str) -> tuple[str, str | None]:
    """`mnist/bp` as (recipe, run); the run is None where only the recipe is named."""
    recipe, _, run = name.partition("/")
    return recipe, run or None


def open_data(recipe: Recipe, dataset: str | None) -> object:
    """What `load_dataset` takes: the data set of the recipe, or `dataset`, with columns named and averaged as the recipe says.

    Raises InputError where the recipe's data has to be given and is not, or does not have its columns.
    """
    source = dataset or recipe.data.get("dataset")
    if source is None:
        raise InputError(f"recipe {recipe.name!r} needs its data: {recipe.data['get']}")
    names, mean = recipe.data.get("names"), recipe.data.get("mean")
    if names is None and mean is None:
        return source
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"recipe {recipe.name!r} needs the path of a file, got {source!r}: {recipe.data['get']}")
    rows = _read_table(path, names)
    for column, parts in (mean or {}).items():
        missing = [part for part in parts if part not in rows.column_names]
        if missing:
            raise InputError(f"file {source!r} has no column {missing[0]!r}, which recipe {recipe.name!r} needs")
        rows = rows.map(
            lambda row, parts=parts, column=column: {column: sum(row[part] for part in parts) / len(parts)},
            remove_columns=parts,
        )
    return rows


def _read_table(path: Path, names: list[str] | None) -> Any:
    """Rows of a comma-separated file; its first line is a header unless columns are named. Raises InputError."""
    import datasets
    import pandas

    try:
        frame = pandas.read_csv(path, header=0 if names is None else None, skipinitialspace=True, comment="|")
    except (OSError, ValueError) as error:
        raise InputError(f"file {str(path)!r} cannot be read as a table: {str(error).splitlines()[0]}") from None
    if names is not None and frame.shape[1] != len(names):
        raise InputError(f"file {str(path)!r} has {frame.shape[1]} columns, the recipe names {len(names)}")
    frame.columns = names or frame.columns
    return datasets.Dataset.from_pandas(frame, preserve_index=False)
