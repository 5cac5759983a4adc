"""Where data comes from: files, folders, saved data sets, the hub; and one clear line for all that can be wrong."""

import logging
import os
import time

import datasets
import pytest

from f3triton.base.exceptions import InputError
from f3triton.data import load_dataset

COLUMNS = {"x": [1.0, 2.0, 3.0, 4.0, 5.0], "label": [0, 1, 0, 1, 0]}


@pytest.fixture(autouse=True)
def private_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.chdir(tmp_path)


def fails(name, **options):
    """The message of the error that loading gives."""
    with pytest.raises(InputError) as caught:
        load_dataset(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_csv_of_other_separators_or_letters_says_what_is_needed(tmp_path):
    (tmp_path / "comma.csv").write_text("a,label\n1,x\n2;5,y\n2,5,5,y\n")
    assert "(fields of a .csv are separated by what its first line has: commas, semicolons, tabs" in fails("comma.csv")
    (tmp_path / "latin.csv").write_bytes("größe,label\n1,x\n2,y\n".encode("latin-1"))
    assert fails("latin.csv").endswith("(text must be UTF-8)")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_csv_of_semicolons_or_tabs(tmp_path, separator):
    rows = [f"{i}{separator}{i / 4}{separator}{'no,yes'[3 * (i % 2) :][:2]}" for i in range(20)]
    (tmp_path / "other.csv").write_text("\n".join([f"a{separator}größe{separator}label", *rows]), encoding="utf-8")
    train, _ = load_dataset("other.csv")
    assert (train.in_features, train.outputs) == (2, 2)


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "json", "jsonl"])
def test_single_files(tmp_path, ending):
    rows = datasets.Dataset.from_dict(COLUMNS)
    path = tmp_path / f"some [1] data.{ending}"
    if ending == "tsv":
        path.write_text("x\tlabel\n" + "".join(f"{x}\t{y}\n" for x, y in zip(*COLUMNS.values(), strict=True)))
    else:
        getattr(rows, f"to_{ending.replace('jsonl', 'json')}")(path)
    train, test = load_dataset(str(path))
    assert (len(train), len(test), train.in_features, train.task) == (4, 1, 1, "classification")
    assert train.name == path.name


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    datasets.Dataset.from_dict(COLUMNS).to_csv(tmp_path / "mine.csv")
    assert len(load_dataset("~/mine.csv")[0]) == 4


def test_folders(tmp_path):
    rows = datasets.Dataset.from_dict(COLUMNS)
    (tmp_path / "files").mkdir()
    rows.to_csv(tmp_path / "files" / "train.csv")
    rows.select(range(2)).to_csv(tmp_path / "files" / "test.csv")
    train, test = load_dataset("files")
    assert (len(train), len(test), train.name) == (5, 2, "files")
    rows.save_to_disk(tmp_path / "saved")
    assert len(load_dataset(tmp_path / "saved")[0]) == 4
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved splits")
    assert len(load_dataset("./saved splits")[1]) == 5


def test_image_folder(tmp_path):
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / "pets" / "train" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (3, 2), (i, 10 * i, 100)).save(tmp_path / "pets" / "train" / label / f"{i}.png")
    train, test = load_dataset("pets")
    assert (len(train), len(test), train.preprocessing.shape) == (6, 2, (3, 2, 3))
    assert train.preprocessing.target_names == ("cat", "dog")


def test_unknown_paths(tmp_path):
    for name in ("./nowhere", "nowhere.csv", "/nowhere/at/all", "a/b/c", "~/nowhere", "not a name", "", " "):
        assert fails(name) == f"data set {name!r}: no such file or folder"
    (tmp_path / "notes.txt").write_text("hello")
    assert "known endings: .parquet, .csv, .tsv, .json, .jsonl" in fails("./notes.txt")
    (tmp_path / "hollow").mkdir()
    assert "data set 'hollow'" in fails("hollow")
    (tmp_path / "empty.csv").touch()
    assert fails("empty.csv") == "file 'empty.csv' is empty"


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("bad.parquet", b"PAR1" + b"nonsense" * 40, "arquet"),
        ("bad.csv", b"a,b\n1,2\n3,4,5,6\n", "line 3"),
        ("bad.json", b'{"a":1\n{"b"', "JSON"),
        ("latin.csv", b"a,y\n\xff\xfe,2\n", "utf-8"),
        ("head.csv", b"a,y\n", "empty split"),
        ("late.csv", b"a,y\n" + b"1,2\n" * 300_000 + b"x,3\n", "the first rows set the type"),
    ],
)
def test_broken_files(tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    message = fails(name)
    assert name in message
    assert part in message
    # In a folder, the message names the folder, and the file where it is known.
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name.replace("bad", "train")).write_bytes(content)
    message = fails("folder")
    assert "'folder'" in message
    if name in ("bad.csv", "bad.json"):  # a parquet file only by newer versions of datasets
        assert f"file '{name.replace('bad', 'train')}'" in message


@pytest.mark.parametrize("way", ["file", "folder"])
def test_types_of_a_text_file_are_those_of_all_its_rows(tmp_path, way):
    """The library takes them from the first 10,000."""
    (tmp_path / "data").mkdir()
    rows = "".join(f"{i if i < 11_000 else 0.5},{'' if i < 10_500 else '2024-01-02'},{i % 2}\n" for i in range(12_000))
    (tmp_path / "data" / "train.csv").write_text("a,when,label\n" + rows)
    train, _ = load_dataset(tmp_path / "data" / "train.csv" if way == "file" else tmp_path / "data")
    assert [column.kind for column in train.preprocessing.columns] == ["number", "date"]


