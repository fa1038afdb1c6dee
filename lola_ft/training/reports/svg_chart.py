"""Line charts as SVG text, for a page that needs no other file and is sharp on paper."""

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 8, 34
_COLOURS = ("#00796b", "#d84315", "#3949ab", "#8e24aa", "#6d4c41", "#558b2f", "#c2185b", "#455a64")
_DASHES = ("", "5 3", "2 2")
"""After the colours come dashes, so that lines differ in print, too."""


def line_chart(series: dict[str, Points], y_label: str, x_label: str = "optimiser step") -> str:
    """Return an `<svg>` with a line per series and a legend below it as HTML; "" if there is no point.

    Args:
        series: Points (x, y) in the order of x, by the name that the legend shows.
    """
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    x_ticks = ticks([x for points in series.values() for x, _ in points])
    y_ticks = ticks([y for points in series.values() for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = list[str]()
    for tick in y_ticks:
        left, y = place(x_ticks[0], tick)
        parts.append(f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{left - 5:.1f}" y="{y + 3.5:.1f}" class="right">{shown(tick)}</text>')
    for tick in x_ticks:
        x, bottom = place(tick, y_ticks[0])
        parts.append(f'<text x="{x:.1f}" y="{bottom + 13:.1f}" class="middle">{shown(tick)}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" class="middle">{escape(x_label)}</text>')
    legend = list[str]()
    for number, (name, points) in enumerate(series.items()):
        colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)]
        look = f'stroke="{colour}"' + (f' stroke-dasharray="{dash}"' if dash else "")
        places = [place(*point) for point in thinned(points)]
        if len(places) == 1:
            parts.append(f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{colour}"/>')
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" {look} class="line"/>')
        sample = f'<line x1="0" y1="4" x2="22" y2="4" {look} class="line"/>'
        legend.append(f'<span><svg width="22" height="8" aria-hidden="true">{sample}</svg> {escape(name)}</span>')
    title = escape(f"{y_label}: {', '.join(series)}")
    drawing = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
    return f'<p class="axis">{escape(y_label)}</p>{drawing}<p class="legend">{"".join(legend)}</p>'


def ticks(values: Sequence[float], wanted: int = 4) -> list[float]:
    """Return round numbers from below the smallest to above the largest value, evenly spaced."""
    low, high = min(values), max(values)
    if high - low < 1e-12:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    rough = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [number * step for number in range(first, last + 1)]


def shown(value: float) -> str:
    """Return a tick's label, such as 0.05, 2,000 or 1e-04."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace(".0e", "e")
    return f"{value:,.3f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:,.0f}"


def thinned(points: Points, most: int = 400) -> list[tuple[float, float]]:
    """Return at most about `most` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = list[tuple[float, float]]()
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept
