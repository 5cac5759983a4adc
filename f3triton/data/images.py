"""Images as one contiguous uint8 tensor, decoded once."""

from __future__ import annotations

import hashlib
import io
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.exceptions import InputError
from ..base.files import read_bytes
from ..base.memory import available_memory
from ..base.text import readable_bytes, short
from . import cache
from .columns import PIXELS, RaggedError, Table, dense, image_layout, kind_of, one_line

DECODER_VERSION = b"1"  # part of the key of cached images: change it when the same bytes are decoded differently
WORTH_CACHING_SECONDS = 0.5
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
LARGEST_IMAGE, LARGEST_FILE = 1 << 26, 1 << 28  # pixels, bytes
LARGEST_SIDE = 4096  # of a resized image
RESIZE = "resize them all with image_size (--image-size N)"


def load_images(rows: Table, name: str, size: int | None = None, cached: bool = True) -> Tensor:
    """The images of a column, uint8 [n, C, H, W]; C is 1 if all are grey, else 3.

    With `size`, all are resized to that height and width. Where `cached`, what took long to decode is kept on disk for the
    next time. Raises InputError: an image missing or unreadable, or, without a `size`, of another one than the first.
    """
    if kind_of(rows, name)[0] == PIXELS:
        return _stack((image for _, piece in rows.pieces(name) for image in _pixel_rows(piece, rows, name)), rows, name, size)
    if not cached:
        return _decode_all(rows, name, size)
    version = DECODER_VERSION if size is None else b"%s, resized to %d" % (DECODER_VERSION, size)
    key = hashlib.blake2b(version, digest_size=20)
    for i, value in _values(rows, name):
        data = _bytes_of(value, i, rows, name)
        key.update(len(data).to_bytes(8, "little"))
        key.update(data)
    pixels = cache.read(key.hexdigest(), len(rows))
    if pixels is None:
        start = time.perf_counter()
        pixels = _decode_all(rows, name, size)
        if time.perf_counter() - start > WORTH_CACHING_SECONDS:
            cache.write(key.hexdigest(), pixels)
    return pixels


def check_size(size: int | None) -> None:
    """Raise InputError where images cannot be resized to `size`."""
    if size is not None and (not isinstance(size, int) or not 1 <= size <= LARGEST_SIDE):
        raise InputError(f"image_size (--image-size) is {size!r}; allowed: a whole number from 1 to {LARGEST_SIDE}")


def _decode_all(rows: Table, name: str, size: int | None) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, about odd metadata and palettes: the pixels are what counts
        return _stack((_decode(value, i, rows, name) for i, value in _values(rows, name)), rows, name, size)


def convert_images(values: Iterable[Any], name: str, size: int | None = None, where: str = "the rows given") -> Tensor:
    """Images as people hold them (PIL, encoded bytes, `{"bytes", "path"}`, arrays, tensors) as uint8 [n, C, H, W]."""
    import pyarrow as pa

    values = list(values)
    rows = Table(pa.table({name: pa.nulls(len(values))}), where)  # for the messages
    return _stack((_convert(value, i, rows, name) for i, value in enumerate(values)), rows, name, size)


def match_channels(pixels: Tensor, channels: int, where: str) -> Tensor:
    """Grey images [n, 1, H, W] with three equal channels where training had colour; colour where it had grey is an error."""
    if pixels.shape[1] == channels or not len(pixels):
        return pixels
    if channels == 3:
        return pixels.expand(-1, 3, -1, -1).contiguous()
    raise InputError(f"{where} has colour images, and training had grey ones; convert them to one kind first")


