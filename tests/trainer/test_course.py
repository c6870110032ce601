"""What evaluations say together: the best step, patience, and whether held-out and training loss have parted."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.evaluation import GROWING, WATCHED, EarlyStopping
from finetune_trainer.evaluation.course import Watch, evaluations, parted, why_to_stop


def log(*values: float, metric: str = "eval_loss") -> list[dict[str, float]]:
    """Evaluations after steps 10, 20, ..."""
    return [{"step": 10 * number, metric: value} for number, value in enumerate(values, start=1)]


def trained(pairs: list[tuple[float, float]]) -> list[dict[str, float]]:
    """(training loss, held-out loss) of every ten steps, the training loss logged twice."""
    entries: list[dict[str, float]] = []
    for number, (loss, held_out) in enumerate(pairs, start=1):
        step = 10 * number
        entries += [{"step": step - 5, "loss": loss + 0.1}, {"step": step, "loss": loss - 0.1}]
        entries.append({"step": step, "eval_loss": held_out})
    return entries


def test_the_lowest_loss_is_the_best_and_of_equal_ones_the_first():
    assert Watch().best(log(3, 2, 4, 2)) == (20, 2)
    assert Watch().best([{"step": 5, "loss": 1.0}]) is None


@pytest.mark.parametrize("metric", WATCHED)
def test_every_metric_has_its_direction(metric):
    grows = metric in ("eval_accuracy", "eval_precision", "eval_recall", "eval_f1", "eval_r2")
    assert grows == (metric in {f"eval_{growing.value}" for growing in GROWING})
    assert Watch(metric).best(log(0.5, 0.25, 0.75, metric=metric)).step == (30 if grows else 20)


def test_what_is_not_finite_is_never_the_best():
    assert Watch().best(log(math.nan, math.inf)) is None
    assert Watch().best(log(math.nan, 2, -math.inf)) == (20, 2)
    assert Watch("eval_r2").best(log(math.inf, 0.5, metric="eval_r2")) == (20, 0.5)


def test_an_evaluation_that_was_repeated_counts_once():
    assert evaluations([*log(3, 2), {"step": 20, "eval_loss": 2.0}], "eval_loss") == [(10, 3), (20, 2)]


COUNTS = {
    "none yet": ((), 0.0, 0),
    "better every time": ((3, 2, 1), 0.0, 0),
    "once worse": ((3, 2, 2.5), 0.0, 1),
    "equal is no improvement": ((2, 2, 2), 0.0, 2),
    "better again": ((3, 4, 2.9), 0.0, 0),
    "better, but by too little": ((3, 2.9, 2.8), 0.5, 2),
    "small steps add up": ((3, 2.75, 2.5), 0.5, 0),
    "exactly enough": ((3, 2.5), 0.5, 0),
    "not a number is no improvement": ((3, math.nan, math.nan), 0.0, 2),
    "a number after none is one": ((math.nan, 3), 0.0, 0),
}


@pytest.mark.parametrize("case", COUNTS)
def test_evaluations_without_improvement_are_counted(case):
    values, min_delta, expected = COUNTS[case]
    assert Watch().without_improvement(log(*values), min_delta) == expected
    grown = log(*(-value for value in values), metric="eval_r2")
    assert Watch("eval_r2").without_improvement(grown, min_delta) == expected


def test_training_stops_when_patience_is_over_and_says_why():
    early = EarlyStopping(patience=2)
    assert why_to_stop(log(3, 2, 2.5), early) == ""
    assert why_to_stop(log(3, 2, 2.5, 2.4), early) == "eval_loss did not improve in 2 evaluations"


@given(st.lists(st.floats(-10, 10), max_size=12), st.integers(1, 5))
def test_patience_is_over_at_the_same_evaluation_however_often_it_is_asked(values, patience):
    early = EarlyStopping(patience=patience)
    ended = [count for count in range(len(values) + 1) if why_to_stop(log(*values[:count]), early)]
    best = Watch().best(log(*values))
    if ended and best is not None:
        # Nothing better came in the evaluations that used patience up.
        first = ended[0]
        assert min(values[first - patience : first]) >= min(values[: first - patience])


def test_losses_that_part_are_told_with_their_numbers():
    text = parted(trained([(3, 3), (2, 2), (1.5, 2.1), (1.2, 2.2)]))
    assert text == (
        "the held-out loss has risen from 2 at step 20 to 2.2 at step 40 while the training loss fell from 2 to 1.2"
    )


TOGETHER = {
    "both fall": [(3, 3), (2, 2), (1, 1)],
    "risen only once": [(3, 3), (2, 2), (1, 2.5)],
    "risen by less than sampling does": [(3, 3), (2, 2), (1.5, 2.02), (1, 2.03)],
    "risen and come back": [(3, 3), (2, 2), (1.5, 2.5), (1, 2.01)],
    "both rise: it diverges, which is another matter": [(3, 3), (2, 2), (2.5, 2.5), (3, 3)],
    "nothing was evaluated": [],
}


@pytest.mark.parametrize("case", TOGETHER)
def test_losses_that_go_together_are_not_told(case):
    assert parted(trained(TOGETHER[case])) == ""


def test_without_training_losses_between_evaluations_nothing_is_said():
    assert parted(log(3, 2, 2.5, 2.6)) == ""
