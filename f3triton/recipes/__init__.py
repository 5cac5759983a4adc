"""The paper's experiments as data: one TOML file a data set, which `train.py --recipe NAME` or `NAME/RUN` takes.

A file holds `title`, `source`, perhaps a `note`, and the tables

- `data`: `dataset`, a name on the Hugging Face hub, or `get`, where to find the file that is given by `--dataset`; `names`, the
  columns of a table without a header; `mean`, new columns that are the mean of others, which are dropped
- `options`: options of `train.py`, by their long names with underscores; `runs`: by name, those that differ
- `published`: by run, figures that others report for it; `schema`: the columns that are used, and what is in them
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
