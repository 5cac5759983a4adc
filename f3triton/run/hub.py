"""A run's model on the Hugging Face hub: put there, and taken from there."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path

from ..base.exceptions import InputError
from ..data.columns import one_line
from .checkpoint import BEST
from .console import shown
from .folder import json_text, read_json

FILES = ("config.json", "metrics.jsonl", "model.safetensors", BEST, "summary.json")  # that go there, beside a README.md
PREFIX = "hf:"
PATHS = ("dataset", "text", "tokenizer", "init_from", "error_store", "output_dir")  # options that may be


def check_name(name: str | None) -> None:
    """Raise InputError for what is no name of a model on the hub."""
    if name is None:
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        wrong = name.count("/") != 1
    except HFValidationError:
        wrong = True
    if wrong:
        raise InputError(
            f"{name!r} is no name of a model on the hub; allowed: OWNER/NAME, of letters, digits, '-', '_' and '.'"
        )


def push(folder: Path, name: str) -> str:
    """Put the run in `folder` on the hub as `name`; a line that says so. Raises InputError where that fails."""
    from huggingface_hub import HfApi

    check_name(name)
    config, summary = (without_folders(read_json(folder, file)) for file in ("config.json", "summary.json"))
    try:
        with tempfile.TemporaryDirectory() as place:  # so that nothing else goes up
            for file in FILES:
                if (folder / file).exists():
                    shutil.copyfile(folder / file, Path(place) / file)
            told = {"config.json": json_text(config, 2), "summary.json": json_text(summary, 2)}
            for file, text in {**told, "README.md": model_card(name, config, summary)}.items():
                (Path(place) / file).write_text(text, encoding="utf-8")
            HfApi().create_repo(name, exist_ok=True)
            HfApi().upload_folder(repo_id=name, folder_path=place, commit_message="A run of f3triton")
    except Exception as error:  # the library raises those of what it is built on
        raise InputError(
            f"cannot put the model on the hub as {name!r} ({one_line(error, 200)}); it is kept in {folder}"
        ) from None
    return f"on the hub as {name}: f3.load({PREFIX + name!r})"


def without_folders(content: dict) -> dict:
    """The content of a run's `config.json` or `summary.json`, in which local files and folders have their last name only."""
    content = dict(content)
    if "options" in content:
        content["options"] = {k: last_name(v) if k in PATHS and v else v for k, v in content["options"].items()}
    if "command" in content:
        words = [word.partition("=") if word.startswith("--") else ("", "", word) for word in shlex.split(content["command"])]
        content["command"] = shlex.join(f"{option}{equals}{last_name(value)}" for option, equals, value in words)
    if store := content.get("error_store"):
        content["error_store"] = {**store, "home": last_name(store["home"])}
    return content


def last_name(text: str) -> str:
    """The last part of a path that is one here: absolute, from a folder that is named by dots or `~`, or to what exists."""
    path = Path(os.path.expanduser(text))
    local = path.is_absolute() or text.startswith(("~", "./", "../")) or (len(path.parts) > 1 and os.path.exists(path))
    return (path.name or ".") if local else text


def fetch(name: str) -> Path:
    """The folder with the files of the model `name` on the hub, which are kept in the hub's cache. Raises InputError."""
    from huggingface_hub import snapshot_download

    check_name(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:
        raise InputError(f"cannot get the model {name!r} from the hub: {one_line(error, 200)}") from None


def model_card(name: str, config: dict, summary: dict) -> str:
    """Markdown: the method, the data, the figures, the command."""
    figures = [
        f"| {figure.replace('_', ' ')} | {summary[figure]:.4g} |" for figure in shown(summary) if summary[figure] is not None
    ]
    lines = ["---", "library_name: f3triton", "---", f"# {name.split('/')[1]}", ""]
    lines += [f"Trained by the method {summary['method']} on {summary['dataset']} ({summary['train_samples']:,} samples), "]
    lines[-1] += f"{summary['epochs']} epochs, {summary['parameters']:,} parameters."
    lines += ["", "| figure of the last epoch | |", "|---|---|", *figures, ""]
    lines += ["```sh", config["command"], "```", "", "```python", "import f3triton as f3", ""]
    lines += [f'model = f3.load("{PREFIX}{name}")', "```", ""]
    return "\n".join(lines)
