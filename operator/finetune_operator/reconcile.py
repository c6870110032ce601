"""Observe, decide, act: one pass for one job. Level-triggered: what woke it does not matter, only what is there now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Protocol

from pydantic import ValidationError

from finetune_api.contract import Progress
from finetune_api.job import FineTuneJob, ObjectMeta
from finetune_api.status import TERMINAL, FineTuneJobStatus, Phase
from finetune_operator.acting import Actor, NameTakenError
from finetune_operator.cluster.port import (
    CONFIG_MAP,
    FINE_TUNE_JOB,
    JOB,
    POD,
    Cluster,
    ClusterError,
    ForbiddenError,
    InvalidError,
    JsonPatch,
    Key,
    Object,
)
from finetune_operator.cluster.rules import key_of
from finetune_operator.lifecycle import (
    Create,
    CreatePreflight,
    Decision,
    Expire,
    decide,
    is_due,
    refused,
    unreadable,
    was_taken_back,
)
from finetune_operator.logs import of_attempt
from finetune_operator.observed import (
    Observed,
    controller_uid,
    eviction_in,
    pods_overdue_in,
    queue_of,
    rank_zero,
    refusal_in,
    stuck_pod,
    trouble_in,
    without_pods,
)
from finetune_operator.plan import plan
from finetune_operator.plan.names import PREFLIGHT, preflight_name, selector, workload_name
from finetune_operator.references import Named, named, pending
from finetune_operator.settings import Settings
from finetune_operator.waiters import Waiters

log = logging.getLogger(__name__)
MAX_STEPS = 8
"""Actions and statuses of one pass; more would be a rule that does not see what its action did."""
MAX_NAMED = 16
"""Jobs that are read to find out for whom a job waits, and whether they wait in a circle."""


class ProgressSource(Protocol):
    """Where the newest progress of a pod is found, without waiting for the pod."""

    def latest(self, key: Key, pod: Object) -> Progress | None:
        """The newest answer of this pod, or None; from now on the pod is asked."""
        ...

    def silence(self, key: Key) -> float:
        """Seconds for which the pod has left all that it was asked unanswered."""
        ...

    def forget(self, key: Key) -> None:
        """The job has no pod that could be asked."""
        ...


class Told(Protocol):
    """Who is told of what happened to jobs."""

    def written(self, raw: Object, status: Object) -> None:
        """This job's status was replaced by that one."""
        ...

    def gone(self, key: Key) -> None:
        """This job does not exist any more."""
        ...


