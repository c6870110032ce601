"""What a head answered on held-out rows: which classes it takes for which, and how near its numbers come."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from finetune_trainer.report.svg import scatter

SHADE = "37,99,235"
DARKEST = 0.6
"""Opacity on which black numbers can still be read."""


def predictions(evaluation: dict[str, Any]) -> str:
    """The parts of the page for what evaluation.targets gives as details; empty where a task gives none of them."""
    parts = (
        ("confusion", "Which class is taken for which", _confusion),
        ("mistakes", "The commonest mistakes", _rows),
        ("classes", "Classes", _rows),
        ("points", "Predicted numbers", lambda points: scatter("Each point is a held-out row", points)),
    )
    return "".join(f"<h2>{title}</h2>{drawn(evaluation[name])}" for name, title, drawn in parts if name in evaluation)


def _confusion(confusion: dict[str, Any]) -> str:
    """Rows are true classes; the shade of a cell is its share of the row."""
    labels = [escape(label) for label in confusion["labels"]]
    head = "<tr><th>true \\ predicted<th>" + "<th>".join(labels)
    rows = "".join(
        f"<tr><th>{label}" + "".join(_shaded(count, sum(counts)) for count in counts)
        for label, counts in zip(labels, confusion["counts"], strict=True)
    )
    return f'<div class="wide"><table>{head}{rows}</table></div>'


def _shaded(count: int, total: int) -> str:
    return f'<td style="background:rgba({SHADE},{DARKEST * count / max(total, 1):.2f})">{count}'


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    """A table of records that all have the same fields."""
    if not rows:
        return "<p>None.</p>"
    head = "<tr><th>" + "<th>".join(map(escape, rows[0]))
    return f"<table>{head}" + "".join("<tr><td>" + "<td>".join(map(_cell, row.values())) for row in rows) + "</table>"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))
