"""Run folders that somebody damaged or made up: one line, in bounded time and memory."""

from __future__ import annotations

import copy
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sandbox import Outcome, attempt
from test_checkpoints import resealed
from test_train_script import main

import f3triton as f3
from f3triton.base.schema import Anything, Either, Fields, Many, Plain, Schema, Variant, Whole, Word, check
from f3triton.models.build import MODELS, NETWORK
from f3triton.run.checkpoint import STATE_HOLDS
from f3triton.run.folder import CONFIG

if sys.platform != "linux":
    pytest.skip("processes are bounded as Linux does it", allow_module_level=True)

STEP = Path("checkpoints") / "step-000000000004"
FEW = ["--max-train-samples", "200", "--max-test-samples", "100"]
SMALL = [*FEW, "--hidden", "8", "--no-compare", "--quiet", "--device", "cpu"]


def train(*arguments: object) -> int:
    return main([*map(str, arguments)])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after steps 3 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "sound"
    assert train(*SMALL, "--epochs", 1, "--checkpoint-every", 1, "--output-dir", folder) == 0
    return folder


def load(folder: Path) -> int:
    try:
        f3.load(folder)
    except f3.InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


USES: dict[str, Callable[[Path], int]] = {
    "load": load,
    "evaluate": lambda folder: train("--evaluate", folder),
    "resume": lambda folder: train("--resume", folder, "--epochs", 1),
}


def used(folder: Path, use: str) -> Outcome:
    found = attempt(lambda: USES[use](folder), seconds=10, memory=1 << 30)
    assert not found.wrong, found
    return found


