"""Text: tokenizers, windows with stable indices, and what cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import datasets
import pytest
import torch

import f3triton as f3
from f3triton.data import Preprocessing
from f3triton.data.tokens import Tokenizer, fit_tokenizer

TEXT = "Grüße, world! 世界 \U0001f600\r\nabc abc abc abc abc abc abc abc abc\n"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes((TEXT * 3).encode())
    return file


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_there_and_back(path, kind: str) -> None:
    train, test = f3.load_text(path, tokenizer=kind, context=4)
    tokenizer = train.preprocessing.tokenizer
    ids = tokenizer.encode(TEXT, "a text")
    assert tokenizer.decode(ids.tolist()) == TEXT
    expected = list(TEXT) if kind == "characters" else list(TEXT.encode())
    assert len(ids) == len(expected)
    assert train.outputs == (len(set(TEXT)) if kind == "characters" else 256)
    assert tokenizer.decode(train.stream.tolist() + test.stream.tolist())[:9] == "Grüße, wo"
    stored = json.loads(json.dumps(train.preprocessing.to_json()))
    assert Preprocessing.from_json(stored) == train.preprocessing


def test_windows(path) -> None:
    """Window i is tokens i T .. (i + 1) T - 1, its targets are one further; the end of the text is for testing."""
    whole = (TEXT * 3).encode()
    train, test = f3.load_text(path, tokenizer="bytes", context=5, test_fraction=0.25)
    cut = round(len(whole) * 0.75)
    assert len(train) == (cut - 1) // 5
    assert len(test) == (len(whole) - cut - 1) // 5
    index = torch.tensor([7, 0])
    assert train.fetch(index).tolist() == [list(whole[35:40]), list(whole[0:5])]
    hot = train.one_hot(index)
    assert hot.shape == (10, 256)
    assert hot.argmax(1).tolist() == list(whole[36:41]) + list(whole[1:6])
    assert (hot.sum(1) == 1).all()
    assert test.fetch(torch.tensor([0])).tolist() == [list(whole[cut : cut + 5])]
    assert train.positions == 5
    assert train.preprocessing == test.preprocessing
    fewer, _ = f3.load_text(path, tokenizer="bytes", context=5, test_fraction=0.25, max_train_samples=3)
    assert torch.equal(fewer.inputs, train.inputs[:3])
    assert torch.equal(train.to("cpu").inputs, train.inputs)


def test_a_cut_leaves_characters_whole(tmp_path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("世" * 40 + "界", encoding="utf-8")
    train, test = f3.load_text(file, context=2, test_fraction=0.35)
    assert train.outputs == 2
    assert len(train.stream) + len(test.stream) in (40, 41)


def test_a_column(tmp_path) -> None:
    rows = [f"line {i}" for i in range(30)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"story": row, "id": i}) for i, row in enumerate(rows)), encoding="utf-8")
    train, test = f3.load_text("story", file, context=6, test_fraction=0.2)
    decode = train.preprocessing.tokenizer.decode
    assert decode(train.stream.tolist()).startswith("line 0\nline 1\nline 2")
    assert decode(test.stream.tolist())[0] == "\n".join(rows)[round(len("\n".join(rows)) * 0.8)]
    for column, message in (("tale", "no column of split 'train'; columns: story, id"), ("id", "holds a int in row 0")):
        with pytest.raises(f3.InputError, match=message):
            f3.load_text(column, file, context=6)


def test_named_splits(tmp_path) -> None:
    for split, text in (("train", "abcabcabc"), ("test", "cbacba")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    train, test = f3.load_text("text", tmp_path, context=2)
    decode = train.preprocessing.tokenizer.decode
    assert (decode(train.stream.tolist()), decode(test.stream.tolist())) == ("abcabcabc", "cbacb")


def test_a_tokenizers_file(path, tmp_path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    file = tmp_path / "tokenizer.json"
    made.save(str(file))
    train, _ = f3.load_text(path, tokenizer=str(file), context=4)
    tokenizer = train.preprocessing.tokenizer
    assert train.outputs == made.get_vocab_size()
    assert tokenizer.encode(TEXT, "a text").tolist() == made.encode(TEXT).ids
    assert tokenizer.decode(made.encode(TEXT).ids) == TEXT
    assert tokenizer.unit == "token"
    stored = Preprocessing.from_json(json.loads(json.dumps(train.preprocessing.to_json())))
    assert stored.tokenizer.encode("abc abc", "a text").tolist() == made.encode("abc abc").ids


def test_without_the_library(path, tmp_path, monkeypatch) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(f3.InputError, match="needs the package 'tokenizers'"):
        f3.load_text(path, tokenizer=str(file))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 200}, "the training part of text.txt has 149 tokens, and one window of the context 200 needs 201"),
        ({"context": 1}, r"context \(--context\) must be a whole number of at least 2, got 1"),
        ({"test_fraction": 0.01}, "the test part of text.txt has 2 tokens"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"tokenizer": "words"}, "tokenizer 'words' is no file; allowed: characters, bytes, or the JSON file"),
        ({"max_train_samples": 0}, "max_train_samples"),
        ({"test_split": "test"}, "has no test_split 'test'"),
    ],
)
def test_bad_settings(path, settings: dict, message: str) -> None:
    with pytest.raises(f3.InputError, match=message):
        f3.load_text(path, **{"context": 8, **settings})


def test_bad_files(tmp_path) -> None:
    with pytest.raises(f3.InputError, match=r"cannot open .*: No such file"):
        f3.load_text(tmp_path / "nothing.txt")
    with pytest.raises(f3.InputError, match="is a folder"):
        f3.load_text(tmp_path)
    file = tmp_path / "text.txt"
    file.write_bytes(b"")
    with pytest.raises(f3.InputError, match="is empty"):
        f3.load_text(file)
    file.write_bytes(b"abc\xff" * 50)
    with pytest.raises(f3.InputError, match=r"is no UTF-8 text \(byte 3\); use the tokenizer 'bytes'"):
        f3.load_text(file)
    assert f3.load_text(file, tokenizer="bytes", context=4)[0].outputs == 256
    splits = datasets.DatasetDict(
        {n: datasets.Dataset.from_dict({"s": [t]}) for n, t in (("train", "abc" * 9), ("test", "abQ"))}
    )
    with pytest.raises(f3.InputError, match=r"the test part of .* has the character 'Q' \(U\+0051, at 2\), which the training"):
        f3.load_text("s", splits, context=4)
    junk = tmp_path / "junk.json"
    junk.write_text("not json", encoding="utf-8")
    pytest.importorskip("tokenizers")
    with pytest.raises(f3.InputError, match="is no JSON file of the tokenizers library"):
        f3.load_text(file, tokenizer=str(junk))


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "words", "characters": "", "definition": ""},
        {"kind": "characters", "characters": "ba", "definition": ""},
        {"kind": "characters", "characters": "", "definition": ""},
        {"kind": "characters", "characters": "ab"},
        ["characters"],
    ],
)
def test_broken_tokenizers_are_refused(content: object) -> None:
    with pytest.raises(f3.InputError, match="stored preprocessing is broken"):
        Tokenizer.from_json(content)


def test_characters_are_those_of_training() -> None:
    tokenizer = fit_tokenizer("characters", ["banana", "cab"], "the text")
    assert tokenizer.characters == "abcn"
    assert tokenizer.encode("nab", "it").tolist() == [3, 0, 1]


def test_characters_that_only_the_end_of_a_text_has_are_tokens(tmp_path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abcd" * 50 + "J" * 10)
    train, test = f3.load_text(file, context=4)
    assert train.preprocessing.target.names == test.preprocessing.target.names == ("J", "a", "b", "c", "d")
    assert (test.stream == 0).sum() == 10


def test_a_prompt_is_utf8_in_every_locale() -> None:
    """Python reads the command line by the locale; in the locale C other bytes come as halves of characters."""
    told = "import sys; from f3triton.run.options import make_parser as m; print(ascii(m().parse_args(sys.argv[1:]).prompt))"
    narrow = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", told, "--prompt", "你好".encode()]
    assert subprocess.run(command, env=narrow, capture_output=True, text=True, check=True).stdout.strip() == ascii("你好")


def test_odd_texts(tmp_path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abab" * 30, encoding="utf-8-sig")
    assert f3.load_text(file, context=4)[0].preprocessing.target.names == ("a", "b")  # and no byte order mark
    file.write_text("a" * 50)
    with pytest.raises(f3.InputError, match="has one character only, 'a'; needed are two"):
        f3.load_text(file, context=4)
    rows = datasets.Dataset.from_dict({"s": ["abc", None, "cab"] * 20})
    train, _ = f3.load_text("s", rows, context=4)
    assert train.preprocessing.tokenizer.decode(train.stream.tolist()).startswith("abc\ncab\nabc")
    with pytest.raises(f3.InputError, match="column 's' of split 'train' has no text"):
        f3.load_text("s", datasets.Dataset.from_dict({"s": [None, None]}))
