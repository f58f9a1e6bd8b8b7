"""Plots for reports, drawn as inline SVG from numbers: no library, no script, no network.

Colours are CSS classes of the page, so a plot follows light and dark; what a colour says, a shape or a word says too:
kept is solid, dropped is hatched, held-out lines are dashed with dots. Every text is escaped, so a plot cannot carry
markup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

# Hatches that every plot of a page refers to; the page draws this once.
PATTERNS = Markup(
    '<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs>'
    '<pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="5" height="5" class="p-drop-bg"/><rect width="2" height="5" class="p-drop"/></pattern>'
    '<pattern id="dots" width="5" height="5" patternUnits="userSpaceOnUse">'
    '<rect width="5" height="5" class="p-other-bg"/><circle cx="2.5" cy="2.5" r=".9" class="p-other"/></pattern>'
    '<pattern id="cross" width="6" height="6" patternUnits="userSpaceOnUse">'
    '<rect width="6" height="6" class="p-fail-bg"/><path d="M0 0L6 6M6 0L0 6" class="p-fail"/></pattern>'
    "</defs></svg>"
)


@dataclass(frozen=True)
class Bin:
    """One bar of a histogram over [low, high): rows kept, dropped by the rule at hand, and ended elsewhere."""

    low: float
    high: float
    kept: int
    dropped: int
    elsewhere: int

    @property
    def total(self) -> int:
        return self.kept + self.dropped + self.elsewhere


@dataclass(frozen=True)
class Line:
    """One line of a plot. style: "train", "held_out" or "faint". Points whose y is not finite are left out."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "train"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers from low to high."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    rough = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step + 0.0 for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high (both positive) for a logarithmic axis: decades, with 2 and 5 where few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    found = [factor * 10.0**power for power in decades for factor in factors]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]


def short(value: float) -> str:
    """A number for an axis: 1200000 -> 1.2M, 0.25 -> 0.25."""
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * (10 if suffix == "k" else 1):
            return f"{value / limit:.3g}{suffix}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def funnel_bar(rows_in: int, entering: int, leaving: int, failed: int = 0) -> Markup:
    """One step as a bar whose whole width is every row of the input: solid stays, hatched goes, empty went before."""
    whole = max(rows_in, 1)
    solid, gone, broken = (100 * part / whole for part in (leaving, entering - leaving - failed, failed))
    # A step that takes rows is seen to take some, also where they are one in a million.
    gone = max(gone, 0.6) if entering - leaving - failed > 0 else 0.0
    broken = max(broken, 0.6) if failed else 0.0
    solid = min(solid, 100 - gone - broken)
    return bar([("f-keep", solid), ("f-drop", gone), ("f-fail", broken)])


def bar(parts: Sequence[tuple[str, float]]) -> Markup:
    """A bar of (class, percent of the whole width), from left to right."""
    drawn = [
        Markup('<i class="{}" style="width:{:.3f}%"></i>').format(name, share) for name, share in parts if share > 0
    ]
    return Markup('<span class="bar" aria-hidden="true">{}</span>').format(Markup("").join(drawn))


