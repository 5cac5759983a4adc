"""Fuzzers of the command line, of data files, and of run folders and stores: a good run, or one line and exit code 2.

Every case is a function of its kind and number, and runs in a process of its own, with bounded memory and time (see `sandbox`).
A few of them run always, the others with `-m slow`. `F3TRITON_FUZZ=3` draws other cases than those of seed 0.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import shutil
import sys
from argparse import Action
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sandbox import attempt
from test_checkpoints import resealed
from test_train_script import main

import f3triton as f3
from f3triton.error_store.disk.inspect import main as inspect_main
from f3triton.run.options import make_parser

if sys.platform != "linux":
    pytest.skip("processes are bounded as Linux does it", allow_module_level=True)

SEED = os.environ.get("F3TRITON_FUZZ", "0")
SECONDS = 30
Case = tuple[object, Callable[[], int]]  # how it reads, and what it does
TEXTS = [
    "",
    " ",
    "\x1b[31m",
    "x" * 3000,
    "../..",
    "/dev/zero",
    "/",
    "~",
    "~nobody/x",
    "日本",
    "%s",
    "{0}",
    "a,b",
    "--",
    "a\nb",
    "\ud800",
]
NUMBERS = [0, 1, -1, 2, 3, 7, 64, 10**9, 2**31, 2**63, 2**64, 10**30, 1.5, 1e-300, 1e300, -0.0]
JSON = [
    *NUMBERS,
    *TEXTS,
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    [1, 2],
    {"a": 1},
    float("nan"),
    float("inf"),
    "5",
    [1e300],
    "\0",
]


def hunt(cases: Callable[[random.Random, Path, Path], Case], numbers: range, runs: Path, folder: Path) -> None:
    """Run these cases; what goes wrong in some is shown together."""
    wrong = []
    for number in numbers:
        place = folder / str(number)
        place.mkdir()
        os.chdir(place)
        shown, call = cases(random.Random(f"{cases.__name__} {SEED} {number}"), place, runs)
        found = attempt(call, seconds=SECONDS)
        if found.wrong:
            wrong.append(f"case {number}: {shown}\n{found}")
        os.chdir(folder)
        shutil.rmtree(place)
    assert not wrong, f"{len(wrong)} of {len(numbers)}\n" + "\n\n".join(wrong)


def train(arguments: list[object]) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setenv("F3TRITON_CACHE", str(tmp_path_factory.mktemp("images")))
        yield


FEW = [
    "--max-train-samples",
    60,
    "--max-test-samples",
    40,
    "--epochs",
    1,
    "--batch-size",
    20,
    "--no-compare",
    "--device",
    "cpu",
]
TEXT = ["--text", "text.txt", "--dim", 8, "--depth", 1, "--heads", 2, "--context", 8, "--tokens", 5]
RUNS: dict[str, list[object]] = {
    "digits": ["--hidden", 6],
    "drtp": ["--hidden", 6, "--method", "drtp", "--optimizer", "sgd", "--momentum", 0.5],
    "bp": ["--hidden", 6, "--method", "bp", "--precision", "float64"],
    "local": ["--hidden", 6, 6, "--method", "local"],
    "vit": ["--model", "vit", "--patch-size", 4, "--dim", 8, "--depth", 1, "--heads", 2],
    "resized": ["--hidden", 6, "--image-size", 5],
    "convnet": ["--model", "convnet", "--channels", 2, "--hidden", 6, "--kernel-size", 3, "--norm", "batch"],
    "text": TEXT,
    "table": ["--dataset", "table.csv", "--task", "regression", "--hidden", 4],
    "stored": ["--hidden", 6, "--error-store", "./store", "--error-dtype", "top-2"],
    "stream": ["--hidden", 6, "--streaming", "--window", 20, "--epochs", 5],
}


def make_runs(folder: Path, names: list[str]) -> Path:
    """Data, and a run of each of these kinds with checkpoints, in `folder`; they load what each case would load by itself."""
    rows = [(i % 5, f"w{i % 3}", f"2024-01-{1 + i % 28:02d}", i % 7 / 2) for i in range(80)]
    (folder / "table.csv").write_text("a,b,d,y\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    (folder / "text.txt").write_text("a bird in the hand\n" * 60)
    before = Path.cwd()
    try:
        os.chdir(folder)
        for name in names:
            assert train([*FEW, *RUNS[name], "--checkpoint-every", 1, "--output-dir", name, "--quiet"]) == 0, name
    finally:
        os.chdir(before)
    return folder


# --- the command line -------------------------------------------------------------------------------------------------

SMALL = {
    "epochs",
    "visits",
    "depth",
    "tokens",
    "hidden",
    "local_head_depth",
    "dim",
    "mlp_width",
    "channels",
    "head_dim",
    "heads",
}
PLACES = {
    "dataset": ["digits", "table.csv", "nothing.csv", ".", "digits/config.json", "text.txt", "no/such"],
    "text": ["text.txt", "b", "a", "table.csv", "digits"],
    "tokenizer": ["characters", "bytes", "table.csv", "digits/config.json"],
    "error_store": ["auto", "memory", "device", "./new", "./store", ".", "digits/x"],
    "error_dtype": ["auto", "float16", "int8", "ternary", "top-2", "top-99", "sampled-3", "top-0", "float32x3"],
    "target": ["y", "label", "a", "a,b", "z"],
    "features": ["a", "b", "a,b", "y"],
    "feedback": ["kaiming", "cartesian-product", "identity-repeat-pm", "nothing"],
    "checkpoint_every": ["1", "1e", "10min", "never", "0", "2steps", "0min", "99999999999999999", "e"],
    "recipe": ["mnist", "mnist/bp", "nothing", "mnist/", "/"],
    "output_dir": ["new", ".", "digits", "table.csv", "/proc/x", "a/b/c"],
    "window": ["auto", "off", "20", "0", "99999999999"],
    "hidden_scale": ["mean", "1", "nan", "1e300"],
    "feedback_scale": ["ones", "zeros", "1/C", "1", "inf", "-1e300"],
    "device": ["cpu", "auto", "cuda:99999999999999999999", "meta", "xpu", "cpu:5", ":"],
    "exit": ["1", "mean", "0", "99", "-1", "x"],
    "prompt": ["a bird", "Z", "\x1b", ""],
    "hidden": ["4", "4x3", "0", "-1", "4x0", "8x99999999", "99999999999999", "x", "4x"],
    "evaluate": [*RUNS, "."],
    "sample": ["text", "digits", "."],
    "resume": ["auto", *RUNS, "."],
}


def value_of(action: Action, draw: random.Random) -> list[str]:
    """A value for an option, most of them of the right form."""
    if action.nargs == 0:
        return []
    if draw.random() < 0.05:
        return [draw.choice([text for text in TEXTS if "\ud800" not in text])]
    if action.choices is not None:
        return [draw.choice(list(action.choices))]
    if action.dest in PLACES:
        return [draw.choice(PLACES[action.dest]) for _ in range(draw.choice([1, 1, 2]) if action.nargs == "+" else 1)]
    few = [number for number in NUMBERS if not number > 7] if action.dest in SMALL or draw.random() < 0.5 else NUMBERS
    return [str(draw.choice([number for number in few if isinstance(number, int) or action.type is not int]))]


def command_line(draw: random.Random, place: Path, runs: Path) -> Case:
    """Some options that go together, and some more that may not."""
    shutil.copytree(runs, place, dirs_exist_ok=True)
    base = draw.choice([[], [], *([o for o in options if o not in ("--streaming",)] for options in RUNS.values())])
    actions = [action for action in make_parser()._actions if action.dest not in ("help", "overwrite")]
    more = [draw.choice(actions) for _ in range(draw.choice([1, 1, 2, 3, 5]))]
    own = [[draw.choice(action.option_strings), *value_of(action, draw)] for action in more]
    typed = [word for option in own for word in option]
    if {"--evaluate", "--sample"} & {*typed}:
        line = typed
    elif "--resume" in typed:
        line = [*typed, *["--output-dir", "digits"] * draw.randint(0, 1)]
    else:
        line = [*FEW, *["--hidden", 4] * (not base), *base, "--output-dir", "fresh", *["--quiet"] * draw.randint(0, 1), *typed]
        if "--model" in typed or "--text" in typed:
            line = [*FEW, "--output-dir", "fresh", *typed]
    return line, lambda: train(line)


# --- data files -------------------------------------------------------------------------------------------------------


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed here and there, cut, repeated, or put in."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at, length = draw.randrange(len(content) + 1), draw.choice([1, 2, 8, 64])
        match draw.randrange(5):
            case 0:
                content[at : at + length] = draw.randbytes(len(content[at : at + length]))
            case 1:
                del content[at : at + length]
            case 2:
                content[at:at] = draw.choice(
                    [b"\0", b'"', b"\xff\xfe", b"\n", b",", b"[" * 200, b"null", b"1e999", b"\r\n\r\n"]
                )
            case 3:
                content[at:at] = content[at : at + length] * draw.choice([1, 50])
            case 4:
                del content[at:]
    return bytes(content)


def column(draw: random.Random, rows: int) -> list:
    """Values of one kind, or of several."""
    kinds: list[Callable[[int], object]] = [
        lambda i: i % 5,
        lambda i: i % 7 / 3,
        lambda i: f"w{i % 3}",
        lambda i: bool(i % 2),
        lambda i: draw.choice(NUMBERS),
        lambda i: draw.choice(TEXTS[:-1]),
        lambda i: [i % 3, 1, 2],
        lambda i: [[i % 3, 1], [2, 200]],
        lambda i: [1] * (i % 4),
        lambda i: None if i % 3 else i,
        lambda i: {"bytes": None, "path": draw.choice(TEXTS[:-1])},
        lambda i: 1e200 * (i % 3),
        lambda i: 2**62 + i,
        lambda i: float("nan") if i % 2 else float("inf"),
        lambda i: None,
        lambda i: {"a": {"b": i}},
    ]
    kind, other = draw.choice(kinds), draw.choice(kinds)
    mixed = draw.random() < 0.15
    return [(other if mixed and i % 4 == 3 else kind)(i) for i in range(rows)]


def picture(draw: random.Random, seed: int) -> bytes:
    """A small image of some format and mode."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    mode = draw.choice(["L", "RGB", "RGBA", "P", "1", "I;16", "CMYK"])
    image = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
    with contextlib.suppress(OSError, ValueError):
        image.save(out, draw.choice(["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"]))
    return out.getvalue() or b"none"


def data_file(draw: random.Random, place: Path, runs: Path) -> Case:
    """A data set of some format, with odd content or damaged bytes, and options to read it."""
    rows = draw.choice([0, 1, 2, 5, 40, 40, 40, 200])
    names = [draw.choice(["a", "b", "id", "label", "y", "", "\x1b[2J", "x" * 500, "日", "a b", "a,b"]) for _ in range(3)]
    names = list(dict.fromkeys([*names[: draw.randint(0, 3)], "y" if draw.random() < 0.8 else "z"]))
    table = {name: column(draw, rows) for name in names}
    kind, wild = draw.choice(["csv", "tsv", "json", "jsonl", "parquet", "images", "saved", "text"]), draw.random() < 0.5
    name = f"data.{kind}"
    with contextlib.suppress(pa.ArrowException, UnicodeError, TypeError, ValueError, OverflowError):
        if kind in ("csv", "tsv"):
            out = io.StringIO()
            writer = csv.writer(out, delimiter="," if kind == "csv" else "\t")
            writer.writerows([names, *zip(*table.values(), strict=True)])
            Path(name).write_text(out.getvalue(), encoding=draw.choice(["utf-8", "utf-8-sig", "utf-16"]))
        elif kind in ("json", "jsonl"):
            lines = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
            whole = json.dumps(draw.choice([lines, table, {"data": lines}, lines[:1], draw.choice(JSON)]))
            Path(name).write_text(whole if kind == "json" else "\n".join(map(json.dumps, lines)))
        elif kind == "parquet":
            pq.write_table(pa.table(table), name, compression=draw.choice(["none", "snappy"]))
        elif kind == "saved":
            import datasets

            datasets.Dataset.from_dict(table).save_to_disk(name)
        elif kind == "text":
            name = "data.txt"
            Path(name).write_bytes(draw.choice(["a bird\n" * 40, "x", "日本" * 200, "\0" * 200, "ab" * 99]).encode())
        else:
            name = "images"
            for i in range(12):
                folder = Path(name, *["train"] * (kind != ""), f"class{i % 2}")
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{i}.{draw.choice(['png', 'png', 'jpg', 'tiff', 'gif'])}").write_bytes(picture(draw, i))
            if draw.random() < 0.3:
                (Path(name) / "train" / "metadata.csv").write_text("file_name,y\n" + f"{draw.choice(TEXTS[:-1])},1\n" * 3)
    files = sorted(path for path in Path(".").rglob("*") if path.is_file())
    if wild and files:
        file = draw.choice(files)
        file.write_bytes(damaged(file.read_bytes(), draw))
    line = [*FEW, "--quiet", "--output-dir", "out", "--hidden", 4, "--dataset", draw.choice([name, name, "."])]
    if name == "data.txt":
        line = [*FEW, "--output-dir", "out", *TEXT, "--text", name, "--tokenizer", draw.choice(["characters", "bytes"])]
    else:
        line += draw.choice([[], [], ["--streaming", "--epochs", 5, "--window", 20]])
        line += draw.choice([[], ["--target", draw.choice(names)], ["--target", "y,a"], ["--task", "regression"]])
        line += draw.choice([[], [], ["--features", draw.choice(names)], ["--image", names[0]], ["--test-fraction", 0.5]])
        line += draw.choice([[], [], ["--method", "drtp"], ["--model", "convnet", "--channels", 2], ["--diagnose", 5]])
    return (line, table if rows < 6 else [*table]), lambda: train(line)


