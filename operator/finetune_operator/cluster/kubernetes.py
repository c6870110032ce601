"""The cluster port over a Kubernetes API server."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import aiohttp
from kubernetes.aio import config as kube_config
from kubernetes.aio.client import Configuration

from finetune_api.contract import Progress
from finetune_operator.cluster import trainers
from finetune_operator.cluster.echoes import Echoes
from finetune_operator.cluster.port import (
    EVENT,
    FINE_TUNE_JOB,
    KINDS,
    ClusterError,
    ConflictError,
    JsonPatch,
    Key,
    Kind,
    Object,
    Objects,
    labels_of_ours,
)
from finetune_operator.cluster.sessions import METADATA_LIST, api_session
from finetune_operator.cluster.transport import AGENT, AbsentError, Answered, Transport

log = logging.getLogger(__name__)
FIELD_MANAGER = AGENT
PAGE = 500
"""Objects of one page of a LIST, as kubectl does: bounded answers keep the API server and us small."""
WHOLE_PAGE = 100
"""The same where whole objects of everybody are asked for: a FineTuneJob is some 40 KiB as Python objects."""
EVENT_MESSAGE = 1024
"""Characters of an event's message; the newer events API refuses more."""
CONTENT_TYPES = {"apply": "application/apply-patch+yaml", "json": "application/json-patch+json"}


async def load_configuration() -> Configuration:
    """KUBECONFIG if it is set, else the pod's service account, else ~/.kube/config."""
    configuration = Configuration()
    in_cluster = "KUBERNETES_SERVICE_HOST" in os.environ and not os.environ.get("KUBECONFIG")
    if in_cluster:
        kube_config.load_incluster_config(client_configuration=configuration)
    else:
        await kube_config.load_kube_config(client_configuration=configuration)
    return configuration


class KubernetesCluster:
    """See the Cluster port.

    Args:
        namespaces: those that `list` covers without a namespace; empty means all.
        echoes: told of all that is written.
    """

    def __init__(
        self,
        transport: Transport,
        http: aiohttp.ClientSession,
        *,
        namespaces: tuple[str, ...] = (),
        echoes: Echoes | None = None,
    ) -> None:
        self._send = transport.request
        self._http = http
        self._namespaces = namespaces
        self._echoes = echoes or Echoes()

    # --- the port ----------------------------------------------------------------------------------------------------

    async def read(self, kind: Kind, key: Key) -> Object | None:
        return await self._or_none("GET", _path(kind, key.namespace, key.name))

    async def list(self, kind: Kind, namespace: str | None, labels: Mapping[str, str]) -> Objects:
        namespaces = self._namespaces or (None,) if namespace is None else (namespace,)
        # In one answer: an API server before 1.34 takes pages from etcd, and all of a namespace to find them.
        return [item for each in namespaces for item in await self._list(kind, each, _selector(labels), page=0)]

    async def walk(self, kind: Kind, *, metadata_only: bool = False) -> AsyncIterator[Object]:
        accept, page = (METADATA_LIST, PAGE) if metadata_only else ("application/json", WHOLE_PAGE)
        for namespace in self._namespaces or (None,):
            async for obj in self._pages(kind, namespace, _selector(labels_of_ours(kind)), page, accept):
                yield obj

    async def create(self, obj: Object) -> Object:
        kind, namespace = KINDS[obj["kind"]], obj["metadata"]["namespace"]
        # Strict: what the server does not know is refused with its name instead of being dropped.
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        with self._echoes.writing(kind, Key(namespace, obj["metadata"]["name"])):
            created = await self._send("POST", _path(kind, namespace), query, obj)
            self._echoes.wrote(kind, created)
        return created

    async def apply(self, obj: Object) -> Object:
        kind, metadata = KINDS[obj["kind"]], obj["metadata"]
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict", "force": "true"}
        path = _path(kind, metadata["namespace"], metadata["name"])
        return await self._send("PATCH", path, query, obj, content_type=CONTENT_TYPES["apply"])

    async def patch(self, kind: Kind, key: Key, patch: JsonPatch, subresource: str | None = None) -> Object | None:
        path = _path(kind, key.namespace, key.name) + (f"/{subresource}" if subresource else "")
        query = {"fieldManager": FIELD_MANAGER}
        with self._echoes.writing(kind, key):
            patched = await self._or_none("PATCH", path, query, patch, content_type=CONTENT_TYPES["json"])
            if patched is not None:
                self._echoes.wrote(kind, patched)
        return patched

    async def delete(self, kind: Kind, key: Key, uid: str, grace_seconds: int | None = None) -> None:
        options: Object = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            await self._or_none("DELETE", _path(kind, key.namespace, key.name), {}, options)
        except ConflictError:
            log.debug("%s %s is another one by now, it is left alone", kind.kind, key)

    async def emit(self, regarding: Object, reason: str, message: str, warning: bool = False) -> None:
        event = _event(regarding, reason, message, warning)
        try:
            await self.create(event)
        except ConflictError:
            await self._count_again(event)
        except ClusterError as error:
            log.warning("event %s of %s was not written: %s", reason, regarding["metadata"]["name"], error)

    async def knock(self) -> None:
        """Ask for next to nothing. Raises ClusterError: the API server does not answer, or not us."""
        namespace = self._namespaces[0] if self._namespaces else None
        await self._send("GET", _path(FINE_TUNE_JOB, namespace), {"limit": "1"}, accept=METADATA_LIST)

    async def events_of(self, obj: Object) -> Objects:
        query = {"fieldSelector": f"involvedObject.uid={obj['metadata']['uid']}"}
        events = await self._list(EVENT, obj["metadata"]["namespace"], query)
        return sorted(events, key=_last_seen)

    async def read_progress(self, pod: Object) -> Progress | None:
        return await trainers.read_progress(self._http, pod)

    # --- requests ----------------------------------------------------------------------------------------------------

    async def _list(self, kind: Kind, namespace: str | None, query: Mapping[str, str], page: int = PAGE) -> Objects:
        return [item async for item in self._pages(kind, namespace, query, page)]

    async def _pages(
        self, kind: Kind, namespace: str | None, query: Mapping[str, str], size: int, accept: str = "application/json"
    ) -> AsyncIterator[Object]:
        """In pages of this size; 0 for one of whatever size."""
        page = {**query, "limit": str(size)} if size else query
        while True:
            answer = await self._send("GET", _path(kind, namespace), page, accept=accept)
            # Without objects a list of metadata alone says null instead of an empty list.
            for item in answer["items"] or ():
                # Items of a list come without these two; the port promises them.
                yield {**item, "apiVersion": kind.api_version, "kind": kind.kind}
            token = answer["metadata"].get("continue")
            if not token:
                return
            page = {**page, "continue": token}

    async def _count_again(self, event: Object) -> None:
        """An equal event is there: raise its count. A race with another writer may lose one; nothing depends on it."""
        metadata = event["metadata"]
        query = {"fieldSelector": f"metadata.name={metadata['name']}"}
        try:
            for found in await self._list(EVENT, metadata["namespace"], query):
                patch = [
                    {"op": "add", "path": "/count", "value": int(found.get("count") or 1) + 1},
                    {"op": "add", "path": "/lastTimestamp", "value": event["lastTimestamp"]},
                ]
                await self.patch(EVENT, Key(metadata["namespace"], metadata["name"]), patch)
        except ClusterError as error:
            log.warning("event %s was not counted: %s", metadata["name"], error)

    async def _or_none(self, *args: Any, **options: Any) -> Object | None:
        try:
            return await self._send(*args, **options)
        except AbsentError:
            return None


