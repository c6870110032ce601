"""What a reconcile sees of a job's children, and plain questions about pods. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_api.contract import ANNOTATION_ATTEMPT, ANNOTATION_NODES, LABEL_QUEUE, TRAINER_CONTAINER, Progress
from finetune_operator.cluster.port import TRACKING, Object
from finetune_operator.references import Named

INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
ENDED = ("Succeeded", "Failed")
SETTLE_SECONDS = 5.0
"""How long news of a pod usually takes to be complete."""
STUCK_SECONDS = 30.0
"""How long a pod with a node may take to start before its events are asked why; images need none."""
LOST_SECONDS = 30.0
"""How long after its grace period a pod may still be there; then its node is taken for dead."""

PODS_SECONDS = 3.0
"""That the Job controller gets to create pods, before the events are asked why there are none."""
NAMESPACE_ENDS = "because it is being terminated"
"""How the API server words the refusal of anything new in a namespace that is being deleted."""


@dataclass(frozen=True)
class Trouble:
    """What a kubelet complains of in an event: volumes, networks."""

    reason: str
    message: str


@dataclass(frozen=True)
class Observed:
    """A job's children as the API server had them at the start of a pass, or as an action of the pass left them."""

    workload: Object | None = None
    """The Indexed Job under the child's name, if this FineTuneJob controls it."""
    pods: tuple[Object, ...] = ()
    """All pods with the job's label, those of earlier attempts and of a deleted namesake included."""
    preflight: Object | None = None
    """The Job that checks the job before it starts, while that matters and if this FineTuneJob controls it."""
    preflight_pods: tuple[Object, ...] = ()
    progress: Progress | None = None
    """Newest answer of the trainer, if there is one."""
    silence: float = 0.0
    """Seconds for which it has left all that it was asked unanswered."""
    refusal: str | None = None
    """Why the Job controller may not create the pods that lack (quota, admission), if it said so."""
    trouble: Trouble | None = None
    """Why a pod does not start although it has a node, if an event says so."""
    eviction: str | None = None
    """Why the queue has taken the Job back, if it did and said so."""
    named: Mapping[str, Named | None] = field(default_factory=dict)
    """Jobs that must have succeeded before this one can start, and those that they wait for; None: there is none."""


def uid(obj: Mapping[str, Any]) -> str:
    return str(obj["metadata"].get("uid", ""))


def name(obj: Mapping[str, Any]) -> str:
    return str(obj["metadata"]["name"])


def controller_uid(obj: Mapping[str, Any]) -> str:
    """UID of the owner that controls the object; empty when nothing does."""
    owners = obj["metadata"].get("ownerReferences") or []
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), "")


def attempt_of(metadata: Mapping[str, Any]) -> int:
    """Attempt number in a pod's (or pod template's) annotations; 0 when it has none or someone wrote nonsense."""
    text = str((metadata.get("annotations") or {}).get(ANNOTATION_ATTEMPT, ""))
    return int(text) if text.isdecimal() else 0


def workload_attempt(workload: Object) -> int:
    """The attempt that the Job's next pods belong to."""
    return attempt_of(workload["spec"]["template"].get("metadata") or {})


def workload_nodes(workload: Object) -> int:
    """Pods of the Job's gang: fewer than the job asks for where it is elastic and found no room for all."""
    return int(workload["spec"]["completions"])


def told_nodes(workload: Object) -> int | None:
    """What an elastic Job's pods are told of their number; it lags behind for one that was made smaller and sleeps."""
    told = (workload["spec"]["template"]["metadata"].get("annotations") or {}).get(ANNOTATION_NODES)
    return None if told is None else int(told)


def was_made_smaller(workload: Object) -> bool:
    """Whether it sleeps, to be woken with fewer pods."""
    return told_nodes(workload) not in (None, workload_nodes(workload))


