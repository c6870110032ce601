"""What the evaluations of a run say together: its best step, whether to go on, whether it learns by heart.

Everything follows from the trainer's log, which is part of every checkpoint: a run that was stopped judges as one that
was not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from finetune_api.evaluation import GROWING, EarlyStopping, EvaluationSpec

LOSS = "eval_loss"
RISE = 0.02
"""Share of the best held-out loss by which a later one must lie above it: less is what sampling alone does."""
IN_A_ROW = 2

Log = Iterable[dict[str, float]]
"""Entries of TrainerState.log_history: `step`, and the names of what was logged."""


class Evaluation(NamedTuple):
    """What an evaluation gave after a step."""

    step: int
    value: float


def evaluations(log: Log, metric: str) -> list[Evaluation]:
    """All evaluations that have the metric, by step; of several of the same step the last one."""
    found = {int(entry["step"]): entry[metric] for entry in log if metric in entry}
    return [Evaluation(step, found[step]) for step in sorted(found)]


@dataclass(frozen=True)
class Watch:
    """What steps are judged by.

    Attributes:
        metric: such as eval_loss.
    """

    metric: str = LOSS

    @classmethod
    def of(cls, spec: EvaluationSpec) -> Watch:
        """What the spec stops by, or eval_loss."""
        return cls(spec.early_stopping.metric) if spec.early_stopping else cls()

    def best(self, log: Log) -> Evaluation | None:
        """The best evaluation, the first of equal ones; None while there is none with a finite number."""
        finite = [found for found in evaluations(log, self.metric) if math.isfinite(found.value)]
        return max(finite, key=lambda found: self._goodness(found.value), default=None)

    def without_improvement(self, log: Log, min_delta: float) -> int:
        """How many evaluations there were since the metric last became better by min_delta at least."""
        reference, count = -math.inf, 0
        for _, value in evaluations(log, self.metric):
            gain = self._goodness(value) - reference
            count = 0 if gain > 0 and gain >= min_delta else count + 1
            reference = self._goodness(value) if count == 0 else reference
        return count

    def _goodness(self, value: float) -> float:
        if not math.isfinite(value):
            return -math.inf
        return value if self.metric in {f"eval_{metric.value}" for metric in GROWING} else -value


def why_to_stop(log: Sequence[dict[str, float]], early: EarlyStopping) -> str:
    """Why training should not go on, in words; empty: it should."""
    count = Watch(early.metric).without_improvement(log, early.min_delta)
    if count < early.patience:
        return ""
    times = "the last evaluation" if count == 1 else f"{count} evaluations"
    return f"{early.metric} did not improve in {times}"


def parted(log: Sequence[dict[str, float]]) -> str:
    """How held-out and training loss have parted, in words; empty: they have not.

    They have when the last evaluations in a row all lie above the best one by RISE or more, while the training loss,
    the mean of what was logged between two evaluations, is lower than it was at the best one.
    """
    held_out = evaluations(log, LOSS)
    best = Watch().best(log)
    last = held_out[-IN_A_ROW:]
    if best is None or not all(found.step > best.step and found.value > best.value * (1 + RISE) for found in last):
        return ""
    steps = [0, *(found.step for found in held_out)]
    then, now = (_training_loss(log, *_interval(steps, step)) for step in (best.step, steps[-1]))
    if not now < then:
        return ""
    return (
        f"the held-out loss has risen from {best.value:.4g} at step {best.step} to {last[-1].value:.4g} at step "
        f"{last[-1].step} while the training loss fell from {then:.4g} to {now:.4g}"
    )


def _interval(steps: list[int], end: int) -> tuple[int, int]:
    return steps[steps.index(end) - 1], end


def _training_loss(log: Log, after: int, until: int) -> float:
    """Mean of the losses logged in these steps; NaN where there are none."""
    losses = [entry["loss"] for entry in log if "loss" in entry and after < entry["step"] <= until]
    return sum(losses) / len(losses) if losses else math.nan
