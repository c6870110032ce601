"""Bar charts as SVG text, for the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, LABELS, BAR, GAP = 640, 130, 16, 6
COLOURS = ("#2f6f9f", "#d98a2b")


class Bars(NamedTuple):
    """One value for every label."""

    title: str
    values: Mapping[str, float]


def bar_chart(title: str, groups: Sequence[Bars]) -> str:
    """Horizontal bars, all groups of a label beside each other, with a line at 1."""
    labels = list(groups[0].values)
    scale = (WIDTH - LABELS - 60) / max(1.0, *(max(group.values.values()) for group in groups))
    step = len(groups) * BAR + GAP
    height = 62 + len(labels) * step
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for number, group in enumerate(groups):
        x = LABELS + number * 180
        parts.append(f'<rect x="{x}" y="30" width="12" height="12" fill="{COLOURS[number]}"/>')
        parts.append(f'<text x="{x + 18}" y="40">{escape(group.title)}</text>')
    for row, label in enumerate(labels):
        top = 54 + row * step
        middle = top + len(groups) * BAR / 2 + 4
        parts.append(f'<text x="{LABELS - 8}" y="{middle:.0f}" text-anchor="end">{escape(label)}</text>')
        for number, group in enumerate(groups):
            value, y = group.values[label], top + number * BAR
            parts.append(
                f'<rect x="{LABELS}" y="{y}" width="{value * scale:.1f}" height="{BAR - 2}" fill="{COLOURS[number]}"/>'
            )
            parts.append(f'<text x="{LABELS + value * scale + 5:.1f}" y="{y + 11}" font-size="11">{value:.2f}</text>')
    one = LABELS + scale
    parts.append(
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="50" y2="{height - 6}" stroke="#888" stroke-dasharray="3 3"/>'
    )
    return "\n".join([*parts, "</svg>", ""])
