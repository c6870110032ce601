"""Charts as SVG text, so that the page needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, MARGIN = 640, 220, 44
COLORS = ("#2563eb", "#dc2626")
MAX_POINTS = 600

Points = Sequence[tuple[float, float]]


def line_chart(title: str, curves: dict[str, Points]) -> str:
    """One chart of up to two curves over the same axes; empty text when there is nothing to draw."""
    drawn = {name: thinned(points) for name, points in curves.items() if len(points) > 1}
    if not drawn:
        return ""
    points = [point for curve in drawn.values() for point in curve]
    xs, ys = bounds([x for x, _ in points]), bounds([y for _, y in points])
    lines = [
        f'<polyline fill="none" stroke="{color}" stroke-width="1.6" points="{path(curve, xs, ys)}"/>'
        f'<text x="{WIDTH - MARGIN}" y="{16 + 16 * i}" fill="{color}" text-anchor="end">{name}</text>'
        for i, ((name, curve), color) in enumerate(zip(drawn.items(), COLORS, strict=False))
    ]
    return _figure(title, axes(xs, ys) + "".join(lines))


def bar_chart(title: str, series: dict[str, Points]) -> str:
    """Bars of up to two series, side by side over whole numbers; empty text when there is nothing to draw."""
    points = [point for bars in series.values() for point in bars]
    if not points:
        return ""
    # Half a place on both sides, so that the outermost bars lie within the frame.
    xs = (min(x for x, _ in points) - 0.5, max(x for x, _ in points) + 0.5)
    ys = (0.0, max(y for _, y in points) or 1.0)
    width = 0.8 / len(series)
    parts = [
        f'<g fill="{color}">{"".join(bar(x - 0.4 + number * width, y, width, xs, ys) for x, y in bars)}'
        f'<text x="{WIDTH - MARGIN}" y="{16 + 16 * number}" text-anchor="end">{name}</text></g>'
        for number, ((name, bars), color) in enumerate(zip(series.items(), COLORS, strict=False))
    ]
    return _figure(title, axes(xs, ys, (xs[0] + 0.5, xs[1] - 0.5)) + "".join(parts))


def bar(left: float, top: float, width: float, xs: tuple[float, float], ys: tuple[float, float]) -> str:
    """One bar from 0 up."""
    start, end = (_scaled(x, xs, MARGIN, WIDTH - 8) for x in (left, left + width))
    height = _scaled(top, ys, 0, HEIGHT - 32)
    return f'<rect x="{start:.1f}" y="{HEIGHT - 24 - height:.1f}" width="{end - start:.1f}" height="{height:.1f}"/>'


def scatter(title: str, points: Points) -> str:
    """(true, predicted) as dots over equal axes, with the line on which they were equal."""
    both = bounds([value for point in points for value in point])
    ends = path([(value, value) for value in both], both, both)
    dots = "".join(
        f'<circle r="2" cx="{x}" cy="{y}" fill="{COLORS[0]}" fill-opacity="0.5"/>'
        for x, y in (place.split(",") for place in path(points, both, both).split())
    )
    return _figure(
        title,
        f'{axes(both, both)}<polyline stroke="#888" stroke-dasharray="4" points="{ends}"/>{dots}'
        f'<text x="{WIDTH // 2}" y="{HEIGHT - 8}" text-anchor="middle">true</text>'
        f'<text x="{MARGIN + 4}" y="16">predicted</text>',
    )


def _figure(title: str, content: str) -> str:
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f"{content}</svg></figure>"
    )


def thinned(points: Points) -> Points:
    """At most MAX_POINTS of them, the last one included."""
    stride = -(-len(points) // MAX_POINTS)
    return [*points[:-1:stride], points[-1]]


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value, apart from each other."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def path(points: Points, xs: tuple[float, float], ys: tuple[float, float]) -> str:
    """The points in the coordinates of the picture."""
    return " ".join(f"{_scaled(x, xs, MARGIN, WIDTH - 8):.1f},{_scaled(y, ys, HEIGHT - 24, 8):.1f}" for x, y in points)


def axes(xs: tuple[float, float], ys: tuple[float, float], named: tuple[float, float] | None = None) -> str:
    """A frame with the ends of both axes written at it; `named` is written for those of the horizontal one."""
    first, last = named or xs
    return (
        f'<path d="M{MARGIN} 8V{HEIGHT - 24}H{WIDTH - 8}" fill="none" stroke="#888"/>'
        f'<text x="{MARGIN - 4}" y="16" text-anchor="end">{ys[1]:.3g}</text>'
        f'<text x="{MARGIN - 4}" y="{HEIGHT - 26}" text-anchor="end">{ys[0]:.3g}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 8}">{first:g}</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 8}" text-anchor="end">{last:g}</text>'
    )


def _scaled(value: float, source: tuple[float, float], low: float, high: float) -> float:
    return low + (value - source[0]) / (source[1] - source[0]) * (high - low)