# --- run folders and stores -------------------------------------------------------------------------------------------


def change_json(value: object, draw: random.Random) -> object:
    """One value somewhere in a JSON value replaced, removed, or put in."""
    places: list[tuple[object, object]] = []

    def look(at: object) -> None:
        for key in list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ():
            places.append((at, key))
            look(at[key])

    look(value)
    if not places or draw.random() < 0.02:
        return draw.choice(JSON)
    at, key = draw.choice(places)
    match draw.randrange(6):
        case 0:
            del at[key]
        case 1 if isinstance(at, dict):
            at[draw.choice(TEXTS)] = draw.choice(JSON)
        case 2 if isinstance(at[key], list):
            at[key] = at[key] * draw.choice([0, 2, 100])
        case _:
            at[key] = draw.choice(JSON)
    return value


def change_tensors(path: Path, draw: random.Random) -> None:
    """A tensor of another type, shape or content, or one more or less."""
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    one = tensors.pop(name)
    kind = draw.choice([torch.int8, torch.int64, torch.float16, torch.float64, torch.bool, torch.bfloat16])
    changed = [one.to(kind), one.unsqueeze(0).contiguous(), one.flatten()[:1].clone(), one.flatten().contiguous()]
    changed += [torch.full_like(one, draw.choice([0, 1, 7])), torch.zeros(0)]
    changed += [one * float("nan"), one * 1e38] if one.is_floating_point() else [one + 1 if one.dtype != torch.bool else ~one]
    if draw.random() < 0.85:
        tensors[draw.choice([name, name, name, "more"])] = draw.choice(changed)
    save_file(tensors, path)