def channel_moments(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation (1 for a constant) over all pixels of each channel, in units of 255."""
    mean, std = [], []
    for channel in range(pixels.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for part in pixels[:, channel].split(4096):  # bincount widens to int64: eight times the memory of its part
            counts += np.bincount(part.numpy().ravel(), minlength=256)
        values = np.arange(256) / 255
        centre = float((counts * values).sum() / counts.sum())
        spread = float(np.sqrt((counts * (values - centre) ** 2).sum() / counts.sum()))
        mean.append(centre)
        std.append(spread if np.count_nonzero(counts) > 1 else 1.0)
    return tuple(mean), tuple(std)


def _values(rows: Table, name: str) -> Iterator[tuple[int, Any]]:
    """The number of each row, and what it holds: bytes, a path, or a dict of both."""
    for start, piece in rows.pieces(name):
        yield from enumerate(piece.to_pylist(), start)


def _bytes_of(value: Any, i: int, rows: Table, name: str) -> bytes:
    """The encoded image of a row; that of an image folder is read from its file."""
    value = {"path": value} if isinstance(value, str) else value
    data = value if value is None or isinstance(value, bytes) else value.get("bytes")
    if data is None and value is not None and value.get("path"):
        try:
            data = read_bytes(_inside(value["path"], rows.folders), LARGEST_FILE)
        except (OSError, ValueError, RuntimeError) as error:
            reason = short(one_line(error), 200)[1:-1]
            raise InputError(f"the image {short(value['path'], 200)} in {rows.row(i)} cannot be read: {reason}") from error
    if data is None:
        raise InputError(f"column {name!r} holds no image in {rows.row(i)}; drop such rows first")
    return data


def _inside(path: str, folders: tuple[Path, ...] | None) -> Path:
    """Where a file is that a row names, links followed. Raises InputError where that is in none of the `folders`."""
    if folders is None:
        return Path(path).resolve()
    whole = (folders[0] / path).resolve()
    if not any(whole.is_relative_to(folder.resolve()) for folder in folders):
        raise InputError("it is outside of the data set's folder")
    return whole


def _decode(value: Any, i: int, rows: Table, name: str) -> np.ndarray:
    """One encoded image as uint8 [H, W] or [3, H, W]."""
    import PIL.Image

    data = _bytes_of(value, i, rows, name)
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)  # others may start programs
        if image.width * image.height > LARGEST_IMAGE:
            raise ValueError(f"it has {image.width}x{image.height} pixels; allowed are {LARGEST_IMAGE:,}")
        return _pixels_of(image)
    except Exception as error:  # on broken bytes PIL's decoders raise nearly anything
        what = "it is no image file" if isinstance(error, PIL.UnidentifiedImageError) else one_line(error)
        path = value if isinstance(value, str) else None if isinstance(value, bytes) else value.get("path")
        file = "" if path is None else f" ({short(path, 200)})"
        raise InputError(f"column {name!r} holds an image that cannot be decoded in {rows.row(i)}{file}: {what}") from error


def _pixels_of(image: Any) -> np.ndarray:
    """A PIL image as uint8, grey [H, W] or colour [3, H, W]."""
    import PIL.ImageOps

    if "exif" in image.info:
        image = PIL.ImageOps.exif_transpose(image)
    mode = image.mode
    if mode.startswith("I"):  # 16 bits a pixel (or 32 that hold 16)
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return ((wide + 128) // 257).astype(np.uint8)
    if mode == "F":
        raise ValueError("floating-point pixels are not supported; store 8 bits a pixel")
    if mode in ("1", "LA", "La"):
        image = image.convert("L")
    elif mode not in ("L", "RGB"):
        image = image.convert("RGB")  # palettes, alpha, CMYK, ...
    pixels = np.frombuffer(image.tobytes(), dtype=np.uint8)  # several times faster than np.asarray(image)
    if image.mode == "L":
        return pixels.reshape(image.height, image.width)
    return pixels.reshape(image.height, image.width, 3).transpose(2, 0, 1)


def _pixel_rows(piece: Any, rows: Table, name: str) -> Iterator[np.ndarray]:
    """The rows of a piece of nested lists as uint8 [H, W] or [C, H, W]."""
    try:
        values = dense(piece)  # [m, ...] float64
    except RaggedError as error:
        raise InputError(f"column {name!r} of {rows.where} holds images of differing sizes: {error}") from error
    for value in values:
        yield _pixels_of_array(value, name, rows.where)


def _pixels_of_array(value: np.ndarray, name: str, where: str) -> np.ndarray:
    """An array of whole numbers in 0..255 as uint8 [H, W] or [C, H, W]."""
    layout = image_layout(value.shape)
    if layout is None:
        raise InputError(
            f"column {name!r} of {where} holds an array of shape {value.shape}; images are [H, W], [C, H, W] or [H, W, C]"
        )
    if value.dtype != np.uint8:
        with np.errstate(invalid="ignore"):
            whole = value.astype(np.uint8)
        if not np.array_equal(whole, value):
            raise InputError(f"column {name!r} of {where} holds pixels that are missing or not whole numbers from 0 to 255")
        value = whole
    if value.ndim == 3 and value.shape != layout:
        value = value.transpose(2, 0, 1)
    return value[0] if value.ndim == 3 and layout[0] == 1 else value


def _convert(value: Any, i: int, rows: Table, name: str) -> np.ndarray:
    if isinstance(value, (str, Path)):
        value = {"path": str(Path(value).expanduser())}
    if value is None or isinstance(value, (bytes, dict)):
        return _decode(value, i, rows, name)
    if hasattr(value, "tobytes") and hasattr(value, "mode"):  # a PIL image
        try:
            return _pixels_of(value)
        except (OSError, ValueError) as error:
            raise InputError(f"the image in {rows.row(i)} cannot be used: {one_line(error)}") from error
    array = value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype == object:
        raise InputError(f"column {name!r} holds {type(value).__name__} in {rows.row(i)}, where an image is needed")
    return _pixels_of_array(array, name, rows.where)


def _resized(image: np.ndarray, size: int | None) -> np.ndarray:
    """An image [H, W] or [3, H, W] stretched to `size` x `size`: bilinear, over all pixels that an output pixel covers."""
    import PIL.Image

    if size is None or image.shape[-2:] == (size, size) or not image.size:
        return image
    colour = image.ndim == 3
    picture = PIL.Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0) if colour else image))
    pixels = np.asarray(picture.resize((size, size), PIL.Image.Resampling.BILINEAR))
    return pixels.transpose(2, 0, 1) if colour else pixels


def _stack(images: Iterable[np.ndarray], rows: Table, name: str, resize: int | None) -> Tensor:
    """Images [H, W] or [3, H, W] of one size, or resized to one, as uint8 [n, C, H, W]; grey ones are widened once a colour one
    appears."""
    out = np.empty((0, 1, 0, 0), dtype=np.uint8)
    for i, image in enumerate(_resized(image, resize) for image in images):
        channels, size = (1 if image.ndim == 2 else 3), image.shape[-2:]
        needed, free = len(rows) * channels * size[0] * size[1], available_memory()
        if (i == 0 or channels > out.shape[1]) and needed > free:
            raise InputError(
                f"column {name!r} of {rows.where} holds {len(rows):,} images of {_size(size)}, which need "
                f"{readable_bytes(needed)}, and {readable_bytes(free)} of memory are free"
            )
        if i == 0:
            out = np.empty((len(rows), channels, *size), dtype=np.uint8)
        if size != out.shape[2:]:
            raise InputError(
                f"column {name!r} holds images of mixed sizes, {_size(out.shape[2:])} in {rows.row(0)} and {_size(size)} in "
                f"{rows.row(i)}; {RESIZE}"
            )
        if channels > out.shape[1]:
            grey, out = out, np.empty((len(rows), 3, *size), dtype=np.uint8)
            out[:i] = grey[:i]
        out[i] = image
    return torch.from_numpy(out)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