@asynccontextmanager
async def connect(
    configuration: Configuration,
    *,
    namespaces: tuple[str, ...] = (),
    request_seconds: float = 30.0,
    may_write: Callable[[], bool] = lambda: True,
    answered: Answered = lambda method, code, seconds: None,
    echoes: Echoes | None = None,
) -> AsyncIterator[KubernetesCluster]:
    """A cluster whose connections are closed at the end; see Transport. No proxy stands between operator and pods."""
    async with (
        api_session(configuration, configuration.connection_pool_maxsize) as api,
        aiohttp.ClientSession(trust_env=False) as http,
    ):
        transport = Transport(
            api, configuration, request_seconds=request_seconds, may_write=may_write, answered=answered
        )
        yield KubernetesCluster(transport, http, namespaces=namespaces, echoes=echoes)


def _path(kind: Kind, namespace: str | None, name: str | None = None) -> str:
    prefix = "/api/" if "/" not in kind.api_version else "/apis/"
    scope = f"/namespaces/{namespace}" if namespace is not None else ""
    return f"{prefix}{kind.api_version}{scope}/{kind.plural}" + (f"/{name}" if name is not None else "")


def _selector(labels: Mapping[str, str]) -> dict[str, str]:
    text = ",".join(f"{name}={value}" if value else name for name, value in labels.items())
    return {"labelSelector": text} if text else {}


def _event(regarding: Object, reason: str, message: str, warning: bool) -> Object:
    """The name is made of what the event says, so that an equal one is found and counted."""
    metadata, kind = regarding["metadata"], "Warning" if warning else "Normal"
    text = message if len(message) <= EVENT_MESSAGE else message[: EVENT_MESSAGE - 1] + "…"
    digest = hashlib.sha256("\0".join((metadata["uid"], reason, text, kind)).encode()).hexdigest()[:16]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": EVENT.api_version,
        "kind": EVENT.kind,
        "metadata": {"name": f"{metadata['name']}.{digest}", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": regarding["apiVersion"],
            "kind": regarding["kind"],
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
        "reason": reason,
        "message": text,
        "type": kind,
        "count": 1,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
    }


def _last_seen(event: Object) -> str:
    """Writers of the newer events API leave lastTimestamp empty."""
    series = event.get("series") or {}
    return str(
        event.get("lastTimestamp")
        or series.get("lastObservedTime")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp", "")
    )
