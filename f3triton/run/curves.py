"""A run's curves as a picture, drawn with Pillow, so that every installation can draw them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Curve = Sequence[tuple[float, float]]

_COLOURS = ("#1f6fb4", "#d9641e", "#3a923a", "#7a7a7a")
_WIDTH, _HEIGHT, _FINER = 860, 480, 2  # pixels; drawn finer and shrunk, which smooths the lines
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 24, 52, 56


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers that cover low..high in about `count` steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def draw_curves(path: Path, title: str, x_label: str, y_label: str, curves: dict[str, Curve]) -> None:
    """Draw named curves `[(x, y), ...]` into a PNG at `path`; points that are not finite are left out.

    Writes nothing if there is no point at all. Raises OSError where the file cannot be written.
    """
    finite = {name: [(x, y) for x, y in curve if math.isfinite(x) and math.isfinite(y)] for name, curve in curves.items()}
    points = [point for curve in finite.values() for point in curve]
    if not points:
        return
    top = max(y for _, y in points)
    x_ticks = _ticks(0, max(x for x, _ in points) or 1)
    y_ticks = _ticks(min(0, min(y for _, y in points)), top if top > 0 else 1)
    x_high, y_low, y_high = max(x for x, _ in points) or 1, y_ticks[0], y_ticks[-1]

    image = Image.new("RGB", (_WIDTH * _FINER, _HEIGHT * _FINER), "white")
    draw = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(13 * _FINER), ImageFont.load_default(16 * _FINER)

    def place(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + x / x_high * (_WIDTH - _LEFT - _RIGHT)
        down = _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return right * _FINER, down * _FINER

    for tick in y_ticks:
        draw.line([place(0, tick), place(x_high, tick)], fill="#e2e2e2", width=_FINER)
        x, y = place(0, tick)
        draw.text((x - 8 * _FINER, y), f"{tick:g}", font=small, fill="#444444", anchor="rm")
    for tick in x_ticks:
        if tick <= x_high:
            x, y = place(tick, y_low)
            draw.text((x, y + 8 * _FINER), f"{tick:g}", font=small, fill="#444444", anchor="mt")
    draw.text((_LEFT * _FINER, 10 * _FINER), title, font=large, fill="black")
    draw.text((place(x_high / 2, y_low)[0], (_HEIGHT - 24) * _FINER), x_label, font=small, fill="black", anchor="mt")
    draw.text((10 * _FINER, (_TOP - 20) * _FINER), y_label, font=small, fill="black")

    for number, (name, curve) in enumerate(finite.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        placed = [place(x, y) for x, y in curve]
        if len(placed) > 1:
            draw.line(placed, fill=colour, width=2 * _FINER, joint="curve")
        for x, y in placed if len(placed) <= 20 else placed[-1:]:
            draw.ellipse([x - 3 * _FINER, y - 3 * _FINER, x + 3 * _FINER, y + 3 * _FINER], fill=colour)
        row = (_TOP + 6 + 18 * number) * _FINER
        draw.line([((_WIDTH - 210) * _FINER, row), ((_WIDTH - 186) * _FINER, row)], fill=colour, width=3 * _FINER)
        draw.text(((_WIDTH - 178) * _FINER, row), name, font=small, fill="black", anchor="lm")
    image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS).save(path, format="PNG")
