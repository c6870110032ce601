"""What goes into a decision and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.status import FineTuneJobStatus, Phase
from finetune_operator.cluster.port import Object
from finetune_operator.observed import Observed, parse_time, queue_of, timestamp, workload_nodes
from finetune_operator.settings import Settings

MAX_MESSAGE = 4096
"""The schema's bound of status.message."""
TEARDOWN_SECONDS = 10.0
"""How soon to look again while pods are stopping; their events usually come first."""
REFUSED_SECONDS = 30.0
"""How soon to look again while there are no pods: the Job controller's events reach no watch of ours."""
PODS_REFUSED = "PodsRefused"
WAITING = (Phase.STARTING, Phase.RESTARTING)
"""Phases in which pods may run and do not."""


@dataclass(frozen=True)
class Create:
    """Create what is missing of ConfigMap, Service and Indexed Job, for this attempt."""

    attempt: int


@dataclass(frozen=True)
class Suspend:
    """Set the Indexed Job's suspend to true: the cluster stops its pods. No queue resumes it before it is numbered."""


@dataclass(frozen=True)
class Shrink:
    """Set the Indexed Job's suspend to true and the number of its pods to this, in one patch."""

    nodes: int


@dataclass(frozen=True)
class Resume:
    """Number the Indexed Job's next pods with this attempt, have so many, and set suspend to false, in one patch."""

    attempt: int
    nodes: int


@dataclass(frozen=True)
class Number:
    """Number a suspended Job's next pods with this attempt; somebody else resumes it."""

    attempt: int


@dataclass(frozen=True)
class ForgetStart:
    """Remove a suspended Job's start time: before Kubernetes 1.36 the template of a Job that has one is immutable."""


@dataclass(frozen=True)
class Delete:
    """Delete the Indexed Job, so that its controller lets go of the pods that it holds."""


@dataclass(frozen=True)
class CreatePreflight:
    """Create the Job that checks the job, with the ConfigMap that it reads and the NetworkPolicy that bounds it."""


@dataclass(frozen=True)
class DeletePreflight:
    """Delete that Job and its pod."""


@dataclass(frozen=True)
class Free:
    """Take pods of dead nodes out of the way: nobody is left there who could report their end."""

    pods: tuple[Object, ...]


@dataclass(frozen=True)
class Remove:
    """Delete pods of earlier attempts, whose evidence is recorded."""

    pods: tuple[Object, ...]


@dataclass(frozen=True)
class Expire:
    """Delete the FineTuneJob itself; its children go with it."""


WorkloadAction = Suspend | Shrink | ForgetStart | Resume | Number | Delete
Action = Create | WorkloadAction | Free | Remove | Expire | CreatePreflight | DeletePreflight


@dataclass(frozen=True)
class Notice:
    """An event for people, emitted when the status that it belongs to has been written."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True)
class Decision:
    """With an action: do it, then decide anew. Without: write the status, then emit the events."""

    status: FineTuneJobStatus
    action: Action | None = None
    events: tuple[Notice, ...] = ()
    valid: bool = True
    """Whether the job can work, as far as is known; becomes the condition Valid."""
    requeue_after: float | None = None
    """Seconds until the next look, if nothing happens before; None leaves it to watches and resync."""


@dataclass(frozen=True)
class Situation:
    """All that a rule may look at."""

    job: FineTuneJob
    observed: Observed
    now: datetime
    settings: Settings
    status: FineTuneJobStatus
    """The status so far: as it was read, with what the children say about attempts adopted."""

    @property
    def nodes(self) -> int:
        """Pods of the present gang, or of the next one."""
        workload = self.observed.workload
        return self.job.spec.resources.nodes if workload is None else workload_nodes(workload)

    @property
    def queue(self) -> str | None:
        """The queue that says when the pods may run: that of the Job, which may be another one than was asked for."""
        workload = self.observed.workload
        return self.job.spec.scheduling.queue if workload is None else queue_of(workload)

    @property
    def is_queued(self) -> bool:
        """Whether a queue says when the pods may run."""
        return self.queue is not None

    @property
    def time(self) -> str:
        return timestamp(self.now)

    def to(self, phase: Phase | None, reason: str, message: str, **changes: Any) -> FineTuneJobStatus:
        """The status in a phase, with the clock of active time kept; further fields by name."""
        update = {"phase": phase, "reason": reason, "message": clip(message), **self._active(phase)}
        update["waiting_since"] = (self.status.waiting_since or self.time) if phase in WAITING else None
        if phase is not Phase.RUNNING and self.status.progress is not None:
            # What stands still has no speed and no end in sight.
            still = {"eta": None, "eta_seconds": None, "tokens_per_second": None}
            update["progress"] = self.status.progress.model_copy(update=still)
        return self.status.model_copy(update={**update, **changes})

    def _active(self, phase: Phase | None) -> dict[str, Any]:
        since = self.status.active_since
        if phase is Phase.RUNNING:
            return {"active_since": since or self.time}
        if since is None:
            return {}
        passed = max(0, int((self.now - parse_time(since)).total_seconds()))
        return {"active_since": None, "active_seconds": self.status.active_seconds + passed}


def clip(text: str) -> str:
    """Cut to what the schema takes."""
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
