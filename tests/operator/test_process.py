"""The operator as processes over an API server: permissions, replicas, graceful stop, and a server in trouble."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from finetune_operator.cluster.port import FINE_TUNE_JOB, JOB, LEASE, POD, Key, Object
from tests.chart.rendering import NAMESPACE, environment, of_kind
from tests.operator.world import KEY, RESULT, World, admit_all, manifest
from tests.support.apiserver import Access, ApiServer, granted
from tests.support.scripted import ScriptedRuntime

ROOT = Path(__file__).resolve().parents[2]
FAST: Object = {"settings": {"backoffBaseSeconds": 0.05, "progressPollSeconds": 0.2}}
GANG: Object = {"resources": {"nodes": 2}, "runPolicy": {"preflight": "Never", "retries": {"infrastructure": 9}}}
NAMESPACED: Object = {**FAST, "watch": {"namespaces": ["ml"]}}
LEASE_KEY = Key(NAMESPACE, "finetune-finetune-operator")


class Operator:
    """One process, set up as the chart would, with a port of its own."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self._log = log

    def log(self) -> str:
        return self._log.read_text()

    async def stop(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; 0 when nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""


class Cluster:
    """An API server, its controllers, and operators beside it."""

    def __init__(self, folder: Path) -> None:
        self.world = World(admit=admit_all, runtime=ScriptedRuntime())
        # Operators go by the real time.
        self.world.clock.now = datetime.now(UTC)
        self.server = ApiServer(self.world.cluster)
        self._folder = folder
        self._operators: list[Operator] = []

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async with self.server.serving():
            try:
                yield
            finally:
                for operator in self._operators:
                    if operator.process.returncode is None:
                        operator.process.kill()
                        await operator.process.wait()

    async def start(self, user: str, values: Object) -> Operator:
        port = _free_port()
        path = os.pathsep.join(str(ROOT / folder) for folder in ("crds", "operator"))
        settings = {**environment(values), "FINETUNE_OPERATOR_HTTP_PORT": str(port), "PYTHONPATH": path}
        kubeconfig = self.server.kubeconfig(self._folder / f"{user}.kubeconfig", user)
        log = self._folder / f"{user}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "finetune_operator.main",
                env={**os.environ, **settings, "KUBECONFIG": str(kubeconfig)},
                stderr=output,
            )
        self._operators.append(Operator(process, port, log))
        return self._operators[-1]

    async def until(self, true: Callable[[], Awaitable[object]], seconds: float = 60, play: bool = True) -> None:
        """Play the other controllers, or look on, until it is so."""
        try:
            async with asyncio.timeout(seconds):
                while not await true():
                    if play:
                        await self.world.node.settle()
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError("\n".join(operator.log() for operator in self._operators)) from None

    async def reaches(self, phase: str, *names: str) -> None:
        async def reached() -> bool:
            return all([(await self.world.status(Key("ml", name))).get("phase") == phase for name in names])

        await self.until(reached)

    async def runs_attempt(self, number: int) -> None:
        async def runs() -> bool:
            status = await self.world.status()
            return bool(status["attempt"] == number and status["phase"] == "Running")

        await self.until(runs)

    async def asked(self, verb: str, resource: str) -> bool:
        return any((access.verb, access.resource) == (verb, resource) for access in self.server.log)

    async def keep_start_time(self, key: Key) -> None:
        job = await self.world.workload()
        self.world.cluster.set_status(JOB, key, {**job["status"], "startTime": "2026-01-01T00:00:00Z"})

    async def lose_node(self) -> None:
        """The pod was deleted long ago, and its node says nothing any more."""
        pod = (await self.world.pods())[0]
        self.world.node.runtime.lost.add(pod["metadata"]["name"])
        now, self.world.clock.now = self.world.clock.now, self.world.clock.now - timedelta(hours=1)
        await self.world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"])
        self.world.clock.now = now

    async def holder(self) -> str:
        lease = await self.world.cluster.read(LEASE, LEASE_KEY)
        return str(lease["spec"]["holderIdentity"]) if lease else ""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    found = Cluster(tmp_path)
    async with found.serving():
        yield found


