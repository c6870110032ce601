"""Predictions as tables of bounded size, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_CLASSES = 100
"""Rows of the table of classes: those that most rows have."""
MAX_MATRIX = 30
"""Classes of a confusion matrix that people can still read; of more, only the commonest mistakes are told."""
MAX_MISTAKES = 30
MAX_POINTS = 500


def classes(labels: Sequence[str], truth: np.ndarray, predicted: np.ndarray) -> list[dict[str, Any]]:
    """Precision, recall, f1 and rows of each class, in the order of the labels.

    Args:
        truth: (rows,) of class numbers, or (rows, classes) of ones and zeros; so is `predicted`.
    """
    from sklearn.metrics import precision_recall_fscore_support

    numbers = list(range(len(labels)))
    columns = precision_recall_fscore_support(truth, predicted, labels=numbers, average=None, zero_division=0)
    shown = sorted(sorted(numbers, key=lambda number: -columns[3][number])[:MAX_CLASSES])
    return [
        {
            "label": labels[number],
            **{
                name: float(column[number])
                for name, column in zip(("precision", "recall", "f1"), columns[:3], strict=True)
            },
            "rows": int(columns[3][number]),
        }
        for number in shown
    ]


def confusion(labels: Sequence[str], truth: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """`confusion` with labels and counts (a row for each true class), or of many classes the commonest `mistakes`."""
    from sklearn.metrics import confusion_matrix

    if len(labels) <= MAX_MATRIX:
        counts = confusion_matrix(truth, predicted, labels=range(len(labels)))
        return {"confusion": {"labels": list(labels), "counts": counts.tolist()}}
    wrong = truth != predicted
    pairs, counts = np.unique(np.stack([truth[wrong], predicted[wrong]], axis=1), axis=0, return_counts=True)
    first = np.argsort(-counts, kind="stable")[:MAX_MISTAKES]
    return {
        "mistakes": [
            {"label": labels[pairs[i][0]], "predicted": labels[pairs[i][1]], "rows": int(counts[i])} for i in first
        ]
    }


def points(truth: np.ndarray, predicted: np.ndarray) -> list[list[float]]:
    """[true, predicted] of rows that lie evenly over the data."""
    stride = -(-len(truth) // MAX_POINTS)
    pairs = np.stack([truth, predicted], axis=1)[::stride]
    return [[float(f"{value:.6g}") for value in pair] for pair in pairs]
