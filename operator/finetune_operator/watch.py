"""kopf's handlers. They only put keys: what an event says is stale by the time it is worked on."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import kopf
from kubernetes.aio.client import Configuration

from finetune_api.contract import LABEL_JOB
from finetune_operator.cluster.echoes import Echoes
from finetune_operator.cluster.port import FINE_TUNE_JOB, JOB, POD, Key, Kind, Object
from finetune_operator.cluster.sessions import metadata_session
from finetune_operator.queue import Line
from finetune_operator.settings import Settings
from finetune_operator.watches import WATCHED, Watches

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
Put = Callable[[Key, Line], None]
LIST_CHUNK = 500
"""Objects of one page of kopf's first LIST, which is one unbounded answer otherwise."""
IDLE_SECONDS = 0.1
"""For which kopf keeps a task and the last event of an object after it: thousands of them at once would stay as memory
that is never given back, and a new task costs next to nothing."""


@dataclass
class Stop:
    """The two steps of a graceful stop."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by SIGTERM or SIGINT."""
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when nothing is under way any more: the watches may end."""


async def watch(
    put: Put, watches: Watches, echoes: Echoes, *, settings: Settings, configuration: Configuration, stop: Stop
) -> None:
    """Watch until everything else has stopped. At the end kopf cancels every task that was begun after this call.

    Args:
        put: told of the job that an event is about, but for events of what we have written ourselves.
        watches: told of everything that is delivered.
    """
    others = asyncio.all_tasks()
    tasks = await kopf.spawn_tasks(
        registry=_registry(put, watches, echoes, configuration),
        settings=_kopf_settings(),
        standalone=True,
        clusterwide=not settings.namespaces,
        namespaces=settings.namespaces,
        stop_flag=stop.drained,
    )
    # kopf has taken the signals for itself, and would end at once; what is under way is to be finished first.
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop.asked.set)
    await kopf.run_tasks(tasks, ignored=others)


class _NoDiffs(kopf.DiffBaseStorage):
    """kopf compares each object with what it was, for handlers that we do not have; that took half of its time."""

    def build(self, *, body: kopf.Body, extra_fields: Iterable[kopf.FieldSpec] | None = None) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        raise AssertionError("nothing is stored, since no handler looks at changes")


def _kopf_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    # Without this kopf asks for permission to list namespaces and CRDs, and waits a minute where it has none.
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.watching.chunk_size = LIST_CHUNK
    settings.queueing.idle_timeout = IDLE_SECONDS
    settings.persistence.diffbase_storage = _NoDiffs()
    for kind in (JOB, POD):
        # On the server's side: the pods of everybody else never come over the wire.
        settings.watching.label_selectors[_selector(kind)] = LABEL_JOB
    return settings


def _registry(put: Put, watches: Watches, echoes: Echoes, configuration: Configuration) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    async def login(**_: Any) -> kopf.AiohttpSession:
        # kopf closes it, and asks for another one when the server no longer takes its credentials.
        session = await metadata_session(configuration, WATCHED)
        return kopf.AiohttpSession(server=configuration.host, aiohttp_session=session)

    def handler(kind: Kind, key: Callable[[Object], Key]) -> Callable[..., Any]:
        # A coroutine function: kopf runs plain functions in threads, and the queue belongs to the loop.
        async def changed(event: Object, **_: Any) -> None:
            metadata, deleted = event["object"]["metadata"], event["type"] == "DELETED"
            watches.delivered(kind, metadata, deleted)
            if await echoes.is_news(kind, metadata, deleted):
                # What is listed at the beginning has no type.
                put(key(metadata), Line.CHANGED if event["type"] in ("MODIFIED", "DELETED") else Line.NEW)

        return changed

    kopf.on.login(registry=registry)(login)
    for kind in WATCHED:
        key = _own_key if kind == FINE_TUNE_JOB else _job_key
        kopf.on.event(*_selector(kind), registry=registry)(handler(kind, key))
    return registry


def _own_key(metadata: Object) -> Key:
    return Key(metadata["namespace"], metadata["name"])


def _job_key(metadata: Object) -> Key:
    return Key(metadata["namespace"], metadata["labels"][LABEL_JOB])


def _selector(kind: Kind) -> tuple[str, str, str]:
    """Group, version and plural, as kopf takes them."""
    group, _, version = kind.api_version.rpartition("/")
    return group, version, kind.plural
