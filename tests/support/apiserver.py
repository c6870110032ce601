"""A Kubernetes API server on loopback over the in-memory cluster, so that whole operator processes can be tested.

It speaks what the operator and kopf speak: discovery, LIST with selectors and pages, WATCH, POST, JSON Patch, DELETE.
It notes who asked for what, may refuse what a set of Roles does not grant, and may be slow or busy when told to be.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from finetune_operator.cluster.memory import Change, MemoryCluster
from finetune_operator.cluster.port import KINDS, ConflictError, InvalidError, Key, Kind, Object

VERBS = {"GET": "get", "POST": "create", "PATCH": "patch", "DELETE": "delete"}
DISCOVERED = (
    *KINDS.values(),
    # kopf watches nothing before it has discovered these.
    Kind("v1", "Namespace", "namespaces"),
    Kind("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions"),
)
BY_PLURAL = {(kind.api_version, kind.plural): kind for kind in KINDS.values()}


@dataclass(frozen=True)
class Access:
    """One request, in RBAC's terms; `user` is the bearer token."""

    user: str
    verb: str
    group: str
    resource: str
    namespace: str | None
    name: str | None = None

    @property
    def writes(self) -> bool:
        return self.verb not in ("get", "list", "watch")


class ApiServer:
    """See the module.

    Args:
        allows: whether a request is granted; by default all are.
    """

    def __init__(self, cluster: MemoryCluster, allows: Callable[[Access], bool] = lambda access: True) -> None:
        self.cluster = cluster
        self.allows = allows
        self.log: list[Access] = []
        self.refused: list[Access] = []
        self.busy: Callable[[Access], bool] = lambda access: False
        """Requests that get a 429, with `Retry-After: 1`."""
        self.delay = 0.0
        """Seconds that every request but a watch takes longer."""
        self.ending = ""
        """A namespace that is being deleted: nothing can be created there."""
        self.url = ""
        self._history: list[Change] = []
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        cluster.subscribe(self._changed)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            await runner.cleanup()

    def kubeconfig(self, file: Path, user: str) -> Path:
        """Credentials by which its log names this user."""
        file.write_text(
            json.dumps({
                "apiVersion": "v1", "kind": "Config", "current-context": "c",
                "clusters": [{"name": "c", "cluster": {"server": self.url}}],
                "users": [{"name": "u", "user": {"token": user}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            })
        )  # fmt: skip
        return file

    def _changed(self, change: Change) -> None:
        self._history.append(change)
        task = asyncio.get_running_loop().create_task(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    # --- requests ----------------------------------------------------------------------------------------------------

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        if parts[0] not in ("api", "apis"):
            return _status(404, "NotFound", request.path)
        depth = 2 if parts[0] == "api" else 3
        version, rest = "/".join(parts[1:depth]), parts[depth:]
        if not rest:
            return web.json_response(_discovery(parts[0], version))
        namespace = None
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        kind = BY_PLURAL.get((version, rest[0]))
        if kind is None:
            return _status(404, "NotFound", request.path)
        return await self._ask(request, kind, namespace, rest[1:])

    async def _ask(
        self, request: web.Request, kind: Kind, namespace: str | None, rest: list[str]
    ) -> web.StreamResponse:
        name, subresource = rest[0] if rest else None, rest[1] if len(rest) > 1 else None
        access = _access(request, kind, namespace, name, subresource)
        if (refusal := self._refuses(access)) is not None:
            return refusal
        if access.verb == "watch":
            return await self._watch(request, kind, namespace)
        if self.delay:
            await asyncio.sleep(self.delay)
        try:
            if name is None:
                return await (self._list if access.verb == "list" else self._create)(request, kind, namespace)
            return await self._one(request, kind, Key(namespace or "", name), subresource)
        except (ConflictError, InvalidError) as error:
            return _refusal(error, access)

    def _refuses(self, access: Access) -> web.Response | None:
        if self.busy(access):
            return _status(429, "TooManyRequests", "try later", headers={"Retry-After": "1"})
        self.log.append(access)
        if not self.allows(access):
            self.refused.append(access)
            return _status(403, "Forbidden", f"{access.resource} is forbidden: cannot {access.verb} it")
        if access.verb == "create" and access.namespace == self.ending:
            return _status(403, "Forbidden", f"cannot create {access.resource} because it is being terminated")
        return None

    async def _list(self, request: web.Request, kind: Kind, namespace: str | None) -> web.StreamResponse:
        version = str(max((_version(change) for change in self._history), default=0))
        objects = [obj for obj in await self.cluster.list(kind, namespace, {}) if _selected(obj, request)]
        start = int(request.query.get("continue") or 0)
        end = start + int(request.query.get("limit") or len(objects) or 1)
        metadata = {"resourceVersion": version, **({"continue": str(end)} if end < len(objects) else {})}
        items: list[Object] | None = [_narrowed(obj, request) for obj in objects[start:end]]
        if _wants_metadata(request):
            # As the real one does: null where there is none.
            items = items or None
        return web.json_response({"kind": kind.kind + "List", "metadata": metadata, "items": items})

    async def _create(self, request: web.Request, kind: Kind, namespace: str | None) -> web.StreamResponse:
        obj = await request.json()
        assert obj["metadata"]["namespace"] == namespace
        return web.json_response(await self.cluster.create(obj), status=201)

    async def _one(self, request: web.Request, kind: Kind, key: Key, subresource: str | None) -> web.StreamResponse:
        found: Object | None
        match request.method:
            case "GET":
                found = await self.cluster.read(kind, key)
            case "PATCH":
                found = await self.cluster.patch(kind, key, await request.json(), subresource)
            case _:
                found = await self.cluster.read(kind, key)
                if found is not None:
                    uid = (await request.json())["preconditions"]["uid"]
                    await self.cluster.delete(kind, key, uid)
        return web.json_response(found) if found is not None else _status(404, "NotFound", f"{kind.plural} {key}")

    async def _watch(self, request: web.Request, kind: Kind, namespace: str | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        since, position = int(request.query.get("resourceVersion") or 0), 0
        while True:
            for change in self._history[position:]:
                position += 1
                wanted = change.kind == kind and namespace in (None, change.key.namespace)
                if wanted and _version(change) > since and _selected(change.obj, request):
                    event = {"type": change.type, "object": _narrowed(change.obj, request)}
                    await response.write(json.dumps(event).encode() + b"\n")
            async with self._news:
                while position == len(self._history):
                    await self._news.wait()


def _access(
    request: web.Request, kind: Kind, namespace: str | None, name: str | None, subresource: str | None
) -> Access:
    verb = VERBS[request.method]
    if verb == "get" and name is None:
        verb = "watch" if request.query.get("watch") == "true" else "list"
    user = request.headers.get("Authorization", "").removeprefix("Bearer ")
    resource = kind.plural + (f"/{subresource}" if subresource else "")
    return Access(user, verb, kind.api_version.rpartition("/")[0], resource, namespace, name)


def _refusal(error: ConflictError | InvalidError, access: Access) -> web.Response:
    if isinstance(error, InvalidError):
        return _status(422, "Invalid", str(error), details={"causes": []})
    if access.verb == "patch":
        return _status(422, "Invalid", str(error))
    return _status(409, "AlreadyExists" if access.verb == "create" else "Conflict", str(error))


def _wants_metadata(request: web.Request) -> bool:
    return "PartialObjectMetadata" in request.headers.get("Accept", "")


def _narrowed(obj: Object, request: web.Request) -> Object:
    if not _wants_metadata(request):
        return obj
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}


def _version(change: Change) -> int:
    return int(change.obj["metadata"]["resourceVersion"]) + (change.type == "DELETED")


def _selected(obj: Object, request: web.Request) -> bool:
    labels = obj["metadata"].get("labels") or {}
    for term in filter(None, request.query.get("labelSelector", "").split(",")):
        name, equals, value = term.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    for term in filter(None, request.query.get("fieldSelector", "").split(",")):
        path, _, value = term.partition("=")
        found: Any = obj
        for part in path.split("."):
            found = found.get(part, {})
        if found != value:
            return False
    return True


def _discovery(prefix: str, version: str) -> Object:
    groups = {kind.api_version.rpartition("/")[0] for kind in DISCOVERED} - {""}
    if not version:
        if prefix == "api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        return {"kind": "APIGroupList", "groups": [_group(group) for group in sorted(groups)]}
    resources = [
        _resource(kind, suffix) for kind in DISCOVERED for suffix in ("", "/status") if kind.api_version == version
    ]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}


def _group(group: str) -> Object:
    versions = [
        {"groupVersion": kind.api_version, "version": kind.api_version.rpartition("/")[2]}
        for kind in DISCOVERED
        if kind.api_version.rpartition("/")[0] == group
    ]
    return {"name": group, "versions": versions[:1], "preferredVersion": versions[0]}


def _resource(kind: Kind, suffix: str) -> Object:
    verbs = ["get", "list", "watch", "create", "patch", "delete"]
    namespaced = kind.kind in KINDS
    return {
        "name": kind.plural + suffix,
        "singularName": "",
        "namespaced": namespaced,
        "kind": kind.kind,
        "verbs": verbs,
    }


def _status(code: int, reason: str, message: str, **more: Any) -> web.Response:
    body: Object = {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message}
    if "details" in more:
        body["details"] = more["details"]
    return web.json_response(body, status=code, headers=more.get("headers"))


def granted(roles: Iterable[Object]) -> Callable[[Access], bool]:
    """Whether these Roles and ClusterRoles, bound to the user, grant a request."""
    rules = [(role["metadata"].get("namespace"), rule) for role in roles for rule in role["rules"]]

    def allows(access: Access) -> bool:
        return any(_grants(rule, access) for namespace, rule in rules if namespace in (None, access.namespace))

    return allows


def _grants(rule: Object, access: Access) -> bool:
    names = rule.get("resourceNames")
    return (
        access.group in rule["apiGroups"]
        and access.resource in rule["resources"]
        and access.verb in rule["verbs"]
        and (names is None or access.name in names)
    )
