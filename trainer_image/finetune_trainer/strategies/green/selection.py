"""Which tensors learn: the most important ones that a budget of operations can pay for."""

from __future__ import annotations

import numpy as np

from finetune_trainer.strategies.green.costs import Costs, Mask, Vector

BINS = 1000
"""Parts into which the budget is divided, as in the original."""
LEAST_BACKWARD = 0.05
"""Share of Full's backward pass that is granted where the forward pass alone uses up the target, as in the original."""


def budget_of(costs: Costs, target: float) -> float:
    """Operations that the backward pass may take.

    T_fp + T_bp(m) <= target * (T_fp + T_bp(all)), with a floor: something has to learn, whatever forward costs.
    """
    backward = costs.full - costs.forward
    return max(target * costs.full - costs.forward, LEAST_BACKWARD * backward, float(costs.alone().min()))


def affordable(costs: Costs, budget: float, always: Mask) -> Mask:
    """(K,): those that the budget can pay for by themselves, and those that learn anyway."""
    return (costs.alone() <= budget) | always


def select(costs: Costs, importance: Vector, budget: float, always: Mask) -> Mask:
    """The tensors with the greatest sum of importance whose backward pass stays within the budget.

    What the flow of the gradient costs depends on the first chosen tensor alone, so for each candidate k that is a
    knapsack over the tensors behind it, with what is left of the budget. One table serves all: row k of it holds the
    best sum over the tensors from k on, for every number of bins. Costs are rounded up to bins and budgets down, so the
    budget is never exceeded, and at most a bin for each chosen tensor is wasted. O(K * BINS), vectorised over bins.

    Args:
        importance: (K,), of which only positive ones are worth anything.
        always: (K,), tensors that learn in any case; they are paid for first, even if they exceed the budget.

    Returns:
        (K,); never empty where some importance is positive and affordable.
    """
    count, unit = len(costs.names), budget / BINS
    bins = np.ceil(costs.own / unit)
    flow = np.cumsum(costs.passing[::-1])[::-1]
    left = np.floor((budget - flow - costs.own[always].sum()) / unit)
    last_start = int(np.argmax(always)) if always.any() else count
    table, taken = np.zeros(BINS + 1), np.zeros((count, BINS + 1), dtype=bool)
    best, start, rest = 0.0, last_start, int(left[last_start]) if always.any() else 0
    for k in range(count - 1, -1, -1):
        if k == last_start and left[k] >= 0:
            best = table[int(left[k])]
        if always[k] or importance[k] <= 0 or bins[k] > BINS:
            continue
        weight = int(bins[k])
        if k < last_start and left[k] >= weight and (value := importance[k] + table[int(left[k]) - weight]) > best:
            best, start, rest = value, k, int(left[k]) - weight
        table, taken[k] = _with(table, weight, importance[k])
    chosen = always | _walk(taken, bins, start, rest)
    return chosen if chosen.any() else _single(costs, importance, budget)


def _with(table: Vector, weight: int, gain: float) -> tuple[Vector, Mask]:
    """The table's next row, and for which numbers of bins the tensor is in it."""
    taking = np.full_like(table, -np.inf)
    taking[weight:] = table[: len(table) - weight] + gain
    return np.maximum(table, taking), taking > table


def _walk(taken: Mask, bins: Vector, start: int, rest: int) -> Mask:
    """Follow the table from the first chosen tensor to the output."""
    chosen = np.zeros(len(bins), dtype=bool)
    if start < len(bins):
        chosen[start] = True
    for k in range(start + 1, len(bins)):
        if rest >= 0 and taken[k, rest]:
            chosen[k] = True
            rest -= int(bins[k])
    return chosen


def _single(costs: Costs, importance: Vector, budget: float) -> Mask:
    """The most important tensor that fits without being rounded."""
    worth = np.where(costs.alone() <= budget, importance, -np.inf)
    chosen = np.zeros(len(worth), dtype=bool)
    chosen[int(np.argmax(worth))] = True
    return chosen
