"""Models on the hub, which is a local folder here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import f3triton as f3
from f3triton.run.hub import last_name
from train import main

QUICK = ["--hidden", "8", "--max-train-samples", "100", "--epochs", "1", "--quiet"]


def test_a_model_goes_up_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, folder = tmp_path / "hub", tmp_path / "run"

    def upload(self: object, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        shutil.copytree(folder_path, hub / repo_id)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(hub / name))
    assert main([*QUICK, "--output-dir", str(folder), "--push-to-hub", "me/digits"]) == 0
    there = {"README.md", "config.json", "metrics.jsonl", "model.safetensors", "best.safetensors", "summary.json"}
    assert {path.name for path in (hub / "me" / "digits").iterdir()} == there
    card = (hub / "me" / "digits" / "README.md").read_text()
    assert all(part in card for part in ("method f3 on digits", "| test error |", 'f3.load("hf:me/digits")', "python train.py"))
    one, other = f3.load("hf:me/digits"), f3.load(folder)
    assert all((a == b).all() for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_nothing_that_goes_up_tells_of_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, secret = tmp_path / "hub", tmp_path / "secret"
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda *_, folder_path, **__: shutil.copytree(folder_path, hub))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (secret / "runs").mkdir(parents=True)
    (secret / "rows.csv").write_text("a,y\n" + "".join(f"{i},{i % 2}\n" for i in range(60)))
    monkeypatch.chdir(tmp_path)
    places = ["--dataset", str(secret / "rows.csv"), "--output-dir=secret/runs/one", "--error-store", "./secret/errors"]
    arguments = [*QUICK, *places, "--push-to-hub", "me/rows"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert main(arguments) == 0
    files = {path.name: path.read_bytes() for path in hub.iterdir()}
    assert not [name for name, content in files.items() if b"secret" in content or str(tmp_path).encode() in content]
    options = json.loads(files["config.json"])["options"]
    assert (options["dataset"], options["output_dir"], options["error_store"]) == ("rows.csv", "one", "errors")
    command = "--dataset rows.csv --output-dir=one --error-store errors --push-to-hub me/rows"
    assert command in files["README.md"].decode()
    assert json.loads((secret / "runs" / "one" / "config.json").read_text())["options"]["dataset"] == str(secret / "rows.csv")


@pytest.mark.parametrize("text", ["ylecun/mnist", "digits", "auto", "8x2", "", "x" * 9999, "a\0b/c"])
def test_what_is_no_local_path_stays(text: str) -> None:
    assert last_name(text) == text


def test_what_cannot_be_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fails)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    for name in ("digits", "me/", "me/a b", "../digits", "a/b/c", "me/a--b", "me/a."):
        assert main([*QUICK, "--output-dir", str(tmp_path / "none"), "--push-to-hub", name]) == 2
        assert f"{name!r} is no name of a model" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main([*QUICK, "--output-dir", str(tmp_path / "run"), "--push-to-hub", "me/digits"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "cannot put the model on the hub as 'me/digits'" in told
    assert f3.load(tmp_path / "run")
    with pytest.raises(f3.InputError, match="cannot get the model 'me/digits' from the hub"):
        f3.load("hf:me/digits")
