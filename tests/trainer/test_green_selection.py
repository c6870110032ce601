"""The choice is as good as trying all subsets, and never costs more than the budget."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune_trainer.strategies.green.costs import Costs
from finetune_trainer.strategies.green.selection import BINS, LEAST_BACKWARD, affordable, budget_of, select


def costs_of(passing, own, forward=100.0) -> Costs:
    names = tuple(f"t{k}" for k in range(len(own)))
    return Costs(names, forward, np.array(passing, dtype=float), np.array(own, dtype=float))


def every_subset(count: int):
    return (np.array(bits, dtype=bool) for bits in product([False, True], repeat=count))


def best(costs, importance, budget, always) -> float:
    """By trying all subsets."""
    allowed = (m for m in every_subset(len(costs.names)) if not (always & ~m).any() and costs.backward(m) <= budget)
    return max((float(importance @ m) for m in allowed), default=-np.inf)


@st.composite
def instances(draw, whole_bins: bool):
    """Costs of up to eight tensors, importances of both signs, a budget, and perhaps a tensor that always learns."""
    count = draw(st.integers(1, 8))
    if whole_bins:
        numbers = st.integers(0, 400).map(float)
        budget = float(BINS)
    else:
        numbers = st.floats(0, 1e12, allow_nan=False)
        budget = draw(st.floats(1, 4e12))
    vectors = st.lists(numbers, min_size=count, max_size=count)
    costs = costs_of(draw(vectors), draw(vectors))
    importance = np.array(draw(st.lists(st.floats(-1, 1, width=16), min_size=count, max_size=count)))
    always = np.zeros(count, dtype=bool)
    if draw(st.booleans()):
        always[draw(st.integers(0, count - 1))] = True
    return costs, importance, budget, always


@settings(deadline=None)
@given(instances(whole_bins=True))
def test_it_is_the_best_of_all_subsets_where_costs_are_whole_bins(instance):
    costs, importance, budget, always = instance
    expected = best(costs, importance, budget, always)
    chosen = select(costs, importance, budget, always)
    if np.isfinite(expected) and (expected > 0 or always.any()):
        assert float(importance @ chosen) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(instances(whole_bins=False))
def test_it_never_costs_more_than_the_budget_and_wastes_a_bin_for_each_tensor_at_most(instance):
    costs, importance, budget, always = instance
    chosen = select(costs, importance, budget, always)
    assume(costs.backward(always) <= budget)
    assume(always.any() or importance[affordable(costs, budget, always)].max(initial=0) > 0)
    assert costs.backward(chosen) <= budget * (1 + 1e-12)
    smaller = budget * (1 - (len(costs.names) + 1) / BINS)
    assert float(importance @ chosen) >= best(costs, importance, smaller, always) - 1e-9


@settings(deadline=None)
@given(instances(whole_bins=False))
def test_what_always_learns_is_chosen_whatever_it_costs(instance):
    costs, importance, budget, always = instance
    assert select(costs, importance, budget, always)[always].all()


def test_a_tensor_near_the_input_is_charged_for_all_that_the_gradient_passes():
    costs = costs_of(passing=[1, 10, 100], own=[5, 5, 5])
    assert costs.backward(np.array([True, False, False])) == 1 + 10 + 100 + 5
    assert costs.backward(np.array([False, True, True])) == 10 + 100 + 5 + 5
    assert costs.backward(np.array([False, False, False])) == 0
    assert costs.alone().tolist() == [116, 115, 105]


def test_many_cheap_tensors_beat_a_dear_one():
    costs = costs_of(passing=[0] * 4, own=[100, 30, 30, 30])
    chosen = select(costs, np.array([1.0, 0.5, 0.5, 0.5]), 100.0, np.zeros(4, dtype=bool))
    assert chosen.tolist() == [False, True, True, True]


def test_tensors_that_would_raise_the_loss_are_left_out():
    costs = costs_of(passing=[0] * 3, own=[1] * 3)
    chosen = select(costs, np.array([-1.0, 0.5, 0.0]), 100.0, np.zeros(3, dtype=bool))
    assert chosen.tolist() == [False, True, False]


def test_one_tensor_is_chosen_even_if_rounding_would_forbid_it():
    costs = costs_of(passing=[0, 1 / 3], own=[9, 2 / 3])
    assert select(costs, np.array([1.0, 0.1]), 1.0, np.zeros(2, dtype=bool)).tolist() == [False, True]


def test_the_target_counts_the_forward_pass_too():
    costs = costs_of(passing=[80, 10], own=[80, 30], forward=100.0)
    assert budget_of(costs, 0.5) == pytest.approx(0.5 * 300 - 100)
    # The converted form, rho_bp = rho (1 + T_fp/T_bp) - T_fp/T_bp, as a share of the backward pass.
    assert budget_of(costs, 0.5) / 200 == pytest.approx(0.5 * (1 + 100 / 200) - 100 / 200)


def test_a_target_below_the_forward_pass_leaves_a_twentieth_of_the_backward_pass():
    assert budget_of(costs_of([1, 1], [200, 1], forward=500.0), 0.2) == pytest.approx(LEAST_BACKWARD * 203)


def test_the_budget_pays_for_the_cheapest_tensor_at_least():
    costs = costs_of(passing=[0, 90], own=[5, 5], forward=1000.0)
    assert budget_of(costs, 0.1) == 95
    assert affordable(costs, 95, np.zeros(2, dtype=bool)).tolist() == [True, True]
    assert affordable(costs, 94, np.array([True, False])).tolist() == [True, False]


def test_a_thousand_tensors_are_chosen_from_in_a_moment():
    random = np.random.default_rng(0)
    costs = costs_of(random.random(1000), random.random(1000), forward=500.0)
    importance = random.normal(size=1000)
    budget = budget_of(costs, 0.7)
    chosen = select(costs, importance, budget, np.zeros(1000, dtype=bool))
    assert 0.6 * budget < costs.backward(chosen) <= budget
    assert importance[chosen].min() > 0
