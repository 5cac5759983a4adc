"""Images: every encoding and colour mode as one uint8 tensor, and the cache of decoded ones."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from f3triton.base.exceptions import InputError
from f3triton.data import Preprocessing, cache, images, load_dataset, stream_dataset

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})


def encoded(image, form="PNG"):
    out = io.BytesIO()
    image.save(out, form)
    return {"bytes": out.getvalue(), "path": None}


def grey(rows=6, size=(5, 4), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, *size), dtype=np.uint8)


def colour(rows=6, size=(5, 4), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, *size, 3), dtype=np.uint8)


def split(items):
    """Rows of PIL images, arrays or encoded dicts, with labels 0 1 0 1 ..."""
    items = [Image.fromarray(item) if isinstance(item, np.ndarray) else item for item in items]
    items = [item if isinstance(item, dict) or item is None else encoded(item) for item in items]
    return datasets.Dataset.from_dict({"image": items, "label": [i % 2 for i in range(len(items))]}, features=FEATURES)


def load(train, test=None, **options):
    return load_dataset({"train": split(train), "test": split(train if test is None else test)}, **options)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("F3TRITON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_mnist_statistics():
    if not MNIST.is_dir():
        pytest.skip(f"no {MNIST}")
    import pyarrow.parquet as pq
    from datasets.table import InMemoryTable

    # Read with arrow, not through the folder, so that the test leaves no cache behind.
    files = {name: MNIST / f"{name}-00000-of-00001.parquet" for name in ("train", "test")}
    splits = {name: datasets.Dataset(InMemoryTable(pq.read_table(file))) for name, file in files.items()}
    train, test = load_dataset(splits, max_train_samples=5000, max_test_samples=1000)
    assert (len(train), len(test), train.in_features, train.outputs) == (5000, 1000, 784, 10)
    assert train.preprocessing.mean[0] == pytest.approx(0.1307, abs=0.002)
    assert train.preprocessing.std[0] == pytest.approx(0.3081, abs=0.002)
    assert train.targets.bincount().min() > 400
    few = splits["test"].select(range(0, 10_000, 200))
    _, test = load_dataset({"train": few, "test": few})
    assert torch.equal(test.inputs, torch.stack([torch.tensor(np.array(row["image"])).flatten() for row in few]))


def test_grey():
    pixels = grey()
    train, test = load(pixels)
    assert train.preprocessing.shape == (1, 5, 4)
    assert torch.equal(train.inputs, torch.from_numpy(pixels).flatten(1))
    assert torch.equal(train.inputs, test.inputs)
    assert train.preprocessing.mean == (pytest.approx(pixels.mean() / 255),)
    assert train.preprocessing.std == (pytest.approx(pixels.std() / 255),)
    assert "images: 4x5 grey, column 'image'" in train.preprocessing.describe()[0]


def test_colour_is_channels_first():
    pixels = colour()
    train, _ = load(pixels)
    assert train.preprocessing.shape == (3, 5, 4)
    assert torch.equal(train.inputs.view(-1, 3, 5, 4), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    x = train.fetch(torch.arange(6), torch.float64).view(6, 3, 5, 4)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), unbiased=False), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_normalise(dtype):
    train, _ = load(colour())
    x = train.fetch(torch.arange(6), dtype)
    mean, std = (
        torch.tensor(v, dtype=torch.float64).repeat_interleave(20) for v in (train.preprocessing.mean, train.preprocessing.std)
    )
    assert x.dtype == dtype
    expected = ((train.inputs.double() / 255 - mean) / std).to(dtype)
    torch.testing.assert_close(x, expected)


def test_modes():
    base = Image.fromarray(colour(1, (8, 8))[0])
    for mode, channels in {"L": 1, "1": 1, "LA": 1, "P": 3, "RGBA": 3, "RGB": 3}.items():
        train, _ = load([encoded(base.convert(mode))] * 4)
        assert train.preprocessing.shape[0] == channels, mode
    train, _ = load([encoded(base.convert("CMYK"), "JPEG")] * 4)
    assert train.preprocessing.shape[0] == 3
    wide = Image.fromarray(np.array([[0, 257, 65535], [128, 129, 514]], dtype=np.uint16))
    train, _ = load([encoded(wide)] * 4)
    assert train.inputs[0].tolist() == [0, 1, 255, 0, 1, 2]


def test_exif_orientation_is_followed():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    out = io.BytesIO()
    Image.fromarray(grey(1, (4, 8))[0]).save(out, "JPEG", exif=exif)
    train, _ = load([{"bytes": out.getvalue(), "path": None}] * 4)
    assert train.preprocessing.shape == (1, 8, 4)


def test_grey_among_colour():
    pixels, shades = colour(2), grey(2)
    train, test = load([shades[0], pixels[0], shades[1], pixels[1]], [shades[0], shades[1]])
    assert train.preprocessing.shape == (3, 5, 4)
    assert torch.equal(train.inputs.view(4, 3, 20)[2], torch.from_numpy(shades[1]).flatten().expand(3, -1))
    assert torch.equal(test.inputs[0], train.inputs[0])
    with pytest.raises(InputError, match="split 'test' has colour images, and training had grey"):
        load(shades, pixels)


def test_mixed_sizes():
    small, large = grey(3), grey(1, (6, 7))
    with pytest.raises(
        InputError, match=r"mixed sizes, 4x5 in row 0 of split 'train' and 7x6 in row 2 of split 'train'; resize.*--image-size"
    ):
        load([small[0], small[1], large[0]])
    with pytest.raises(
        InputError, match=r"mixed sizes, 4x5 in row 0 of split 'train' and 7x6 in row 0 of split 'test'.*--image-size"
    ):
        load(small, large)


class TestImageSize:
    def test_mixed_sizes_are_resized(self):
        items = [*colour(2, (5, 4)), *grey(2, (30, 20)), *colour(2, (8, 8))]
        train, test = load(items, items[::-1], image_size=8)
        assert train.preprocessing.shape == (3, 8, 8)
        assert torch.equal(train.inputs, test.inputs.flip(0))
        assert "images: resized to 8x8 colour" in train.preprocessing.describe()[0]
        for picture, found in zip(items, train.inputs.view(6, 3, 8, 8), strict=True):
            wanted = Image.fromarray(picture).convert("RGB").resize((8, 8), Image.Resampling.BILINEAR)
            assert np.array_equal(np.asarray(wanted).transpose(2, 0, 1), found)

    def test_it_is_an_average_where_it_shrinks(self):
        """Antialiased: a fine checkerboard becomes its mean, not one of its two shades."""
        board = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
        train, _ = load([board] * 2, image_size=4)
        assert (train.inputs.int() - 128).abs().max() <= 2

    def test_images_of_that_size_are_left_as_they_are(self):
        pixels = grey(size=(8, 8))
        train, _ = load(pixels, image_size=8)
        assert torch.equal(train.inputs, torch.from_numpy(pixels).flatten(1))
        assert train.preprocessing.resized

    def test_raw_images_of_any_size(self, tmp_path):
        train, _ = load(colour(size=(9, 9)), image_size=8)
        stored = Preprocessing.from_json(json.loads(json.dumps(train.preprocessing.to_json())))
        assert stored == train.preprocessing
        large = colour(1, (20, 30))[0]
        Image.fromarray(large).save(tmp_path / "large.png")
        wanted = stored.encode([large])
        assert wanted.shape == (1, 192)
        paths = [str(tmp_path / "large.png")]
        rows = datasets.Dataset.from_dict({"image": paths})
        for form in (paths, [tmp_path / "large.png"], [{"image": paths[0]}], {"image": paths}, rows, split([large])):
            assert torch.equal(stored.encode(form), wanted)
        assert torch.equal(stored.encode(large[None]), wanted)
        with pytest.raises(InputError, match="images of 0x5"):
            stored.encode(np.zeros((2, 5, 0), np.uint8))

    def test_the_size_is_a_part_of_the_cache_and_of_the_preprocessing(self, cache_folder, monkeypatch):
        monkeypatch.setattr(images, "WORTH_CACHING_SECONDS", -1.0)
        sizes = [load(grey(), image_size=size)[0].in_features for size in (3, 4, None, 3)]
        assert sizes == [9, 16, 20, 9]
        assert len(list(cache_folder.glob("*.safetensors"))) == 3
        small, plain = (load(grey(), image_size=size)[0].preprocessing for size in (4, None))
        assert "resized" not in plain.to_json()
        assert load(grey(), preprocessing=small)[0].in_features == 16
        with pytest.raises(InputError, match="their shape: 1, 4, 4; now: 1, 3, 3"):
            load(grey(), preprocessing=small, image_size=3)

    @pytest.mark.parametrize("size", [0, -1, 4097, 2.5, "8"])
    def test_what_is_no_size(self, size):
        with pytest.raises(InputError, match=r"image_size \(--image-size\) is .*allowed: a whole number from 1 to 4096"):
            load(grey(), image_size=size)

    def test_a_table_has_no_image_size(self):
        rows = datasets.Dataset.from_dict({"x": [1.0, 2.0] * 5, "label": [0, 1] * 5})
        with pytest.raises(InputError, match=r"image_size \(--image-size\) 8 has no effect"):
            load_dataset(rows, image_size=8)

    def test_memory_is_that_of_the_resized_ones(self, monkeypatch):
        monkeypatch.setattr("f3triton.data.images.available_memory", lambda: 600)
        load(grey(size=(40, 40)), image_size=8)
        with pytest.raises(InputError, match="holds 6 images of 40x40"):
            load(grey(size=(40, 40)))

    def test_stored_sizes_that_are_broken(self):
        content = load(grey(), image_size=4)[0].preprocessing.to_json()
        for shape, resized in (([1, 4, 5], True), ([1, 4, 4], 1)):
            with pytest.raises(InputError, match="stored preprocessing is broken"):
                Preprocessing.from_json(content | {"shape": shape, "resized": resized})

    def test_a_stream(self):
        data = split([*grey(60, (8, 8)), *grey(60, (5, 4))]).to_iterable_dataset()
        train, test = stream_dataset(data, image_size=8, statistics_rows=50, max_train_samples=90, max_test_samples=20)
        assert (train.in_features, test.in_features) == (64, 64)
        assert train.read(train.reader(), 90)[0].shape == (90, 64)


def test_a_column_of_paths(tmp_path, monkeypatch):
    """A CSV file that names images, in its folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    for i, image in enumerate(grey(12)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "rows.csv").write_text("picture,label\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(12)))
    train, test = load_dataset(tmp_path / "rows.csv", image="picture")
    assert (len(train), len(test), train.preprocessing.shape) == (10, 2, (1, 5, 4))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rows.csv").write_text("picture,label\n" + "../0.png,0\n../1.png,1\n" * 5)
    with pytest.raises(InputError, match=r"the image '../[01].png' in row .* outside of the data set's folder"):
        load_dataset(tmp_path / "in" / "rows.csv", image="picture")


def test_broken_images(tmp_path):
    good = encoded(Image.fromarray(grey(1, (40, 40))[0]))
    cut = {"bytes": good["bytes"][:300], "path": None}
    flipped = {"bytes": good["bytes"][:60] + b"\x00" * 40 + good["bytes"][100:], "path": None}
    for bad in (cut, flipped):
        with pytest.raises(InputError, match=r"'image' holds an image that cannot be decoded in row 2 of split 'train'"):
            load([good, good, bad])
    with pytest.raises(InputError, match=r"row 1 of split 'train': it is no image file"):
        load([good, {"bytes": b"not an image", "path": None}])
    with pytest.raises(InputError, match=r"row 1 of split 'test'"):
        load([good, good], [good, cut])
    with pytest.raises(InputError, match="holds no image in row 1 of split 'train'"):
        load([good, None])
    with pytest.raises(InputError, match=r"gone.png' in row 0 of split 'train' cannot be read"):
        load([{"bytes": None, "path": str(tmp_path / "gone.png")}, good])


def test_images_in_files(tmp_path):
    pixels = grey(4)
    paths = []
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        paths.append({"bytes": None, "path": str(tmp_path / f"{i}.png")})
    train, _ = load(paths)
    assert torch.equal(train.inputs, torch.from_numpy(pixels).flatten(1))


def test_columns():
    pixels = grey(4)
    items = [encoded(Image.fromarray(p)) for p in pixels]
    columns = {"front": items, "back": items[::-1], "height": [1.0, 2.0, 3.0, 4.0], "label": [0, 1, 0, 1]}
    features = datasets.Features(
        {
            "front": datasets.Image(),
            "back": datasets.Image(),
            "height": datasets.Value("float32"),
            "label": datasets.Value("int64"),
        }
    )
    both = datasets.Dataset.from_dict(columns, features=features)
    splits = {"train": both, "test": both}
    with pytest.raises(InputError, match=r"several columns hold images; name one with image \(--image\): front, back"):
        load_dataset(splits)
    train, _ = load_dataset(splits, image="back")
    assert torch.equal(train.inputs, torch.from_numpy(pixels[::-1].copy()).flatten(1))
    assert "left out: column 'height' (beside an image)" in train.preprocessing.describe()
    assert load_dataset(splits, features=["front"])[0].preprocessing.image == "front"
    assert load_dataset(splits, features=["height"])[0].preprocessing.kind == "table"
    with pytest.raises(InputError, match="cannot be used beside other features"):
        load_dataset(splits, features=["front", "height"])
    with pytest.raises(InputError, match="column 'height' holds no images but float"):
        load_dataset(splits, image="height")
    # Without the Image feature: a struct of bytes and path is found, plain bytes once they are named.
    plain = datasets.Dataset.from_dict({"picture": items, "label": [0, 1, 0, 1]})
    assert load_dataset({"train": plain, "test": plain})[0].preprocessing.image == "picture"
    raw = datasets.Dataset.from_dict({"picture": [item["bytes"] for item in items], "label": [0, 1, 0, 1]})
    assert load_dataset({"train": raw, "test": raw}, image="picture")[0].in_features == 20


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4), (5, 4, 1), (5, 4, 3), (3, 5, 4)])
@pytest.mark.parametrize("typed", [True, False])
def test_pixel_arrays(shape, typed):
    values = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    kind = (datasets.Array2D if len(shape) == 2 else datasets.Array3D)(shape, "uint8")
    features = datasets.Features({"x": kind, "label": datasets.Value("int64")}) if typed else None
    rows = datasets.Dataset.from_dict({"x": values.tolist(), "label": [0, 1] * 3}, features=features)
    train, _ = load_dataset({"train": rows, "test": rows})
    flat = np.moveaxis(values, -1, 1) if shape[-1] in (1, 3) else values
    assert train.preprocessing.kind == "image"
    assert train.preprocessing.shape == ((3 if 3 in shape else 1), 5, 4)
    assert torch.equal(train.inputs, torch.from_numpy(flat.reshape(6, -1).copy()))
    assert torch.equal(train.preprocessing.encode(rows), train.inputs)