def change_file(path: Path, draw: random.Random) -> str:
    """Another content, or something that is no file."""
    what = draw.choice(
        ["bytes"] * 3 + ["json"] * 6 + ["tensors"] * 4 + ["pipe", "endless", "gone", "folder", "huge", "empty", "deep"]
    )
    if what == "json" and path.suffix == ".json":
        with contextlib.suppress(ValueError, RecursionError):  # damaged before
            path.write_text(json.dumps(change_json(json.loads(path.read_text()), draw)))
    elif what == "tensors" and path.suffix == ".safetensors":
        with contextlib.suppress(ValueError, SafetensorError):
            change_tensors(path, draw)
    elif what in ("pipe", "endless", "gone", "folder"):
        path.unlink()
        if what != "gone":
            {"pipe": os.mkfifo, "endless": lambda p: p.symlink_to("/dev/zero"), "folder": Path.mkdir}[what](path)
    elif what == "huge":
        os.truncate(path, draw.choice([1 << 20, 1 << 36]))
    elif what == "deep":
        path.write_text(
            draw.choice(["[" * 50_000, '{"a":' * 900 + "1" + "}" * 900, '{"network":' + "[" * 900 + "]" * 900 + "}"])
        )
    else:
        path.write_bytes(b"" if what == "empty" else damaged(path.read_bytes(), draw))
    return what