# --- permissions -----------------------------------------------------------------------------------------------------


async def tell_the_story(cluster: Cluster) -> None:
    """Everything that an operator ever does: each permission is there for something that happens here."""
    world, key = cluster.world, KEY
    # One that is deleted some time after its end.
    await world.cluster.create(manifest("short", runPolicy={"ttlSecondsAfterFinished": 1}))
    await cluster.reaches("Running", "short")
    await world.end(0, json.dumps(RESULT))
    await cluster.until(lambda: cluster.asked("delete", "finetunejobs"))
    await world.cluster.create(manifest("tune", **GANG))
    await cluster.reaches("Running", "tune")
    for attempt in (2, 3):
        # The same trouble twice: the second event is counted, not repeated.
        await world.end(69, json.dumps({"exitCode": 69, "message": "storage unreachable"}))
        world.clock.forward(601)
        await cluster.runs_attempt(attempt)
    # What may change of a running job reaches its pods.
    keep = [{"op": "add", "path": "/spec/checkpoint", "value": {"keep": 7}}]
    await world.cluster.patch(FINE_TUNE_JOB, key, keep)
    await world.set_suspend(True)
    await cluster.reaches("Suspended", "tune")
    # Kubernetes before 1.36 lets a suspended Job keep its start time, and then its template cannot be changed.
    await cluster.keep_start_time(key)
    await world.set_suspend(False)
    await cluster.until(lambda: cluster.asked("patch", "jobs/status"), play=False)
    await cluster.runs_attempt(4)
    await cluster.lose_node()
    await cluster.runs_attempt(5)
    # The namespace is deleted under a job that sleeps and then is to go on.
    await world.set_suspend(True)
    await cluster.reaches("Suspended", "tune")
    cluster.server.ending = "ml"
    await world.set_suspend(False)
    await cluster.until(lambda: cluster.asked("delete", "jobs"))


def roles(values: Object) -> list[Object]:
    people = {"rbac": {"aggregate": False}}
    return of_kind("Role", {**values, **people}) + of_kind("ClusterRole", {**values, **people})