def queue_of(workload: Object) -> str | None:
    """The queue that says when a Job's pods may run. Where a namespace has a LocalQueue called default, Kueue puts each
    Job without a queue into that."""
    queue: str | None = workload["metadata"].get("labels", {}).get(LABEL_QUEUE)
    return queue


def is_suspended(workload: Object) -> bool:
    return bool(workload["spec"].get("suspend"))


def condition(obj: Mapping[str, Any], kind: str, status: str = "True") -> Mapping[str, Any] | None:
    """The condition of this type, if it has this status."""
    conditions = (obj.get("status") or {}).get("conditions") or []
    return next((item for item in conditions if item.get("type") == kind and item.get("status") == status), None)


def completed(workload: Object) -> bool:
    return condition(workload, "Complete") is not None


def failed(workload: Object) -> Mapping[str, Any] | None:
    """Why the Job gave up for good. FailureTarget comes before Failed, while pods are still being stopped."""
    return condition(workload, "Failed") or condition(workload, "FailureTarget")


def finished(workload: Object) -> bool:
    return completed(workload) or failed(workload) is not None


def phase(pod: Object) -> str:
    return str((pod.get("status") or {}).get("phase", "Pending"))


def is_live(pod: Object) -> bool:
    """Whether a process of the pod may still run; a pod that is being deleted lives until it has ended."""
    return phase(pod) not in ENDED


def is_deleting(pod: Object) -> bool:
    return pod["metadata"].get("deletionTimestamp") is not None


def index(pod: Object) -> int:
    """Completion index, which is the node rank; -1 for a pod that has none."""
    text = str((pod["metadata"].get("annotations") or {}).get(INDEX_ANNOTATION, ""))
    return int(text) if text.isdecimal() else -1


def trainer_status(pod: Object) -> Mapping[str, Any]:
    """What the kubelet says of the trainer container; empty while it says nothing."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    return next((item for item in statuses if item.get("name") == TRAINER_CONTAINER), {})


def trainer_state(pod: Object, state: str) -> Mapping[str, Any] | None:
    """The trainer container's `waiting`, `running` or `terminated` state."""
    found: Mapping[str, Any] | None = (trainer_status(pod).get("state") or {}).get(state)
    return found


def is_running(pod: Object) -> bool:
    return trainer_state(pod, "running") is not None and not is_deleting(pod)


def is_done(pod: Object) -> bool:
    """Whether the trainer ended well; the pod's phase says so only seconds later."""
    terminated = trainer_state(pod, "terminated")
    return phase(pod) == "Succeeded" or (terminated is not None and terminated.get("exitCode") == 0)


def waiting_states(pod: Object) -> Iterator[Mapping[str, Any]]:
    """Why containers wait, those of injected init containers and sidecars included: they hold the trainer up."""
    status = pod.get("status") or {}
    for item in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (item.get("state") or {}).get("waiting")
        if waiting:
            yield {"container": item.get("name", ""), **waiting}


def is_settled(pod: Object, now: datetime) -> bool:
    """Whether a pod whose trainer has ended is known in full: the kubelet sets phase and conditions a moment later, and
    a pod that is stopped before that is removed with its log. An injected sidecar may keep the phase for ever, so there
    is an end to waiting."""
    ended_at = (trainer_state(pod, "terminated") or {}).get("finishedAt")
    if not is_live(pod) or is_deleting(pod) or ended_at is None:
        return True
    return (now - parse_time(ended_at)).total_seconds() >= SETTLE_SECONDS


def placed_since(pod: Object, now: datetime) -> float | None:
    """Seconds since the pod was given a node; None while it has none."""
    scheduled = condition(pod, "PodScheduled")
    if scheduled is None:
        return None
    since = scheduled.get("lastTransitionTime")
    return (now - parse_time(since)).total_seconds() if since else SETTLE_SECONDS