DAMAGES: dict[str, Callable[[Path], object]] = {
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "endless": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "link": lambda path: (path.rename(path.parent.parent / "other"), path.symlink_to(path.parent.parent / "other")),
    "huge": lambda path: os.truncate(path, 1 << 40),
    "deep": lambda path: path.write_text('{"a": ' + "[" * 100_000),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("name", "uses"),
    [
        ("config.json", ("load", "evaluate", "resume")),
        ("summary.json", ("evaluate",)),
        ("best.safetensors", ("load", "evaluate")),
        (STEP / "state.json", ("resume",)),
        (STEP / "manifest.json", ("resume",)),
        (STEP / "tensors.safetensors", ("resume",)),
    ],
)
def test_files_that_are_none(name: str, uses: tuple[str, ...], damage: str, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000000000003")
    DAMAGES[damage](tmp_path / "run" / name)
    for use in uses:
        assert used(tmp_path / "run", use).code == 2


def changed(sound: Path, folder: Path, change: Callable[[dict], object]) -> Path:
    shutil.copytree(sound, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "network",
    [
        {"model": ["mlp"], "sizes": [64, 8, 10]},
        {"model": "mlp", "sizes": [64, 8, "10"]},
        {"model": "mlp", "sizes": [64, *[8] * 10_000, 10]},
        {"model": "mlp", "sizes": [64, 1 << 39, 1 << 39, 10]},
        {"model": "mlp", "sizes": [64, 8, 10], "residual": "yes"},
        {"model": "mlp", "sizes": [64, 8, 10], "exits": {"shapes": [[8]], "outputs": 10, "positions": 1, "depth": 1 << 40}},
        {"model": "vit", "image_size": [8], "channels": 1, "classes": 10},
        {"model": "vit", "image_size": 8, "channels": 1, "classes": 10, "patch_size": 4, "dropout": "0"},
        {"model": "vit", "image_size": 8, "channels": 1, "classes": 10, "patch_size": 0},
        {"model": "vit", "image_size": 8, "channels": 1, "classes": 10, "patch_size": 4, "depth": 10_000},
        {"model": "vit", "image_size": 8, "channels": 1, "classes": 10, "patch_size": 4, "heads": None},
        {"model": "convnet", "image": [1, 8], "classes": 10},
        {"model": "convnet", "image": [1, 8, 8], "classes": 10, "channels": 4},
        {"model": "convnet", "image": [1, 8, 8], "classes": 10, "channels": [4], "hidden": [[5]]},
        {"model": "gpt", "vocabulary": 10, "context": 64, "dim": 1.5},
        {"model": "gpt", "vocabulary": 10, "context": 64, "tied": 1},
        {"model": "mlp", "sizes": [63, 8, 10]},
        {"model": "mlp", "sizes": [64, 8, 11]},
    ],
)
def test_networks_that_are_none(network: dict, sound: Path, tmp_path: Path) -> None:
    found = used(changed(sound, tmp_path / "run", lambda config: config.update(network=network)), "load")
    assert found.code == 2
    assert found.seconds < 5


def test_files_of_which_nothing_was_written(sound: Path, tmp_path: Path) -> None:
    """A manifest and a header of safetensors that say so too: nothing is hashed, and nothing read."""
    shutil.copytree(sound, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000000000003")
    for path in (tmp_path / "run" / "best.safetensors", tmp_path / "run" / STEP / "tensors.safetensors"):
        os.truncate(path, 1 << 32)
    manifest = json.loads((tmp_path / "run" / STEP / "manifest.json").read_text())
    manifest["files"]["tensors.safetensors"]["bytes"] = 1 << 32
    (tmp_path / "run" / STEP / "manifest.json").write_text(json.dumps(manifest))
    assert "were ever written" in used(tmp_path / "run", "load").err
    assert "were ever written" in used(tmp_path / "run", "resume").err
    header = b'{"x":{}, ' + b" " * (1 << 25) + b"}"
    (tmp_path / "run" / "best.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "has a header of 33,554,442 bytes" in used(tmp_path / "run", "load").err


def test_checkpoints_elsewhere(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "other")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "other")
    assert "is a link" in used(tmp_path / "run", "resume").err


@pytest.mark.parametrize("kind", [torch.int32, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize(("which", "name"), [("best", "best.safetensors"), ("last", "model.safetensors")])
def test_weights_of_another_type(kind: torch.dtype, which: str, name: str, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "run")
    path = tmp_path / "run" / name
    other = {name: tensor.to(kind) for name, tensor in load_file(path).items()}
    try:
        save_file(other, path)
    except KeyError:
        pytest.skip("this safetensors writes no tensors of that type")
    with pytest.raises(f3.InputError, match="allowed: F32, F64, BF16"):
        f3.load(tmp_path / "run", which=which)


@pytest.mark.parametrize(
    "options",
    [
        {"warmup_steps": [0]},
        {"mask_target": "x"},
        {"device": True},
        {"hidden": [None]},
        {"recipe": 1},
        {"target": 10},
        {"test_fraction": [0.1]},
        {"feedback_scale": 10**30},
        {"checkpoint_every": True},
        {"what": 1},
        {"train_split": []},
    ],
)
@pytest.mark.parametrize("use", ["evaluate", "resume"])
def test_options_of_another_type(options: dict, use: str, sound: Path, tmp_path: Path) -> None:
    used(changed(sound, tmp_path / "run", lambda config: config["options"].update(options)), use)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"epoch": 7},
        {"tally": {"sizes": [1], "waiting": [], "samples": 0, "total": "0x0p0", "hits": 0, "batches": 1}},
        {"tally": {"sizes": [], "waiting": [], "samples": 0, "total": "0x1p99999", "hits": 0, "batches": 0}},
        {"history": [{"epoch": 1, "step": 4, "lr": 0, "learning_seconds": 0, "test_error": {}}]},
        {"settings": {}},
        {"settings": {"feedback": 3}},
        {"learning_seconds": True},
    ],
)
def test_sealed_states_that_are_none(change: dict, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000000000003")
    state = json.loads((tmp_path / "run" / STEP / "state.json").read_text())
    (tmp_path / "run" / STEP / "state.json").write_text(json.dumps(state | change))
    resealed(tmp_path / "run" / STEP)
    assert used(tmp_path / "run", "resume").code == 2


def test_schemas_of_networks_are_those_of_their_classes() -> None:
    for kind, schema in NETWORK.of.items():
        settings = {*schema.needed, *schema.may} - {"model", "reading", "exits"}
        assert settings | {"feedback", "seed"} == set(inspect.signature(MODELS[kind]).parameters)


# --- the schemas themselves -------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def drawn(schema: Schema) -> st.SearchStrategy:
    """What fits a schema."""
    match schema:
        case Plain(kind=kind, finite=finite):
            of = {str: st.text(max_size=5), bool: st.booleans(), type(None): st.none()}
            return of.get(kind, st.floats(-1e300, 1e300) if finite else st.floats())
        case Whole(low=low, high=high):
            return st.integers(low, high)
        case Word(words=words):
            return st.sampled_from(words)
        case Either(of=of):
            return st.one_of([drawn(one) for one in of])
        case Many(of=of, low=low, high=high):
            return st.lists(drawn(of), min_size=low, max_size=min(high, low + 2))
        case Variant(key=key, of=of):
            kinds = [drawn(one).map(lambda value, word=word: {**value, key: word}) for word, one in of.items()]
            return st.one_of(kinds)
        case Fields(needed=needed, may=may):
            return st.fixed_dictionaries(
                {name: drawn(one) for name, one in needed.items()}, optional={name: drawn(one) for name, one in may.items()}
            )
    assert isinstance(schema, Anything)
    return JSON


def places(value: object, way: tuple = ()) -> Iterator[tuple]:
    """The way to everything in a JSON value."""
    yield way
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(below, (*way, key))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_drawn_from_a_schema_fits_and_one_change_is_named(data: st.DataObject) -> None:
    schema = data.draw(st.sampled_from([CONFIG, STATE_HOLDS]))
    value = data.draw(drawn(schema))
    check(schema, value, "it")
    way = data.draw(st.sampled_from([way for way in places(value) if way]))
    other = copy.deepcopy(value)
    at = other
    for key in way[:-1]:
        at = at[key]
    at[way[-1]] = data.draw(JSON)
    if next(schema.wrong(other), None) is not None:
        with pytest.raises(f3.InputError, match=r"it.* is .*; allowed: ") as error:
            check(schema, other, "it")
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 700