def histogram(
    bins: Sequence[Bin], cuts: Sequence[tuple[float, str]], label: str, width: int = 420, height: int = 200
) -> Markup:
    """Stacked bars (kept below, then dropped here, then ended elsewhere) with the rule's cuts drawn in.

    cuts: (value, words such as "at least 0.28"). label: what the x axis holds, with its unit.
    """
    left, right, top, bottom = 44, 10, 24, 34
    low, high = bins[0].low, bins[-1].high
    tallest = max(max(one.total for one in bins), 1)
    span_x, span_y = width - left - right, height - top - bottom

    def x(value: float) -> float:
        return left + span_x * (value - low) / (high - low)

    def y(count: float) -> float:
        return top + span_y * (1 - count / tallest)

    kept, dropped, elsewhere = (sum(getattr(one, part) for one in bins) for part in ("kept", "dropped", "elsewhere"))
    words = ", ".join(f"cut {text}" for _, text in cuts)
    parts = [
        _open(
            width,
            height,
            f"{label}: {kept:,} kept, {dropped:,} dropped by this rule, {elsewhere:,} ended elsewhere; {words}",
        )
    ]
    for count in (count for count in ticks(0, tallest, 3) if count == int(count)):
        parts.append(_grid(left, width - right, y(count), short(count)))
    for one in bins:
        begin, end = x(one.low) + 0.4, x(one.high) - 0.4
        floor = 0
        for count, fill in (
            (one.kept, 'class="p-keep"'),
            (one.dropped, 'fill="url(#hatch)"'),
            (one.elsewhere, 'fill="url(#dots)"'),
        ):
            if count:
                ceiling = floor + count
                # A lone row among thousands still shows.
                tall = max(y(floor) - y(ceiling), 0.8)
                parts.append(
                    Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" ').format(
                        begin, y(floor) - tall, max(end - begin, 0.6), tall
                    )
                    + Markup(fill + "/>")
                )
                floor = ceiling
    for value in ticks(low, high, 5):
        parts.append(_text(x(value), height - bottom + 14, short(value), "middle"))
    parts.append(Markup('<path d="M{} {:.1f}H{}" class="p-axis"/>').format(left, y(0) + 0.5, width - right))
    for value, text in cuts:
        at = min(max(x(value), left), width - right)
        flip = at > left + span_x * 0.6
        parts.append(Markup('<path d="M{:.1f} {}V{:.1f}" class="p-cut"/>').format(at, top - 8, y(0)))
        parts.append(_text(at + (-5 if flip else 5), top - 6, text, "end" if flip else "start", "p-cut-label"))
    parts.append(_text(left + span_x / 2, height - 4, label, "middle", "p-label"))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def curves(lines: Sequence[Line], x_label: str, y_label: str, width: int = 760, height: int = 320) -> Markup:
    """Lines over a common x axis, each named at its end; the y axis is logarithmic where values span over 20 times."""
    points = [
        [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
        for line in lines
    ]
    every = [point for one in points for point in one]
    if not every:
        return Markup('<p class="none">No finite value was recorded.</p>')
    # The faint line's single spikes must not flatten the rest: its top percent may leave the picture.
    steady = [p for one, line in zip(points, lines, strict=True) if line.style != "faint" for p in one] or every
    ys = sorted(y for _, y in every)
    low, high = ys[0], max(max(y for _, y in steady), ys[int(0.99 * (len(ys) - 1))])
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    logarithmic = low > 0 and high / low > 20
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = (
        (low / 1.15, high * 1.15) if logarithmic else (max(low - pad, 0.0) if low >= 0 else low - pad, high + pad)
    )
    if last == first:
        first, last = first - 1, last + 1
    left, right, top, bottom = 48, 14, 14, 38
    span_x, span_y = width - left - right, height - top - bottom

    def x_at(value: float) -> float:
        return left + span_x * (value - first) / (last - first)

    def y_at(value: float) -> float:
        linear = (value - low) / (high - low)
        share = math.log(max(value, low) / low) / math.log(high / low) if logarithmic else linear
        return top + span_y * (1 - min(max(share, 0.0), 1.0))

    said = "; ".join(
        f"{line.name} from {one[0][1]:.4g} at {one[0][0]:g} to {one[-1][1]:.4g} at {one[-1][0]:g}"
        for line, one in zip(lines, points, strict=True)
        if one and line.style != "faint"
    )
    parts = [_open(width, height, f"{y_label} over {x_label}: {said}")]
    for value in log_ticks(low, high) if logarithmic else ticks(low, high, 6):
        parts.append(_grid(left, width - right, y_at(value), short(value)))
    for value in ticks(first, last, max(3, width // 110)):
        parts.append(_text(x_at(value), height - bottom + 16, short(value), "middle"))
    parts.append(Markup('<path d="M{} {}H{}" class="p-axis"/>').format(left, height - bottom, width - right))
    for line, one in zip(lines, points, strict=True):
        if not one:
            continue
        trail = " ".join(f"{'L' if place else 'M'}{x_at(x):.1f} {y_at(y):.1f}" for place, (x, y) in enumerate(one))
        parts.append(Markup('<path d="{}" class="p-line p-{}"/>').format(trail, line.style))
        if line.style == "held_out" and len(one) <= 80:
            parts += [
                Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.6" class="p-dot"/>').format(x_at(x), y_at(y))
                for x, y in one
            ]
    axis = y_label + (", log scale" if logarithmic else "")
    parts.append(_text(width - right, top - 2, axis, "end", "p-label"))
    parts.append(_text(left + span_x / 2, height - 4, x_label, "middle", "p-label"))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _open(width: int, height: int, title: str) -> Markup:
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, title)


def _grid(left: float, right: float, at: float, text: str) -> Markup:
    line = Markup('<path d="M{:.1f} {:.1f}H{:.1f}" class="p-grid"/>').format(left, at, right)
    return line + _text(left - 6, at + 3.5, text, "end")


def _text(x: float, y: float, text: str, anchor: str, name: str = "p-tick") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(
        x, y, anchor, name, escape(text)
    )