def unused(roles: Iterable[Object], log: Iterable[Access]) -> set[tuple[str, str, str]]:
    given = {
        (group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    return given - {(access.group, access.resource, access.verb) for access in log}


@pytest.mark.parametrize("values", [FAST, NAMESPACED], ids=["cluster-wide", "namespaced"])
async def test_the_chart_grants_what_the_operator_asks_for_and_nothing_else(cluster: Cluster, values: Object) -> None:
    cluster.server.allows = granted(roles(values))
    operator = await cluster.start("operator", values)
    await tell_the_story(cluster)
    assert await operator.stop() == 0, operator.log()
    assert cluster.server.refused == []
    assert unused(roles(values), cluster.server.log) == set()


# --- replicas --------------------------------------------------------------------------------------------------------


async def test_of_two_replicas_one_works_and_the_other_takes_over_when_it_is_killed(cluster: Cluster) -> None:
    values: Object = {"settings": {**FAST["settings"], "leaseSeconds": 6}}
    first = await cluster.start("first", values)
    await cluster.until(lambda: _is(cluster.holder()))
    second = await cluster.start("second", values)
    await cluster.world.cluster.create(manifest("before"))
    await cluster.reaches("Running", "before")
    await cluster.until(lambda: _ready(second))
    assert "finetune_operator_leader 0.0" in second.get("/metrics")[1]
    first.process.kill()
    await cluster.world.cluster.create(manifest("after"))
    await cluster.reaches("Running", "before", "after")
    writers = [access.user for access in cluster.server.log if access.writes and access.resource != "leases"]
    assert writers == sorted(writers)
    assert set(writers) == {"first", "second"}


async def test_a_replica_that_is_stopped_finishes_and_hands_over_at_once(cluster: Cluster) -> None:
    slow: Object = {"settings": {**FAST["settings"], "leaseSeconds": 60}}
    first = await cluster.start("first", slow)
    await cluster.until(lambda: _is(cluster.holder()))
    await cluster.world.cluster.create(manifest("tune"))
    await cluster.reaches("Running", "tune")
    holder = await cluster.holder()
    waiting = await cluster.start("waiting", slow)
    await cluster.until(lambda: _ready(waiting))
    # One that does not lead goes without a trace.
    assert await waiting.stop() == 0
    assert await cluster.holder() == holder
    assert await first.stop() == 0
    assert await cluster.holder() == ""
    await cluster.start("second", slow)
    await cluster.until(lambda: _is(cluster.holder()))


async def test_a_leader_whose_lease_is_taken_ends_at_once_and_writes_nothing_more(cluster: Cluster) -> None:
    put_off: list[Access] = []
    taken = seen = False

    def busy(access: Access) -> bool:
        """All that is to be written is put off until the leader has seen that another one leads."""
        nonlocal seen
        if access.resource == "leases":
            seen = seen or taken
        elif access.writes and not seen:
            put_off.append(access)
            return True
        return False

    async def has_much_to_write() -> bool:
        return len(put_off) > 4

    operator = await cluster.start("operator", FAST)
    await cluster.until(lambda: _is(cluster.holder()))
    cluster.server.busy = busy
    for number in range(4):
        await cluster.world.cluster.create(manifest(f"job-{number}"))
    await cluster.until(has_much_to_write)
    change = [{"op": "add", "path": "/spec/holderIdentity", "value": "another"}]
    await cluster.world.cluster.patch(LEASE, LEASE_KEY, change)
    taken = True
    assert await operator.process.wait() == 1
    assert seen
    assert "another replica has it" in operator.log()
    # A request that was on its way may have arrived; a Job takes several of them.
    assert await cluster.world.cluster.list(JOB, None, {}) == []


async def _is(text: Awaitable[str]) -> bool:
    return bool(await text)


async def _ready(operator: Operator) -> bool:
    return (await asyncio.to_thread(operator.get, "/readyz"))[0] == 200


# --- an API server in trouble ----------------------------------------------------------------------------------------


async def test_a_busy_api_server_is_obeyed_and_every_job_comes_through(cluster: Cluster) -> None:
    asked: dict[Access, int] = {}

    def busy(access: Access) -> bool:
        """Each request is put off once."""
        asked[access] = asked.get(access, 0) + 1
        return access.writes and access.resource != "leases" and asked[access] == 1

    cluster.server.busy = busy
    operator = await cluster.start("operator", FAST)
    names = [f"job-{number}" for number in range(8)]
    for name in names:
        await cluster.world.cluster.create(manifest(name))
    await cluster.reaches("Running", *names)
    assert len(await cluster.world.cluster.list(JOB, None, {})) == len(names)
    assert len(await cluster.world.cluster.list(POD, None, {})) == len(names)
    text = operator.get("/metrics")[1]
    assert 'code="429"' in text
    assert "finetune_operator_reconcile_errors_total 0.0" in text


@pytest.mark.slow
async def test_with_a_slow_api_server_the_lease_is_kept_and_jobs_run(cluster: Cluster) -> None:
    cluster.server.delay = 0.4
    operator = await cluster.start("operator", FAST)
    names = [f"job-{number}" for number in range(10)]
    for name in names:
        await cluster.world.cluster.create(manifest(name))
    await cluster.reaches("Running", *names)
    assert operator.process.returncode is None


@pytest.mark.slow
async def test_while_the_api_server_is_away_it_is_not_ready_and_goes_on_when_it_is_back(cluster: Cluster) -> None:
    alone: Object = {**FAST, "settings": {**FAST["settings"], "leaseSeconds": 600}}
    operator = await cluster.start("operator", alone)
    await cluster.until(lambda: _ready(operator))
    away = True
    cluster.server.busy = lambda access: away and access.resource != "leases"

    async def unready() -> bool:
        return (await asyncio.to_thread(operator.get, "/readyz"))[0] == 503

    await cluster.until(unready)
    assert operator.get("/healthz")[0] == 200
    away = False
    await cluster.until(lambda: _ready(operator))
    await cluster.world.cluster.create(manifest("tune"))
    await cluster.reaches("Running", "tune")