def load(name: str, exit: int | None) -> int:
    """`f3.load` and a prediction."""
    try:
        predictor = f3.load(name, exit=exit)
        kind = predictor.preprocessing.kind
        with contextlib.suppress(f3.InputError):
            predictor.predict({"image": torch.zeros(2, 1, 8, 8), "table": [{"a": 1, "b": "w1"}], "text": ["a bird"]}[kind])
    except f3.InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run_folder(draw: random.Random, place: Path, runs: Path) -> Case:
    """A sound run with one or two of its files changed, and what one does with a run."""
    name = draw.choice(sorted(path.name for path in runs.iterdir() if path.is_dir()))
    for data in ("table.csv", "text.txt", *["store"] * (name in ("stored", "store"))):
        (shutil.copytree if data == "store" else shutil.copy)(runs / data, place / data)
    if name != "store":
        shutil.copytree(runs / name, place / name)
    files = sorted(path for path in (place / name).rglob("*") if path.is_file() and path.suffix not in (".png", ".jsonl"))
    files = files if name != "stored" else files + sorted((place / "store").iterdir())
    use = draw.choice(["load", "evaluate", "resume", "resume", "sample"])
    if name == "store":
        use = "inspect"
    elif use == "resume":
        for old in sorted((place / name / "checkpoints").iterdir())[:-1]:
            shutil.rmtree(old)
        files = [path for path in files if path.exists() and "model" not in path.name and "summary" not in path.name]
    else:
        files = [path for path in files if path.parent.name == name]
    done = []
    for _ in range(draw.choice([1, 1, 1, 2])):
        path = draw.choice(files)
        if path.is_file() and not path.is_symlink():
            done.append((str(path.relative_to(place)), change_file(path, draw)))
        if path.parent.parent.name == "checkpoints" and draw.random() < 0.8:
            with contextlib.suppress(OSError, ValueError):
                if not any(
                    other.is_fifo() or other.is_symlink() or other.stat().st_size > 1 << 30 for other in path.parent.iterdir()
                ):
                    resealed(path.parent)
    calls: dict[str, Callable[[], int]] = {
        "load": lambda: load(name, draw.choice([None, None, 1])),
        "evaluate": lambda: train(["--evaluate", name, "--device", "cpu"]),
        "resume": lambda: train(["--resume", name, *draw.choice([[], ["--epochs", 2]])]),
        "sample": lambda: train(["--sample", name, "--tokens", 5]),
        "inspect": lambda: inspect_main(["inspect", "store"]),
    }
    return (name, use, done), calls[use]


# --- how many ---------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[[random.Random, Path, Path], Case], int, int]] = {
    "command line": (command_line, 8, 300),
    "data file": (data_file, 8, 150),
    "run folder": (run_folder, 30, 1000),
}


@pytest.fixture(scope="module")
def few_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("few"), ["digits", "text", "stored"])


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("all"), list(RUNS))


@pytest.mark.parametrize("kind", CASES)
def test_a_few_cases(kind: str, few_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # and back at the end
    cases, few, _ = CASES[kind]
    hunt(cases, range(few), few_runs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_many_cases(kind: str, all_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases, few, many = CASES[kind]
    hunt(cases, range(few, few + many), all_runs, tmp_path)
