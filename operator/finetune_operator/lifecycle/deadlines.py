"""Limits of time. All they count stands in status: no restart begins them anew, be it of the job or of the operator."""

from __future__ import annotations

from finetune_api.contract import Cause
from finetune_api.status import FineTuneJobStatus
from finetune_operator.failures import Failure, obstacle
from finetune_operator.lifecycle.decision import Decision, Expire, Situation
from finetune_operator.lifecycle.incidents import open_incident
from finetune_operator.lifecycle.text import duration
from finetune_operator.observed import current_pods, parse_time


def past_deadline(situation: Situation) -> Decision | None:
    """End a job whose time is over."""
    policy = situation.job.spec.run_policy
    if _over(policy.active_deadline_seconds, active_seconds(situation, situation.status)):
        return open_incident(situation, _too_long(policy.active_deadline_seconds or 0))
    if _over(policy.start_deadline_seconds, waited_seconds(situation, situation.status)):
        return open_incident(situation, _too_late(situation, policy.start_deadline_seconds or 0))
    return None


def expire(situation: Situation) -> Decision | None:
    """Delete a job that ended long enough ago; however long the operator was away, it is deleted once."""
    left = time_to_live(situation)
    return Decision(situation.status, Expire()) if left is not None and left <= 0 else None


def time_to_live(situation: Situation) -> float | None:
    """Seconds until a job that has ended is to be deleted; None: never."""
    ttl, ended = situation.job.spec.run_policy.ttl_seconds_after_finished, situation.status.completion_time
    if ttl is None or ended is None:
        return None
    return ttl - (situation.now - parse_time(ended)).total_seconds()


def next_limit(situation: Situation, status: FineTuneJobStatus) -> float | None:
    """Seconds until a limit of the job in this status is reached; None where none is still to come.

    One that has passed is no reason to look again: whatever has kept it from being heeded has its own time.
    """
    policy = situation.job.spec.run_policy
    limits = [
        (policy.active_deadline_seconds, active_seconds(situation, status), status.active_since),
        (policy.start_deadline_seconds, waited_seconds(situation, status), status.waiting_since),
    ]
    left = [limit - passed for limit, passed, since in limits if limit is not None and since is not None]
    return min((seconds for seconds in left if seconds > 0), default=None)


def active_seconds(situation: Situation, status: FineTuneJobStatus) -> float:
    """Time of running so far, over all attempts."""
    return status.active_seconds + _since(situation, status.active_since)


def waited_seconds(situation: Situation, status: FineTuneJobStatus) -> float:
    """Time for which the pods have not all run by now, though they may; 0 where they do, or may not."""
    return _since(situation, status.waiting_since)


def _since(situation: Situation, moment: str | None) -> float:
    return max(0.0, (situation.now - parse_time(moment)).total_seconds()) if moment else 0.0


def _over(limit: int | None, passed: float) -> bool:
    return limit is not None and passed >= limit


def _too_long(limit: int) -> Failure:
    text = f"It ran for {duration(limit)} (runPolicy.activeDeadlineSeconds) and did not come to its end"
    return Failure(Cause.DEADLINE, text, "raise runPolicy.activeDeadlineSeconds in time, which a running job heeds")


def _too_late(situation: Situation, limit: int) -> Failure:
    """With what holds the pods up: whoever reads this after a night has no pods left to look at."""
    held_up = obstacle(current_pods(situation.observed))
    why = held_up.message if held_up else situation.observed.refusal or situation.status.message or ""
    text = f"Its pods did not all run within {duration(limit)} (runPolicy.startDeadlineSeconds): {why}"
    return Failure(Cause.DEADLINE, text, "see to what holds the pods up, or raise runPolicy.startDeadlineSeconds")
