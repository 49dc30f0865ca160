"""Charts as plain SVG text: no library, no script, colours from the page's CSS, readable at 320 pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 230  # small on purpose: a chart that is scaled down on a phone keeps legible text
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 12, 36
MAX_POINTS = 400  # a curve has no more pixels than this


@dataclass(frozen=True)
class Series:
    """A curve: points in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its interval; `strong` marks the one to look at."""

    label: str
    mean: float
    low: float
    high: float
    strong: bool = False


def line_chart(series: Sequence[Series], *, title: str, x_label: str, from_zero: bool = False) -> str:
    """Curves over a common x. Points that are not finite break nothing: they are left out."""
    curves = [_thin([(x, y) for x, y in s.points if math.isfinite(x) and math.isfinite(y)]) for s in series]
    points = [point for curve in curves for point in curve]
    if not points:
        return ""
    x_ticks = ticks(min(p[0] for p in points), max(p[0] for p in points), count=4)
    lowest = min(p[1] for p in points)
    y_ticks = ticks(min(lowest, 0.0) if from_zero else lowest, max(p[1] for p in points), count=4)
    x_of = _Scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    y_of = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    body = _grid(y_ticks, y_of) + _x_axis(x_ticks, x_of, x_label)
    for index, (one, curve) in enumerate(zip(series, curves, strict=True)):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in curve)
        name = f"<title>{escape(one.name)}</title>"
        body += f'<polyline class="line s{index % 6}" points="{path}">{name}</polyline>'
        if len(curve) <= 40:
            body += "".join(
                f'<circle class="dot s{index % 6}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.5">'
                f"<title>{escape(one.name)} at {number(x)}: {number(y)}</title></circle>"
                for x, y in curve
            )
    return _figure(body, title, [s.name for s in series] if len(series) > 1 else [])


def bar_chart(labels: Sequence[str], values: Sequence[float], *, title: str, x_label: str) -> str:
    """Upright bars from zero."""
    return grouped_bar_chart(labels, {"": values}, title=title, x_label=x_label)


def grouped_bar_chart(
    labels: Sequence[str], groups: Mapping[str, Sequence[float]], *, title: str, x_label: str
) -> str:
    """Upright bars from zero, one of each group side by side at every label."""
    if not labels:
        return ""
    y_ticks = ticks(0.0, max(0.0, *(value for values in groups.values() for value in values)), count=4)
    y_of = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / len(labels)
    bar = step * 0.76 / len(groups)
    every = math.ceil(len(labels) / 12)  # labels that would overlap are left out
    body = _grid(y_ticks, y_of)
    for index, label in enumerate(labels):
        x = LEFT + index * step
        for place, (name, values) in enumerate(groups.items()):
            top = y_of(values[index])
            told = f"{label}, {name}" if name else label
            body += (
                f'<rect class="bar s{place % 6}" x="{x + step * 0.12 + place * bar:.1f}" y="{top:.1f}" '
                f'width="{bar:.1f}" height="{max(0.0, y_of(0.0) - top):.1f}">'
                f"<title>{escape(told)}: {number(values[index])}</title></rect>"
            )
        if index % every == 0:
            body += (
                f'<text class="tick" x="{x + step / 2:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">'
            )
            body += f"{escape(label)}</text>"
    return _figure(body + _axis_name(x_label), title, list(groups) if len(groups) > 1 else [])


def interval_chart(rows: Sequence[Interval], *, title: str, x_label: str) -> str:
    """One line per row: a dot for the mean, a whisker for the interval, the label above."""
    if not rows:
        return ""
    height = TOP + 34 * len(rows) + BOTTOM
    x_ticks = ticks(min(0.0, *(r.low for r in rows)), max(r.high for r in rows), count=4)
    x_of = _Scale(x_ticks[0], x_ticks[-1], 12, WIDTH - 24)
    base = height - BOTTOM
    body = "".join(
        f'<line class="grid" x1="{x_of(t):.1f}" x2="{x_of(t):.1f}" y1="{TOP}" y2="{base}"/>'
        f'<text class="tick" x="{x_of(t):.1f}" y="{base + 14}" text-anchor="middle">{number(t)}</text>'
        for t in x_ticks
    )
    for index, row in enumerate(rows):
        y, kind = TOP + 34 * index + 24, "strong" if row.strong else "plain"
        text = f"{row.label} {row.mean:.4f} ({row.low:.4f}–{row.high:.4f})"
        body += (
            f'<text class="name {kind}" x="12" y="{y - 9}">{escape(text)}</text>'
            f'<line class="whisker {kind}" x1="{x_of(row.low):.1f}" x2="{x_of(row.high):.1f}" '
            f'y1="{y}" y2="{y}"/><circle class="mean {kind}" cx="{x_of(row.mean):.1f}" cy="{y}" r="4.5">'
            f"<title>{escape(text)}</title></circle>"
        )
    return _figure(body + _axis_name(x_label, height), title, [], height)


def ticks(low: float, high: float, *, count: int) -> list[float]:
    """Round numbers that enclose [low, high], about `count` steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - (pad if low else 0.0), high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number as a person writes it: 4 significant digits, thousands as k and M."""
    if not math.isfinite(value):
        return "–"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[letter]:.4g}{letter}"
    return f"{value:.4g}"


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of consecutive groups, so that a long curve stays small and its shape true."""
    group = math.ceil(len(points) / MAX_POINTS)
    if group <= 1:
        return points
    parts = [points[start : start + group] for start in range(0, len(points), group)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


class _Scale:
    """Linear map of [low, high] onto pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.start = low, start
        self.factor = (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.factor


def _grid(y_ticks: Sequence[float], y_of: _Scale) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(t):.1f}" y2="{y_of(t):.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y_of(t) + 4:.1f}" text-anchor="end">{number(t)}</text>'
        for t in y_ticks
    )


def _x_axis(x_ticks: Sequence[float], x_of: _Scale, label: str) -> str:
    marks = "".join(
        f'<text class="tick" x="{x_of(t):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">'
        f"{number(t)}</text>"
        for t in x_ticks
    )
    return marks + _axis_name(label)


def _axis_name(label: str, height: int = HEIGHT) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return f'<text class="axis" x="{middle:.0f}" y="{height - 5}" text-anchor="middle">{escape(label)}</text>'


def _figure(body: str, title: str, legend: Sequence[str], height: int = HEIGHT) -> str:
    keys = "".join(f'<span class="key s{i % 6}">{escape(name)}</span>' for i, name in enumerate(legend))
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg>'
        + (f'<div class="legend">{keys}</div>' if keys else "")
        + "</figure>"
    )
