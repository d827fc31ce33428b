"""A plot of lines as SVG. Colours are CSS variables `--series-0` ... of the page it stands in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 170, 34, 44
"""Margins around the lines; the legend is in the right one."""
COLOURS = 8


@dataclass(frozen=True)
class Series:
    """A line."""

    name: str
    points: Sequence[tuple[float, float]]
    """x and y, by ascending x."""


@dataclass(frozen=True)
class Plot:
    """Several lines over one pair of axes."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    """At least one, each with a point."""
    from_zero: bool = True
    """Whether the y axis begins at 0."""


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels."""

    ticks: list[float]
    start: float
    end: float
    """Pixels of the first and of the last tick."""

    def __call__(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, evenly spaced, from `low` or below to `high` or above."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * about >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        last += 1
    return [round(index * step, 12) for index in range(first, last + 1)]


def svg(plot: Plot) -> str:
    """The plot as an element of an HTML page."""
    xs = [x for series in plot.series for x, _ in series.points]
    ys = [y for series in plot.series for _, y in series.points]
    x_axis = _Axis(ticks(min(xs), max(xs), 8), LEFT, WIDTH - RIGHT)
    y_axis = _Axis(ticks(min([0.0, *ys]) if plot.from_zero else min(ys), max(ys)), HEIGHT - BOTTOM, TOP)
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(plot.title)}">',
        _text(LEFT, TOP - 16, plot.title, "title"),
        *_grid(x_axis, y_axis),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, plot.x_label, "middle"),
        f'<g transform="rotate(-90 14 {middle})">{_text(14, middle, plot.y_label, "middle")}</g>',
    ]
    for index, series in enumerate(plot.series):
        parts += _line(index, series, x_axis, y_axis)
    return "\n".join([*parts, "</svg>"])


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    lines = []
    for value in y_axis.ticks:
        y = y_axis(value)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(_text(LEFT - 8, y + 4, f"{value:g}", "end"))
    for value in x_axis.ticks:
        lines.append(_text(x_axis(value), HEIGHT - BOTTOM + 18, f"{value:g}", "middle"))
    return lines


def _line(index: int, series: Series, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    """The line, its points (each with a tooltip), and its entry in the legend."""
    colour = f"var(--series-{index % COLOURS})"
    places = [(x_axis(x), y_axis(y)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.5" fill="{colour}">'
        f"<title>{escape(series.name)}: {x:g}, {y:.5g}</title></circle>"
        for (px, py), (x, y) in zip(places, series.points, strict=True)
    ]
    key = TOP + 10 + 20 * index
    left = WIDTH - RIGHT + 16
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
        *dots,
        f'<line x1="{left}" x2="{left + 18}" y1="{key}" y2="{key}" stroke="{colour}" stroke-width="3"/>',
        _text(left + 24, key + 4, series.name, "start"),
    ]


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
