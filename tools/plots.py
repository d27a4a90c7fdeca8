"""Small SVG plots: points on log-log axes against the diagonal, and histograms. Same in, same out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import ceil, floor, log10

COLOURS = {"dense": "#4477aa", "moe_full": "#228833", "moe_partial": "#b8860b", "moe_efa": "#cc3355"}
_LEFT, _TOP, _SIZE = 64, 16, 420
_FONT = 'font-family="sans-serif" font-size="12" fill="#333"'

Points = Mapping[str, Sequence[tuple[float, float]]]
"""Points (measured, predicted) by group."""


def scatter(points: Points, titles: Mapping[str, str], unit: str, label: Callable[[float], str]) -> str:
    """Predicted against measured, both logarithmic, with the diagonal and a band of ±25 %."""
    every = [value for group in points.values() for point in group for value in point]
    low, high = log10(min(every)) - 0.1, log10(max(every)) + 0.1

    def place(value: float) -> float:
        return (log10(value) - low) / (high - low) * _SIZE

    def at(x: float, y: float) -> str:
        return f"{_LEFT + place(x):.1f},{_TOP + _SIZE - place(y):.1f}"

    first, last = 10**low, 10**high
    band = [(first, 1.25 * first), (last / 1.25, last), (last, last), (last, last / 1.25)]
    band += [(1.25 * first, first), (first, first)]
    corners = " ".join(at(*corner) for corner in band)
    body = [
        f'<polygon points="{corners}" fill="#000" fill-opacity="0.07"/>',
        f'<polyline points="{at(first, first)} {at(last, last)}" stroke="#666" fill="none"/>',
    ]
    steps = (1, 2, 5) if high - low < 2 else (1,)
    for exponent in range(floor(low), ceil(high)):
        body += [
            line
            for step in steps
            if low < log10(step * 10.0**exponent) < high
            for line in _ticks(step * 10.0**exponent, place, label)
        ]
    for name, group in points.items():
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.6"/>' for x, y in (at(*p).split(",") for p in group))
        body.append(f'<g fill="{COLOURS[name]}" fill-opacity="0.65">{dots}</g>')
    body += _legend([(COLOURS[name], f"{titles[name]} ({len(group)})") for name, group in points.items()])
    body += _axes(f"measured, {unit}", f"predicted, {unit}", _SIZE, _SIZE)
    return _document(body, _LEFT + _SIZE + 16, _TOP + _SIZE + 44)


def _ticks(value: float, place: Callable[[float], float], label: Callable[[float], str]) -> list[str]:
    x, y, text = _LEFT + place(value), _TOP + _SIZE - place(value), escape(label(value))
    bottom, right = _TOP + _SIZE, _LEFT + _SIZE
    return [
        f'<path d="M{x:.1f} {_TOP}V{bottom}M{_LEFT} {y:.1f}H{right}" stroke="#ddd"/>',
        f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" {_FONT}>{text}</text>',
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" {_FONT}>{text}</text>',
    ]


def _legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    lines = []
    for index, (colour, text) in enumerate(entries):
        y = _TOP + 18 + 18 * index
        lines.append(f'<circle cx="{_LEFT + 14}" cy="{y - 4}" r="4" fill="{colour}"/>')
        lines.append(f'<text x="{_LEFT + 24}" y="{y}" {_FONT}>{escape(text)}</text>')
    return lines


def _axes(
    across: str, up: str, width: float, height: float, left: float = _LEFT, top: float = _TOP
) -> list[str]:
    middle_x, middle_y = left + width / 2, top + height / 2
    return [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>',
        f'<text x="{middle_x}" y="{top + height + 36}" text-anchor="middle" {_FONT}>{escape(across)}</text>',
        f'<text transform="translate({left - 46} {middle_y}) rotate(-90)" text-anchor="middle" {_FONT}>'
        f"{escape(up)}</text>",
    ]


BIN, MOST = 0.05, 0.6
"""Width of a histogram's bars, and the error beyond which rows count in its last ones."""
_PANEL_WIDTH, _PANEL_HEIGHT, _PANEL_STEP = 400, 110, 158


def histograms(errors: Mapping[str, Sequence[float]], titles: Mapping[str, str]) -> str:
    """Rows by relative error, one panel a group, all over the same range."""
    body: list[str] = []
    for index, (name, values) in enumerate(errors.items()):
        top = _TOP + 12 + index * _PANEL_STEP
        body += _panel(values, f"{titles[name]} ({len(values)})", COLOURS[name], top)
    return _document(body, _LEFT + _PANEL_WIDTH + 24, _TOP + _PANEL_STEP * len(errors))


def _panel(values: Sequence[float], title: str, colour: str, top: float) -> list[str]:
    bins = round(2 * MOST / BIN)
    counts = [0] * bins
    for value in values:
        counts[min(max(floor((value + MOST) / BIN), 0), bins - 1)] += 1
    most, wide = max(counts), _PANEL_WIDTH / bins
    bars = "".join(
        f'<rect x="{_LEFT + k * wide:.1f}" y="{top + _PANEL_HEIGHT * (1 - count / most):.1f}" '
        f'width="{wide - 1:.1f}" height="{_PANEL_HEIGHT * count / most:.1f}"/>'
        for k, count in enumerate(counts)
        if count
    )
    body = [f'<g fill="{colour}" fill-opacity="0.8">{bars}</g>']
    for percent in (-50, -25, 0, 25, 50):
        x = _LEFT + (percent / 100 + MOST) / (2 * MOST) * _PANEL_WIDTH
        body.append(f'<path d="M{x:.1f} {top}v{_PANEL_HEIGHT}" stroke="#ccc"/>')
        text = f"{percent:+d} %" if percent else "0"
        body.append(
            f'<text x="{x:.1f}" y="{top + _PANEL_HEIGHT + 14}" text-anchor="middle" {_FONT}>{text}</text>'
        )
    body.append(f'<text x="{_LEFT}" y="{top - 5}" {_FONT}>{escape(title)}</text>')
    body.append(f'<text x="{_LEFT - 6}" y="{top + 10}" text-anchor="end" {_FONT}>{most}</text>')
    frame = f'x="{_LEFT}" y="{top}" width="{_PANEL_WIDTH}" height="{_PANEL_HEIGHT}"'
    return [*body, f'<rect {frame} fill="none" stroke="#999"/>']


def _document(body: Sequence[str], width: float, height: float) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *body, "</svg>", ""])