def test_files_that_differ_in_columns(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.csv").write_text("x,label\n1,0\n2,1\n")
    (tmp_path / "folder" / "test.csv").write_text("z,label\n1,0\n")
    message = fails("folder")
    assert "data set 'folder' cannot be read: its files differ in columns" in message
    assert "'z'" in message


def test_options_that_do_not_apply(tmp_path):
    datasets.Dataset.from_dict(COLUMNS).to_csv(tmp_path / "mine.csv")
    assert fails("digits", config="x") == "bundled data set 'digits' has no config 'x'; leave config out"
    assert "has no revision 'main'" in fails("mine.csv", revision="main")
    assert "has no config 'x'" in fails("mine.csv", config="x")
    (tmp_path / "files").mkdir()
    (tmp_path / "mine.csv").rename(tmp_path / "files" / "mine.csv")
    assert "'x'" in fails("files", config="x")


class TestHub:
    """What the hub answers, or that it does not: `dataset_info` is asked first, so that is where answers are set."""

    @pytest.fixture(autouse=True)
    def online(self, monkeypatch):
        """Whatever the environment of these tests says."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)

    @pytest.fixture
    def answer(self, monkeypatch):
        def set_answer(error):
            def dataset_info(self, *_, **__):
                raise error

            monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)

        return set_answer

    def test_unreachable(self, answer):
        answer(ConnectionError("no route to host"))
        message = fails("someone/something")
        assert message.startswith("cannot reach the Hugging Face hub to load 'someone/something' (no route to host)")
        assert "give a local folder or file" in message

    def test_fails_fast(self, monkeypatch):
        """With a real request, to a port where nothing listens."""
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
        start = time.perf_counter()
        assert "cannot reach the Hugging Face hub" in fails("someone/something")
        assert time.perf_counter() - start < 15

    def test_offline_mode(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "(HF_HUB_OFFLINE is set)" in fails("someone/something")

    def test_a_local_folder_of_the_same_name_is_not_taken_for_a_download(self, tmp_path, answer):
        (tmp_path / "there" / "something").mkdir(parents=True)
        datasets.Dataset.from_dict(COLUMNS).to_csv(tmp_path / "there" / "something" / "train.csv")
        assert len(load_dataset("there/something")[0]) == 4
        answer(ConnectionError("no route to host"))
        assert "cannot reach" in fails("something")

    def test_an_earlier_download_is_used(self, tmp_path, answer):
        """A cached folder renamed to a commit is what a download leaves."""
        (tmp_path / "there" / "something").mkdir(parents=True)
        datasets.Dataset.from_dict(COLUMNS).to_csv(tmp_path / "there" / "something" / "train.csv")
        load_dataset("there/something")
        (cached,) = (path for path in (tmp_path / "hf" / "something").glob("*/*/*") if path.is_dir())
        commit = "0123456789abcdef" * 2 + "01234567"
        cached.rename(cached.with_name(commit))
        answer(ConnectionError("no route to host"))
        assert len(load_dataset("something")[0]) == 4
        assert len(load_dataset("something", revision=commit[:10])[0]) == 4
        assert "cannot reach" in fails("something", revision="fedcba")

    def test_refusals(self, answer):
        import huggingface_hub.errors as errors

        for kind, part in [
            (errors.RepositoryNotFoundError, "is not on the hub"),
            (errors.RevisionNotFoundError, "has no revision 'v9'"),
            (errors.GatedRepoError, "is gated"),
        ]:
            answer(kind.__new__(kind))
            assert part in fails("someone/something", revision="v9")
        answer(RuntimeError("surprise"))
        assert "cannot be looked up on the hub: surprise" in fails("someone/something")


def test_noise_is_kept_down_and_settings_restored(tmp_path, capfd):
    logger = logging.getLogger("datasets")
    before = logger.level, list(logger.handlers), logger.propagate, datasets.are_progress_bars_disabled()
    datasets.Dataset.from_dict(COLUMNS).to_csv(tmp_path / "mine.csv")
    (tmp_path / "bad.csv").write_bytes(b"a,b\n1,2\n3,4,5,6\n")
    capfd.readouterr()
    load_dataset("mine.csv")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "README.md").write_text("About these files.")
    (tmp_path / "mine.csv").rename(tmp_path / "files" / "mine.csv")
    load_dataset("files")
    fails("bad.csv")
    assert capfd.readouterr() == ("", "")
    assert before == (logger.level, list(logger.handlers), logger.propagate, datasets.are_progress_bars_disabled())


@pytest.mark.parametrize("name", ["data/train.csv", "data"])
def test_content_decides_and_not_the_time(tmp_path, name):
    """A file that was changed and has its size and time of before is another file; the same content is taken from the cache."""
    path = tmp_path / "data" / "train.csv"
    path.parent.mkdir()
    rows = [f"{i % 5},{i % 2}" for i in range(20)]
    path.write_text("\n".join(["x,label", *rows]) + "\n")
    before = path.stat()
    first = load_dataset(name, test_fraction=0.5)[0].targets
    assert (load_dataset(name, test_fraction=0.5)[0].targets == first).all()
    assert len(list((tmp_path / "hf").glob("*/*/*/*/*.arrow"))) == 1
    path.write_text("\n".join(["x,label", *(f"{i % 5},{(i + 1) % 2}" for i in range(20))]) + "\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert (load_dataset(name, test_fraction=0.5)[0].targets == 1 - first).all()
