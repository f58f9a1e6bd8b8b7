"""Plots: numbers land where they belong, and no text becomes markup."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.report.plots import Bin, Line, bar, curves, funnel_bar, histogram, log_ticks, short, ticks

SVG = "{http://www.w3.org/2000/svg}"


def _parse(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(str(markup).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def test_bars_are_as_tall_as_their_counts() -> None:
    bins = [Bin(0, 1, 10, 0, 0), Bin(1, 2, 20, 10, 10), Bin(2, 3, 0, 0, 0)]
    drawing = _parse(histogram(bins, [(1.0, "at least 1")], "score"))
    rects = list(drawing.iter(f"{SVG}rect"))
    heights = [float(rect.get("height", 0)) for rect in rects]
    fills = [rect.get("class") or rect.get("fill") for rect in rects]
    assert fills == ["p-keep", "p-keep", "url(#hatch)", "url(#dots)"]
    assert heights[1] == pytest.approx(2 * heights[0], rel=0.02)
    assert heights[2] == pytest.approx(heights[0], rel=0.02)
    cut = next(path for path in drawing.iter(f"{SVG}path") if path.get("class") == "p-cut")
    # The cut at 1 stands where the second bar begins.
    assert float(re.match(r"M([\d.]+)", cut.get("d", "")).group(1)) == pytest.approx(float(rects[1].get("x", 0)), abs=1)  # type: ignore[union-attr]
    assert "20 kept" not in (drawing.get("aria-label") or "")
    assert "30 kept, 10 dropped by this rule, 10 ended elsewhere" in (drawing.get("aria-label") or "")


def test_texts_are_escaped() -> None:
    evil = '</svg><script>alert("x")</script>'
    for markup in (
        histogram([Bin(0, 1, 1, 1, 1)], [(0.5, evil)], evil),
        curves([Line(evil, [0, 1], [1, 2])], evil, evil),
        bar([(evil, 50.0)]),
    ):
        assert "<script" not in markup
        if "<svg" in markup:
            _parse(markup)


@settings(max_examples=60, deadline=None, database=None)
@given(low=st.floats(-1e9, 1e9, allow_nan=False), size=st.floats(1e-6, 1e9), wanted=st.integers(1, 9))
def test_ticks_lie_inside_and_are_few(low: float, size: float, wanted: int) -> None:
    high = low + size
    found = ticks(low, high, wanted)
    assert len(found) <= wanted + 2
    assert all(low - 1e-6 * size - 1e-9 * abs(low) <= value <= high + 1e-6 * size + 1e-9 * abs(high) for value in found)


def test_odd_ranges() -> None:
    assert ticks(1, 1) == [1]
    assert ticks(math.nan, 1) == []
    assert log_ticks(0.01, 1) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])


@pytest.mark.parametrize(
    ("value", "text"), [(0.25, "0.25"), (1234, "1,234"), (25_000, "25k"), (1_200_000, "1.2M"), (-3e9, "-3G"), (0, "0")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_curves_take_a_log_axis_where_values_span_far() -> None:
    xs = list(range(100))
    assert "log scale" in curves([Line("train", xs, [10 * 0.9**x for x in xs])], "step", "loss")
    assert "log scale" not in curves([Line("train", xs, [2 - x / 100 for x in xs])], "step", "loss")


@pytest.mark.parametrize(
    "ys", [[math.nan, math.nan], [math.inf, math.nan], [1.0, math.nan], [0.0, 0.0], [-1.0, -1.0], [1e30, -1e30]]
)
def test_curves_of_odd_values(ys: list[float]) -> None:
    markup = curves([Line("train", [1.0, 2.0], ys), Line("nothing", [], [])], "step", "loss")
    assert "nan" not in re.sub(r'aria-label="[^"]*"', "", str(markup)).lower()
    if any(math.isfinite(y) for y in ys):
        _parse(markup)
    else:
        assert "No finite value" in markup


def test_a_lone_row_is_seen() -> None:
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", funnel_bar(1_000_000, 1_000_000, 999_999))]
    assert widths == pytest.approx([99.4, 0.6])
    assert re.findall(r"width:([\d.]+)%", funnel_bar(0, 0, 0)) == []
