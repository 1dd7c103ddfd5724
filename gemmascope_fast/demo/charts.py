"""Line charts and histograms as inline SVG; colours and fonts come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 40


@dataclass(frozen=True)
class Series:
    """A named curve; `style` is the CSS class that colours it."""

    name: str
    style: str
    x: Sequence[float]
    y: Sequence[float]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover `[low, high]` inside."""
    raw = (high - low) / wanted or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Shortest text of a tick: 0.25, 40, 1.5k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


class _Axes:
    """Maps data to pixels and draws the frame."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = x, y

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        up = min(max(up, 0.0), 1.0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    def frame(self, x_label: str, y_ticks: Sequence[float]) -> str:
        parts = []
        for value in y_ticks:
            _, py = self.at(self.x[0], value)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>'
                f'<text x="{LEFT - 7}" y="{py + 3.5:.1f}" text-anchor="end">{number(value)}</text>'
            )
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
        )
        return "".join(parts)

    def x_ticks(self, marks: Sequence[tuple[float, str]]) -> str:
        base = HEIGHT - BOTTOM
        placed = ((self.at(value, self.y[0])[0], text) for value, text in marks)
        return "".join(
            f'<text x="{px:.1f}" y="{base + 16}" text-anchor="middle">{escape(text)}</text>'
            for px, text in placed
        )


def line_chart(
    title: str, x_label: str, series: Sequence[Series], y_range: tuple[float, float]
) -> str:
    """Curves from x = 0 over `y_range`; values outside it are drawn at its edge."""
    low = 0.0
    high = max(max(s.x) for s in series)
    axes = _Axes((low, high), y_range)
    parts = [axes.frame(x_label, ticks(*y_range))]
    parts.append(axes.x_ticks([(value, number(value)) for value in ticks(low, high)]))
    for s in series:
        points = " ".join(
            "{:.1f},{:.1f}".format(*axes.at(x, y)) for x, y in zip(s.x, s.y, strict=True)
        )
        tip = f"{s.name}: {number(s.y[-1])} at the end"
        parts.append(
            f'<polyline class="curve {s.style}" points="{points}"><title>{escape(tip)}</title>'
            "</polyline>"
        )
    return _figure(title, "".join(parts))


def marked_chart(title: str, x_label: str, points: Series, labels: Sequence[str]) -> str:
    """A few points joined by a line, each with a label; the axes cover them and no more."""
    ranges = []
    for values, margin in ((points.x, 0.2), (points.y, 0.3)):
        low, high = min(values), max(values)
        room = margin * ((high - low) or abs(high) or 1.0)
        ranges.append((max(low - room, 0.0), high + room))
    axes = _Axes(*ranges)
    parts = [axes.frame(x_label, ticks(*ranges[1]))]
    parts.append(axes.x_ticks([(value, number(value)) for value in ticks(*ranges[0])]))
    places = [axes.at(x, y) for x, y in zip(points.x, points.y, strict=True)]
    line = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    parts.append(f'<polyline class="curve {points.style}" points="{line}"/>')
    for (px, py), x, y, label in zip(places, points.x, points.y, labels, strict=True):
        tip = f"{label}: {number(y)} at {number(x)}"
        parts.append(
            f'<circle class="bar {points.style}" cx="{px:.1f}" cy="{py:.1f}" r="4">'
            f"<title>{escape(tip)}</title></circle>"
            f'<text class="label" x="{px:.1f}" y="{py - 10:.1f}" text-anchor="middle">'
            f"{escape(label)}</text>"
        )
    return _figure(title, "".join(parts))


def rate_histogram(title: str, series: Sequence[tuple[str, str, Sequence[int]]], n: int) -> str:
    """Latents by firing rate, on a log axis, a bar for those that never fired at the left.

    Args:
        title: above the chart.
        series: (name, CSS class, firing counts per latent) of up to two dictionaries.
        n: tokens that were counted.
    """
    per_decade = 4
    lowest = math.floor(math.log10(1 / n))
    bins = -lowest * per_decade
    tallies = [_tally(counts, n, lowest, bins, per_decade) for _, _, counts in series]
    peak = max(max(tally) for tally in tallies) or 1
    axes = _Axes((-2.5, bins + 0.8), (0.0, peak * 1.05))
    parts = [axes.frame("share of tokens on which a latent fires", ticks(0, peak, 4))]
    for rank, ((name, style, _), tally) in enumerate(zip(series, tallies, strict=True)):
        for slot, count in enumerate(tally):
            left = -2.3 if slot == 0 else float(slot - 1)
            parts.append(_bar(axes, left, rank, len(series), count, f"{style}", name))
    marks = [(-1.8, "never")]
    marks += [(k * per_decade, _percent(lowest + k)) for k in range(1, -lowest + 1)]
    return _figure(title, "".join(parts) + axes.x_ticks(marks))


def _percent(power: int) -> str:
    return f"{100 * 10.0**power:g} %"


def _tally(counts: Sequence[int], n: int, lowest: int, bins: int, per_decade: int) -> list[int]:
    """Latents that never fired, then latents per bin."""
    tally = [0] * (bins + 1)
    for count in counts:
        if count == 0:
            tally[0] += 1
        else:
            place = math.floor((math.log10(count / n) - lowest) * per_decade)
            tally[1 + min(max(place, 0), bins - 1)] += 1
    return tally


def _bar(axes: _Axes, left: float, rank: int, of: int, count: int, style: str, name: str) -> str:
    width = 0.9 / of
    x0, y0 = axes.at(left + 0.05 + rank * width, 0.0)
    x1, y1 = axes.at(left + 0.05 + (rank + 1) * width, count)
    tip = f"{name}: {count} latents"
    return (
        f'<rect class="bar {style}" x="{x0:.1f}" y="{y1:.1f}" width="{x1 - x0:.1f}" '
        f'height="{y0 - y1:.1f}"><title>{escape(tip)}</title></rect>'
    )


def _figure(title: str, body: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(title)}">{body}</svg></figure>'
    )
