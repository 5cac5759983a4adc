"""Pictures: what is drawn, on which scale, and that nothing of matplotlib's global state is touched."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from bench import draw as bench_draw
from f3triton.run import curves

SLOW = [(epoch, 20 - epoch) for epoch in range(1, 11)]
STEEP = [(epoch, 100 / 2**epoch) for epoch in range(1, 11)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that are saved."""
    found: list = []
    monkeypatch.setattr(curves, "save", lambda figure, path, dpi=100: found.append(figure))
    return found


def draw(drawn: list, **named: list) -> object:
    curves.draw_curves(Path("unused"), "a title", "epoch", "percent wrong", {n.replace("_", ", "): c for n, c in named.items()})
    return drawn[-1].axes[0]


def test_a_colour_for_each_method_and_dots_for_training(drawn: list) -> None:
    axes = draw(drawn, f3_train=SLOW, f3_test=SLOW, bp_train=SLOW, bp_test=SLOW)
    looks = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in axes.lines}
    blue, red = curves.COLOURS[:2]
    assert looks == {"f3, train": (blue, ":"), "f3, test": (blue, "-"), "bp, train": (red, ":"), "bp, test": (red, "-")}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(looks)
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("a title", "epoch", "percent wrong")


def test_a_wide_range_of_positive_values_is_logarithmic(drawn: list) -> None:
    assert draw(drawn, f3_test=STEEP).get_yscale() == "log"
    plain = draw(drawn, f3_test=SLOW)
    assert plain.get_yscale() == "linear"
    assert plain.get_ylim()[0] == 0
    foot = draw(drawn, f3_test=[*STEEP, (11, 0.0)])  # zero has no logarithm: it is at the foot, and said there
    assert foot.get_yscale() == "log"
    assert [text.get_text() for text in foot.texts] == ["0"]
    below = draw(drawn, f3_test=[*STEEP, (11, -3.0)])
    assert below.get_yscale() == "linear"
    assert below.get_ylim()[0] == -3


def test_last_values_are_written_and_do_not_touch(drawn: list) -> None:
    near = {f"m{i}_test": [(1, 5.0), (10, 2 + i / 100)] for i in range(5)}
    axes = draw(drawn, **near, early_test=[(1, 9.0), (2, 8.0)])
    figure = axes.figure
    figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert {text.get_text() for text in axes.texts} == {"2", "2.01", "2.02", "2.03", "2.04", "8"}
    assert not any(low.overlaps(high) for low, high in itertools.pairwise(boxes))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)


def test_what_is_not_finite_is_left_out(drawn: list) -> None:
    axes = draw(drawn, f3_train=[(1, float("nan"))], f3_test=[(1, 3.0), (2, float("inf")), (3, 2.0)])
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 3]]


def test_no_points_no_picture(tmp_path: Path) -> None:
    curves.draw_curves(tmp_path / "a.png", "", "", "", {"f3, test": [(1, float("nan"))], "bp, test": []})
    assert not list(tmp_path.iterdir())


def test_the_same_picture_each_time_and_no_global_state(tmp_path: Path) -> None:
    import matplotlib

    before, pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    for name in ("a.png", "b.png"):
        curves.draw_curves(tmp_path / name, "t", "x", "y", {"f3, test": SLOW, "bp, test": [(1, 1.0)]})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").size == (860, 480)
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "bench" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_every_result_can_be_drawn(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list = []
    monkeypatch.setattr(bench_draw, "save", lambda figure, path: found.append(figure))
    bench_draw.draw(json.loads(path.read_text()), Path("unused"))
    used = {line.get_color() for axes in found[0].axes for line in axes.lines}
    assert len(used & set(curves.COLOURS)) <= 6
    assert all(axes.get_title() for axes in found[0].axes if axes.axison)


def test_without_matplotlib_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bench import report as bench_report

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(curves.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["report"])
    monkeypatch.setattr(bench_report, "documents", list)
    with pytest.raises(SystemExit, match="the pictures need matplotlib"):
        bench_report.main()
    curves.draw_curves(tmp_path / "a.png", "", "", "", {"f3, test": SLOW})
    assert not list(tmp_path.iterdir())


def test_all_results_are_drawn_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list = []
    monkeypatch.setattr(bench_draw, "draw", lambda content, path: found.append(path.stem))
    monkeypatch.setattr(sys, "argv", ["draw"])
    bench_draw.main()
    assert {"paper", "rates"} <= {*found}


def test_an_uphill_angle_is_said() -> None:
    from types import SimpleNamespace

    from f3triton.run.diagnostics import summary_lines

    stages = [{"angle": 100.0}, {"angle": 20.0}, {"angle": None}]
    (line,) = summary_lines(SimpleNamespace(records=[{"stages": stages}], warnings=[]))
    assert line.endswith("100, 20 (above 90 a step goes uphill, as in stage 1)")
