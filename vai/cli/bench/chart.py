"""Line charts as SVG, written by hand: a few panels beside each other, one colour for each series."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

COLOURS = ("#0b6e4f", "#c8553d", "#8d99ae", "#3d5a80", "#e0a458", "#6d597a")
WIDTH, HEIGHT = 360, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 34, 44
LABELS = 10  # of the x axis at most; where there are more points, they are not marked either


class Panel(NamedTuple):
    """One diagram: its x values stand at equal distances, whatever they are. `log`: y in powers of ten.

    series: name -> (x, y) points; what is not a finite number, or not positive where `log`, is left out.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[int, float]]]
    log: bool = False


def chart(title: str, panels: Sequence[Panel]) -> str:
    """The SVG text."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    width, height = WIDTH * len(panels), HEIGHT + 58
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(12, 20, title, size=13),
    ]
    for index, name in enumerate(names):
        x = 14 + 170 * index
        parts.append(f'<line x1="{x}" y1="36" x2="{x + 18}" y2="36" stroke="{colours[name]}" stroke-width="2"/>')
        parts.append(_text(x + 24, 40, name))
    for index, panel in enumerate(panels):
        parts.append(f'<g transform="translate({WIDTH * index},50)">{_panel(panel, colours)}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def _panel(panel: Panel, colours: Mapping[str, str]) -> str:
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not panel.log)]
        for name, points in panel.series.items()
    }
    xs = sorted({x for points in kept.values() for x, _ in points})
    if not xs:
        return _text(LEFT, TOP, f"{panel.title}: nothing measured")
    low, high, ticks = _scale([y for points in kept.values() for _, y in points], panel.log)

    def across(x: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (xs.index(x) + 0.5) / len(xs)

    def up(y: float) -> float:
        value = math.log10(y) if panel.log else y
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = [_text(LEFT, TOP - 12, panel.title, size=12)]
    for tick in ticks:
        y = up(tick)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 5, y + 4, f"{tick:g}", anchor="end"))
    labelled = xs[:: -(-len(xs) // LABELS)]
    parts += [_text(across(x), HEIGHT - BOTTOM + 16, str(x), anchor="middle") for x in labelled]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, panel.x_label, anchor="middle"))
    parts.append(
        f'<g transform="translate(14,{HEIGHT / 2}) rotate(-90)">{_text(0, 0, panel.y_label, anchor="middle")}</g>'
    )
    for name, points in kept.items():
        places = [(across(x), up(y)) for x, y in sorted(points)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        if len(xs) <= LABELS:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[name]}"/>' for x, y in places]
    return "\n".join(parts)


def _scale(values: Sequence[float], log: bool) -> tuple[float, float, list[float]]:
    """(lowest, highest, marks): the first two as powers of ten where `log`."""
    if log:
        low = math.floor(math.log10(min(values)))
        high = max(low + 1, math.ceil(math.log10(max(values))))
        return low, high, [10.0**power for power in range(low, high + 1)]
    step = 10.0 ** math.floor(math.log10(max(*values, 1e-9)))
    step *= next(factor for factor in (0.2, 0.5, 1, 2) if max(values) / (step * factor) <= 6)
    count = max(1, math.ceil(max(values) / step))
    return 0.0, step * count, [step * index for index in range(count + 1)]