class Reconciler:
    """Brings one job at a time a step further.

    Args:
        cluster: the world.
        clock: the present in UTC.
        progress: newest progress of running pods.
        wake: called for a job that waited for what has just happened to another one.
        told: told of every status that was written, and of every job that is gone.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: Settings,
        clock: Callable[[], datetime],
        progress: ProgressSource,
        *,
        wake: Callable[[Key], None],
        told: Told,
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._clock = clock
        self._progress = progress
        self._wake = wake
        self._told = told
        self._waiters = Waiters()
        self._actor = Actor(cluster, settings, clock)

    async def reconcile(self, key: Key) -> float | None:
        """One pass. Returns seconds until the next one is wanted, or None. Raises ClusterError: try again later."""
        raw = await self._cluster.read(FINE_TUNE_JOB, key)
        if raw is None or raw["metadata"].get("deletionTimestamp"):
            self._progress.forget(key)
            self._told.gone(key)
            self._waiters.set(key, ())
            self._wake_waiters(key)
            return None
        now = self._clock()
        try:
            job = FineTuneJob.from_wire(raw)
        except ValidationError as error:
            # When not even these can be read, that error is the one to report.
            metadata, status = (
                ObjectMeta.from_wire(raw["metadata"]),
                FineTuneJobStatus.from_wire(raw.get("status") or {}),
            )
            await self._settle(raw, unreadable(metadata, status, now, _problems(error)))
            raise
        return await self._pass(key, raw, job, now)

    async def _pass(self, key: Key, raw: Object, job: FineTuneJob, now: datetime) -> float | None:
        of_attempt(job.status.attempt)
        observed = await self._first_look(key, raw, job, now)
        await self._refresh(job)
        for _ in range(MAX_STEPS):
            decision = decide(job, observed, now, self._settings)
            if decision.action is None:
                waits = (decision.requeue_after, pods_overdue_in(observed, now) or None)
                wait = min((wait for wait in waits if wait is not None), default=None)
                written = await self._settle(raw, decision)
                # Of a status that is written no event brings another pass: what follows from it is seen in this one,
                # unless it wants to see the children anew.
                if written is None or wait == 0.0:
                    return wait
                raw = {**written, "status": decision.status.to_wire()}
                job = job.model_copy(update={"status": decision.status})
                continue
            try:
                observed = await self._actor.act(key, job, observed, decision.action)
            except (InvalidError, ForbiddenError, NameTakenError) as error:
                final = isinstance(error, InvalidError) and isinstance(decision.action, Create | CreatePreflight)
                answer = refused(job, observed, now, self._settings, message=str(error), final=final)
                if answer.action is not None:
                    await self._actor.act(key, job, observed, answer.action)
                else:
                    await self._settle(raw, answer)
                raise
            if isinstance(decision.action, Expire):
                return None
        raise ClusterError(f"{key}: more than {MAX_STEPS} steps in one pass")

    # --- observe -----------------------------------------------------------------------------------------------------

    async def _first_look(self, key: Key, raw: Object, job: FineTuneJob, now: datetime) -> Observed:
        """The children as they are, by one read less where there are none yet as a rule.

        Whether a new job's Job exists `Create` tells: it finds one whose maker died before it said so.
        """
        if not raw.get("status") and not _is_held_up(job):
            observed = await self._observe(key, job, now, has_workload=False)
            if not observed.pods and isinstance(decide(job, observed, now, self._settings).action, Create):
                return observed
        return await self._observe(key, job, now)

    async def _observe(self, key: Key, job: FineTuneJob, now: datetime, *, has_workload: bool = True) -> Observed:
        """The children as they are; without has_workload it is not asked whether there is a Job."""
        workload_key = Key(key.namespace, workload_name(key.name))
        workload = await self._cluster.read(JOB, workload_key) if has_workload else None
        if workload is not None and controller_uid(workload) != job.metadata.uid:
            workload = None
        pods = await self._cluster.list(POD, key.namespace, selector(key.name))
        observed = Observed(workload, tuple(pods), named=await self._named(key, job))
        if is_due(job.spec, job.status):
            observed = await self._observe_preflight(key, job, observed)
        waiting = without_pods(observed)
        if waiting is not None and pods_overdue_in(observed, now) == 0:
            observed = replace(observed, refusal=refusal_in(await self._cluster.events_of(waiting)))
        if workload is not None and queue_of(workload) is not None and was_taken_back(job.status, observed):
            observed = replace(observed, eviction=eviction_in(await self._cluster.events_of(workload)))
        stuck = stuck_pod(observed, self._clock())
        if stuck is not None:
            observed = replace(observed, trouble=trouble_in(await self._cluster.events_of(stuck)))
        pod = rank_zero(observed)
        if pod is None:
            self._progress.forget(key)
            return observed
        progress = self._progress.latest(key, pod)
        return replace(observed, progress=progress, silence=self._progress.silence(key))

    async def _observe_preflight(self, key: Key, job: FineTuneJob, observed: Observed) -> Observed:
        found = await self._cluster.read(JOB, Key(key.namespace, preflight_name(key.name)))
        if found is None or controller_uid(found) != job.metadata.uid:
            return observed
        pods = await self._cluster.list(POD, key.namespace, selector(key.name, PREFLIGHT))
        mine = tuple(pod for pod in pods if controller_uid(pod) == found["metadata"]["uid"])
        return replace(observed, preflight=found, preflight_pods=mine)

    async def _named(self, key: Key, job: FineTuneJob) -> dict[str, Named | None]:
        """The jobs for which this one waits, and those for which they wait."""
        names = [] if job.spec.suspend else [reference.job for reference in pending(job)]
        # Before they are read: what happens to them from now on wakes this job.
        self._waiters.set(key, (Key(key.namespace, name) for name in names))
        found: dict[str, Named | None] = {}
        while names and len(found) < MAX_NAMED:
            name = names.pop(0)
            if name in found or name == key.name:
                continue
            raw = await self._cluster.read(FINE_TUNE_JOB, Key(key.namespace, name))
            other = found[name] = named(raw) if raw is not None else None
            names += other.names if other is not None and other.is_held else ()
        return found

    async def _refresh(self, job: FineTuneJob) -> None:
        """Let a running trainer know of what was changed in the spec. Asked once a generation, not once a pass."""
        status = job.status
        if status.observed_generation in (0, job.metadata.generation) or status.phase in TERMINAL:
            return
        wanted = plan(job, self._settings, status.attempt).config_map
        key = key_of(wanted)
        found = await self._cluster.read(CONFIG_MAP, key)
        if found is None or controller_uid(found) != job.metadata.uid or found["data"] == wanted["data"]:
            return
        guard = {"op": "test", "path": "/metadata/uid", "value": found["metadata"]["uid"]}
        await self._cluster.patch(CONFIG_MAP, key, [guard, {"op": "add", "path": "/data", "value": wanted["data"]}])

    # --- settle ------------------------------------------------------------------------------------------------------

    async def _settle(self, raw: Object, decision: Decision) -> Object | None:
        """Write the status if it differs, then tell people. The only place that does either.

        Returns the job as it is after a write; None where nothing was to be written, or the job is gone.
        """
        new, old = decision.status.to_wire(), raw.get("status") or {}
        if new == old:
            return None
        metadata = raw["metadata"]
        patch: JsonPatch = [
            {"op": "test", "path": "/metadata/uid", "value": metadata["uid"]},
            {"op": "test", "path": "/metadata/resourceVersion", "value": metadata["resourceVersion"]},
            {"op": "add", "path": "/status", "value": new},
        ]
        key = key_of(raw)
        written = await self._cluster.patch(FINE_TUNE_JOB, key, patch, subresource="status")
        if written is None:
            return None
        self._told.written(raw, new)
        log.info("%s: %s %s: %s", key, new.get("phase"), new.get("reason"), new.get("message"))
        if _concerns_others(old, new):
            self._wake_waiters(key)
        for event in decision.events:
            await self._cluster.emit(raw, event.reason, event.message, event.warning)
        return written

    def _wake_waiters(self, key: Key) -> None:
        for waiter in self._waiters.of(key):
            self._wake(waiter)


def _is_held_up(job: FineTuneJob) -> bool:
    """Whether something else comes before its Job, as far as the job itself tells."""
    return bool(job.spec.suspend or is_due(job.spec, job.status) or pending(job))


def _concerns_others(old: Object, new: Object) -> bool:
    """Whether jobs that wait for this one have to look: progress and stages do not change what they do."""
    if old.get("phase") != new.get("phase"):
        return True
    return new.get("phase") == Phase.BLOCKED.value and old.get("reason") != new.get("reason")


def _problems(error: ValidationError) -> str:
    problems: Sequence[str] = [
        f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors(include_url=False)
    ]
    return "; ".join(problems[:5])