def test_matrices_that_are_no_images_are_features():
    values = np.random.default_rng(0).normal(size=(6, 3, 2))
    rows = datasets.Dataset.from_dict({"x": values.tolist(), "label": [0, 1] * 3})
    train, _ = load_dataset({"train": rows, "test": rows})
    assert (train.preprocessing.kind, train.in_features) == ("table", 6)


def test_sound_is_no_image():
    # Cast, not encoded: encoding sound needs a library of its own.
    columns = {"sound": [{"bytes": b"RIFF", "path": None}] * 2, "x": [1.0, 2.0], "label": [0, 1]}
    rows = datasets.Dataset.from_dict(columns).cast_column("sound", datasets.Audio(decode=False))
    train, _ = load_dataset({"train": rows, "test": rows})
    assert "left out: column 'sound' (audio)" in train.preprocessing.describe()


class TestEncode:
    def test_every_form(self):
        pixels = colour()
        train, _ = load(pixels)
        encode = train.preprocessing.encode
        pil = [Image.fromarray(p) for p in pixels]
        forms = [
            split(pixels),
            [{"image": image, "label": 0} for image in pil],
            [encoded(image) for image in pil],
            [{"image": encoded(image)} for image in pil],
            {"image": pil},
            pil,
            [encoded(image)["bytes"] for image in pil],
            list(pixels),
            pixels,
            torch.from_numpy(pixels),
            torch.from_numpy(pixels).permute(0, 3, 1, 2),
            torch.from_numpy(pixels).permute(0, 3, 1, 2).flatten(1),
            pixels.astype(np.float32),
        ]
        for form in forms:
            assert torch.equal(encode(form), train.inputs)
        assert encode([]).shape == (0, 60)

    def test_stored_copy(self):
        train, test = load(grey())
        stored = Preprocessing.from_json(json.loads(json.dumps(train.preprocessing.to_json())))
        assert stored == train.preprocessing
        assert torch.equal(stored.normalise(stored.encode(split(grey()))), test.fetch(torch.arange(6)))
        assert stored.encode(grey()).shape == (6, 20)
        assert stored.encode(grey()[0:1]).shape == (1, 20)

    def test_grey_rows_for_a_colour_model(self):
        train, _ = load(colour())
        shades = grey(2)
        assert torch.equal(train.preprocessing.encode(shades).view(2, 3, 20)[0, 2], torch.from_numpy(shades[0]).flatten())

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (grey(2, (6, 7)), "images of 7x6; training had 4x5"),
            (colour(2), "colour images, and training had grey"),
            (grey(2) / 255.0, "whole numbers from 0 to 255"),
            ([None], "holds no image in row 0 of the rows given"),
            ([{"label": 1}], "no column 'image' in the rows given"),
            (["cat.png"], "cat.png.* cannot be read: cannot open"),
            (5, "the rows given are a int"),
            (np.zeros((2, 19)), r"shape \[2, 19\]"),
        ],
    )
    def test_errors(self, rows, message):
        train, _ = load(grey())
        with pytest.raises(InputError, match=message):
            train.preprocessing.encode(rows)