def unplaced_since(pod: Object, now: datetime) -> float | None:
    """Seconds since the scheduler first said that no node has room for the pod; None while it has not."""
    refused = condition(pod, "PodScheduled", "False")
    if refused is None or refused.get("reason") != "Unschedulable":
        return None
    since = refused.get("lastTransitionTime") or pod["metadata"].get("creationTimestamp")
    return (now - parse_time(since)).total_seconds() if since else 0.0


def held_pods(observed: Observed) -> tuple[Object, ...]:
    """Pods that ended and were deleted, and yet stay: the Job controller holds an index's last failed pod by a
    finalizer until it has replaced it, which a suspended Job never does."""
    mine = own_pods(observed)
    return tuple(pod for pod in mine if not is_live(pod) and is_deleting(pod) and pod["metadata"].get("finalizers"))


def held_for(observed: Observed, now: datetime) -> float:
    """Seconds for which the longest of them has been held; 0 without any."""
    ends = [parse_time(pod["metadata"]["deletionTimestamp"]) for pod in held_pods(observed)]
    return max((now - min(ends)).total_seconds(), 0.0) if ends else 0.0


def without_pods(observed: Observed) -> Object | None:
    """The Job that should have pods and has none: the one that checks the job, or its own."""
    families = ((observed.preflight, observed.preflight_pods), (observed.workload, current_pods(observed)))
    for child, pods in families:
        if child is not None and not pods and not is_suspended(child) and not finished(child):
            return child
    return None


def pods_overdue_in(observed: Observed, now: datetime) -> float | None:
    """Seconds until pods that a Job should have and has not are overdue, 0 when they are; None when none lack.

    Before that, looking for a reason among the events would be in vain, and it is dear: an API server reads all events
    of a namespace to find those of one object. A Job without a start time is one that the Job controller has not come
    to yet, as happens for minutes where thousands are made at once; when it does, it says so in the Job's status.
    """
    child = without_pods(observed)
    started = ((child or {}).get("status") or {}).get("startTime")
    if not started:
        return None
    return max(0.0, PODS_SECONDS - (now - parse_time(str(started))).total_seconds())


def refusal_in(events: Sequence[Object]) -> str | None:
    """Why the last pod was not created, in the events of a Job, oldest first; None if the last one was."""
    tries = [event for event in events if event.get("reason") in ("FailedCreate", "SuccessfulCreate", "Resumed")]
    refused = bool(tries) and tries[-1]["reason"] == "FailedCreate"
    return str(tries[-1].get("message") or "") if refused else None


def stuck_pod(observed: Observed, now: datetime) -> Object | None:
    """A pod that has had a node for a while and still has no container."""
    pods = (pod for pod in current_pods(observed) if phase(pod) == "Pending" and not is_deleting(pod))
    return next((pod for pod in pods if (placed_since(pod, now) or 0.0) >= STUCK_SECONDS), None)


def starts_late_in(observed: Observed, now: datetime) -> float | None:
    """Seconds until a pod that has a node and does not run yet has had one for so long that it matters; None when no
    pod has one, whose next news comes by itself."""
    pods = (pod for pod in current_pods(observed) if not is_running(pod) and not is_done(pod))
    ages = [age for pod in pods if (age := placed_since(pod, now)) is not None]
    steps = (SETTLE_SECONDS, STUCK_SECONDS)
    return min((step - age for age in ages for step in steps if step > age), default=STUCK_SECONDS if ages else None)


def trouble_in(events: Sequence[Object]) -> Trouble | None:
    """A complaint that is the last word in the events of a pod, oldest first; what came after it has mended it."""
    if not events or events[-1].get("type") != "Warning":
        return None
    return Trouble(str(events[-1].get("reason") or "Unknown"), str(events[-1].get("message") or ""))


def eviction_in(events: Sequence[Object]) -> str | None:
    """Why Kueue has stopped a Job, in its events, oldest first."""
    stops = [str(event.get("message") or "") for event in events if event.get("reason") == "Stopped"]
    return stops[-1] if stops else None


