"""Line charts as SVG text, so that the page needs nothing but itself."""

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
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f"{axes(xs, ys)}{''.join(lines)}</svg></figure>"
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


def axes(xs: tuple[float, float], ys: tuple[float, float]) -> str:
    """A frame with the ends of both axes written at it."""
    return (
        f'<path d="M{MARGIN} 8V{HEIGHT - 24}H{WIDTH - 8}" fill="none" stroke="#888"/>'
        f'<text x="{MARGIN - 4}" y="16" text-anchor="end">{ys[1]:.3g}</text>'
        f'<text x="{MARGIN - 4}" y="{HEIGHT - 26}" text-anchor="end">{ys[0]:.3g}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 8}">{xs[0]:g}</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 8}" text-anchor="end">{xs[1]:g}</text>'
    )


def _scaled(value: float, source: tuple[float, float], low: float, high: float) -> float:
    return low + (value - source[0]) / (source[1] - source[0]) * (high - low)