class TestCache:
    @pytest.fixture(autouse=True)
    def always(self, monkeypatch):
        monkeypatch.setattr(images, "WORTH_CACHING_SECONDS", -1.0)

    def test_read_back_and_keyed_by_content(self, cache_folder, monkeypatch):
        first, _ = load(grey())
        assert len(list(cache_folder.glob("*.safetensors"))) == 1
        assert not list(cache_folder.glob("*.tmp"))
        other, _ = load(grey(seed=1))
        assert len(list(cache_folder.glob("*.safetensors"))) == 2
        assert not torch.equal(first.inputs, other.inputs)
        monkeypatch.setattr(images, "_decode", lambda *_: pytest.fail("decoded again"))
        again, _ = load(grey())
        assert torch.equal(again.inputs, first.inputs)

    @pytest.mark.parametrize("damage", ["short", "flipped", "empty", "folder"])
    def test_damage_is_decoded_over(self, cache_folder, damage):
        first, _ = load(grey())
        (file,) = cache_folder.glob("*.safetensors")
        content = file.read_bytes()
        file.unlink()
        if damage == "folder":
            file.mkdir()
        else:
            file.write_bytes({"short": content[:-7], "flipped": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}[damage])
        again, _ = load(grey())
        assert torch.equal(again.inputs, first.inputs)

    def test_an_unwritable_cache_is_no_error(self, monkeypatch):
        monkeypatch.setenv("F3TRITON_CACHE", "/dev/null/nowhere")
        assert len(load(grey())[0]) == 6

    def test_a_full_disk_is_left_alone(self, cache_folder, monkeypatch):
        monkeypatch.setattr(cache, "MAX_SHARE_OF_FREE_SPACE", 0.0)
        load(grey())
        assert not list(cache_folder.glob("*"))
