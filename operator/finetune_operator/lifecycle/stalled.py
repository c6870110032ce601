"""Trainers that make no progress and do not end themselves.

The agent in the pod comes first: it knows all ranks, takes their stacks and ends them with a cause of their own. This
is for the case that it is dead or hangs itself, and only for trainers that answer: one that cannot be asked is not
called stalled. Nothing is remembered here; the trainer itself says how long it has stood still, whoever asks.
"""

from __future__ import annotations

from finetune_api.contract import Cause
from finetune_operator.failures import Failure
from finetune_operator.lifecycle.decision import Decision, Situation
from finetune_operator.lifecycle.incidents import open_incident
from finetune_operator.lifecycle.silence import answer
from finetune_operator.lifecycle.text import duration

LEAST_GRACE_SECONDS = 60.0


def end_standstill(situation: Situation) -> Decision | None:
    """Start the pods again whose agent should have ended them long ago."""
    progress, allowed = answer(situation), situation.job.spec.run_policy.stall_timeout_seconds
    if progress is None or progress.heartbeat_age_seconds < allowed + grace(allowed):
        return None
    stood = duration(int(progress.heartbeat_age_seconds))
    text = (
        f"Rank 0 has made no progress for {stood} in stage {progress.stage.value} at step {progress.step} "
        f"(runPolicy.stallTimeoutSeconds is {allowed}), and its pod has not ended by itself"
    )
    advice = "where a step honestly takes so long, raise runPolicy.stallTimeoutSeconds"
    return open_incident(situation, Failure(Cause.STALLED, text, advice))


def grace(allowed: float) -> float:
    """Seconds for the pod's own agent, and for a rank 0 that waits for another one's work."""
    return max(LEAST_GRACE_SECONDS, allowed / 2)
