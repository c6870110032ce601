"""What `finetune run` does with a file when this machine knows the name already."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from finetune_api.status import TERMINAL, Phase
from finetune_operator.cli.errors import CliError
from finetune_operator.cluster.memory import MemoryCluster
from finetune_operator.cluster.port import FINE_TUNE_JOB, InvalidError, Key, Object
from finetune_operator.cluster.rules import key_of


@dataclass(frozen=True)
class Submitted:
    """A job that is in the cluster now."""

    key: Key
    job: Object
    note: str = ""
    replaced: Object | None = None

    @property
    def phase(self) -> Phase | None:
        phase = (self.job.get("status") or {}).get("phase")
        return Phase(phase) if phase else None

    @property
    def ended(self) -> bool:
        return self.phase in TERMINAL


async def submit(cluster: MemoryCluster, wanted: Object, place: str, replace: bool) -> Submitted:
    """Create the job, or go on with the one of this name.

    Args:
        wanted: the job as its file has it.
        place: file and line, for messages.
        replace: delete the job of this name first.

    Raises:
        CliError: the job is refused, or is another one than that of this name.
    """
    key = key_of(wanted)
    existing = await cluster.read(FINE_TUNE_JOB, key)
    if existing is not None and _was_held(existing):
        # Nothing was made of it, so that it may be another one by now; whether it is held still is found out anew.
        await cluster.delete(FINE_TUNE_JOB, key, existing["metadata"]["uid"])
        existing = None
    if existing is not None and replace:
        await cluster.delete(FINE_TUNE_JOB, key, existing["metadata"]["uid"])
        created = await _create(cluster, wanted, place)
        return Submitted(
            key, created, f"{key.name} is started anew; the earlier job of this name is deleted.", existing
        )
    if existing is None:
        return Submitted(key, await _create(cluster, wanted, place))
    job = await _update(cluster, key, wanted, place)
    return Submitted(key, job, _note(job))


async def suspend_others(cluster: MemoryCluster, keys: Collection[Key]) -> None:
    """Suspend the jobs of other files that have not ended: they go on when their own file is run."""
    for job in await cluster.list(FINE_TUNE_JOB, None, {}):
        phase = (job.get("status") or {}).get("phase")
        if key_of(job) not in keys and phase not in TERMINAL:
            patch = [{"op": "add", "path": "/spec/suspend", "value": True}]
            await cluster.patch(FINE_TUNE_JOB, key_of(job), patch)


def _was_held(job: Object) -> bool:
    """Whether it was blocked or suspended before its first attempt."""
    status = job.get("status") or {}
    return status.get("phase") in (Phase.BLOCKED, Phase.SUSPENDED) and not status.get("attempt")


async def _create(cluster: MemoryCluster, wanted: Object, place: str) -> Object:
    try:
        return await cluster.create(wanted)
    except InvalidError as error:
        raise CliError(f"{place}: {error}") from error


async def _update(cluster: MemoryCluster, key: Key, wanted: Object, place: str) -> Object:
    """The job with the file's spec: what may change after creation changes, spec.suspend among it."""
    patch = [{"op": "replace", "path": "/spec", "value": wanted.get("spec")}]
    try:
        job = await cluster.patch(FINE_TUNE_JOB, key, patch)
    except InvalidError as error:
        way_out = "give the job another metadata.name, or start it anew with --replace"
        raise CliError(f"{place}: a job of this name was run with another spec: {error}; {way_out}") from error
    if job is None:
        raise CliError(f"{place}: the job {key} went away meanwhile; run it again")
    return job


def _note(job: Object) -> str:
    status = job.get("status") or {}
    name, phase = job["metadata"]["name"], status.get("phase")
    if phase == Phase.SUCCEEDED:
        return f"{name} has succeeded already; --replace runs it anew."
    if phase == Phase.FAILED:
        return (
            f"{name} has failed already: {status.get('message', '')}\nMend the cause, then run it anew with --replace."
        )
    checkpoint = (status.get("checkpoint") or {}).get("step")
    where = f"the checkpoint of step {checkpoint}" if checkpoint is not None else "where it stood"
    return f"{name} goes on from {where}."