def current_pods(observed: Observed) -> tuple[Object, ...]:
    """Pods of the Job's present attempt, lowest index first: only they speak for it."""
    if observed.workload is None:
        return ()
    owner, attempt = uid(observed.workload), workload_attempt(observed.workload)
    mine = (p for p in observed.pods if controller_uid(p) == owner and attempt_of(p["metadata"]) == attempt)
    return tuple(sorted(mine, key=lambda pod: (index(pod), name(pod))))


def own_pods(observed: Observed) -> tuple[Object, ...]:
    """Pods of the Job, of whatever attempt."""
    owner = uid(observed.workload) if observed.workload else ""
    return tuple(pod for pod in observed.pods if controller_uid(pod) == owner)


def live_pods(observed: Observed) -> tuple[Object, ...]:
    """Every pod under the job's label that may still run, of whatever attempt: they share names and buckets."""
    return tuple(pod for pod in observed.pods if is_live(pod))


def rank_zero(observed: Observed) -> Object | None:
    """The running pod that serves the progress."""
    return next((pod for pod in current_pods(observed) if index(pod) == 0 and is_running(pod)), None)


def is_at_rest(workload: Object) -> bool:
    """Whether the Job controller has seen the suspension: until then it may still create pods."""
    return condition(workload, "Suspended") is not None and not (workload.get("status") or {}).get("active")


def rests_for(workload: Object, now: datetime) -> float:
    """Seconds since the Job controller has seen the suspension; 0 where it has not."""
    since = (condition(workload, "Suspended") or {}).get("lastTransitionTime")
    return (now - parse_time(since)).total_seconds() if since else 0.0


def torn_down(observed: Observed) -> bool:
    """Whether nothing of the job is alive, and nothing will come to life by itself."""
    workload = observed.workload
    quiet = workload is None or finished(workload) or (is_suspended(workload) and is_at_rest(workload))
    return quiet and not live_pods(observed)


def lost_pods(observed: Observed, now: datetime) -> tuple[Object, ...]:
    """Pods that should have ended long ago: nobody is left on their nodes who could say that they have."""
    return tuple(pod for pod in live_pods(observed) if _overdue(pod, now) >= LOST_SECONDS)


def _overdue(pod: Object, now: datetime) -> float:
    due = pod["metadata"].get("deletionTimestamp")
    return (now - parse_time(due)).total_seconds() if due else 0.0


def is_tracked(pod: Object) -> bool:
    """Whether the Job controller holds the pod: one that has failed until it is replaced, with growing delay."""
    return TRACKING in pod["metadata"].get("finalizers", ())


def tracked_failures(observed: Observed) -> tuple[Object, ...]:
    """Failed pods by which the Job controller remembers how long to wait before it makes the next ones."""
    return tuple(pod for pod in own_pods(observed) if phase(pod) == "Failed" and is_tracked(pod))


def is_silent(pod: Object) -> bool:
    """Whether the node controller no longer hears of a pod that runs: a kubelet always gives a reason."""
    unready = condition(pod, "Ready", "False")
    return trainer_state(pod, "running") is not None and unready is not None and not unready.get("reason")


def replaces_nothing(workload: Object | None) -> bool:
    """Whether no pod is made in place of one that is taken away now."""
    if workload is None or finished(workload) or condition(workload, "SuccessCriteriaMet") is not None:
        return True
    return is_suspended(workload) and condition(workload, "Suspended") is not None


def has_completed_index(workload: Object) -> bool:
    """Whether the Job counts a pod as done for good."""
    return bool((workload.get("status") or {}).get("completedIndexes"))


def succeeded(workload: Object) -> int:
    """How many pods, of whatever attempt, it counts so."""
    return int((workload.get("status") or {}).get("succeeded") or 0)


def has_start_time(workload: Object) -> bool:
    return bool((workload.get("status") or {}).get("startTime"))


def timestamp(now: datetime) -> str:
    """RFC 3339 in UTC with whole seconds, as Kubernetes writes it."""
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    """The moment that an RFC 3339 text names."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
