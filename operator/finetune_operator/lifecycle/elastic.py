"""Elastic jobs: fewer pods where not all find room.

A gang has one size from its first rendezvous to its end; another size is another attempt. So pods that have found no
room for long are answered by a smaller Indexed Job, and every restart tries the whole number again.
"""

from __future__ import annotations

from finetune_operator.lifecycle.decision import Decision, Notice, Shrink, Situation
from finetune_operator.lifecycle.text import count, duration
from finetune_operator.observed import current_pods, is_suspended, placed_since, unplaced_since

SHRINKING = "Shrinking"
PATIENCE_SECONDS = 300
"""Unless distributed.minNodesAfterSeconds says otherwise."""


def shrink(situation: Situation) -> Decision | None:
    """Go on with the pods that have room, when the others have had none for long enough."""
    nodes = smaller_gang(situation)
    if nodes is None or _time_left(situation) > 0.0:
        return None
    if situation.status.reason == SHRINKING:
        return Decision(situation.status, Shrink(nodes))
    waited = duration(_patience(situation))
    text = f"Not all of {count(situation.nodes)} found room within {waited}: going on with {nodes}"
    status = situation.to(situation.status.phase, SHRINKING, text)
    return Decision(status, events=(Notice(SHRINKING, text, warning=True),), requeue_after=0.0)


def shrink_due(situation: Situation) -> float | None:
    """Seconds until a smaller gang takes the place of one without room, 0 when it is time; None where none may."""
    return None if smaller_gang(situation) is None else _time_left(situation)


def _time_left(situation: Situation) -> float:
    waiting = [unplaced_since(pod, situation.now) for pod in current_pods(situation.observed)]
    return max(0.0, _patience(situation) - min(age for age in waiting if age is not None))


def smaller_gang(situation: Situation) -> int | None:
    """The most pods that have room and share a step's batches evenly; None where the job cannot go on with them."""
    spec, workload = situation.job.spec, situation.observed.workload
    least, pods = spec.distributed.min_nodes, current_pods(situation.observed)
    if least is None or workload is None or is_suspended(workload) or len(pods) < situation.nodes:
        return None
    if situation.is_queued:
        # A queue gives room as a whole, and takes a Job of another size for another one.
        return None
    placed = sum(placed_since(pod, situation.now) is not None for pod in pods)
    unplaced = sum(unplaced_since(pod, situation.now) is not None for pod in pods)
    if not unplaced or placed + unplaced < len(pods):
        return None
    turns = spec.resources.nodes * spec.hyperparameters.gradient_accumulation_steps
    return next((nodes for nodes in range(placed, least - 1, -1) if turns % nodes == 0), None)


def _patience(situation: Situation) -> int:
    return situation.job.spec.distributed.min_nodes_after_seconds or PATIENCE_SECONDS
