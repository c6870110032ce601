"""Random events, in any order, with an operator that dies and an API that fails: what must hold whatever happens."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from finetune_api.contract import Progress, Stage
from finetune_operator.cluster.port import FINE_TUNE_JOB, JOB, POD, ClusterError, Key, Object
from finetune_operator.observed import index, is_live
from tests.operator.kueue import Kueue
from tests.operator.world import KEY, RESULT, World, admit_all

NODES = 2
CODES = {0: RESULT, 65: {}, 69: {}, 70: {}, 75: {}, 79: {}, 80: {}, 137: {}, 139: {}}
TERMINAL = ("Succeeded", "Failed")
EXAMPLES, STEPS = 20, 30
POLICY = {"retries": {"infrastructure": 3, "application": 1}, "preflight": "Never"}


class Unreliable:
    """An API whose next calls fail, before they take effect or after."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.fails_before = self.fails_after = 0
        self.useless: list[Object] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._world.cluster, name)
        if name == "walk":
            return method

        async def call(*args: Any, **named: Any) -> Any:
            if self.fails_before:
                self.fails_before -= 1
                raise ClusterError("the API server does not answer")
            before = await self._versions() if name == "patch" else None
            answer = await method(*args, **named)
            if name == "patch" and answer is not None and before == await self._versions():
                self.useless.append(args[2])
            if self.fails_after:
                self.fails_after -= 1
                raise ClusterError("the answer was lost")
            return answer

        return call

    async def _versions(self) -> list[str]:
        found = [obj for kind in (FINE_TUNE_JOB, JOB, POD) for obj in await self._world.cluster.list(kind, None, {})]
        return [obj["metadata"]["resourceVersion"] for obj in found]


class Life(RuleBasedStateMachine):
    """One job's life in a cluster."""

    queued = False
    distributed: Object = {}

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world = World(admit=admit_all)
        self.kueue = Kueue(self.world.cluster)
        self.api = Unreliable(self.world)
        self.before: Object = {}
        self.restart_operator()
        spec: Object = {"resources": {"nodes": NODES}, "runPolicy": POLICY, "distributed": self.distributed}
        if self.queued:
            spec["scheduling"] = {"queue": "team"}
        self.do(self.world.create(**spec))

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        try:
            self.check_that_it_converges()
        finally:
            self.loop.close()

    # --- what the operator and the cluster do ---

    @rule()
    def restart_operator(self) -> None:
        self.world.engine = self.world.operator(self.api)  # type: ignore[arg-type]

    @rule()
    def reconcile(self) -> None:
        try:
            self.do(self.world.pass_once())
        except ClusterError:
            return

    @rule()
    def sync_jobs(self) -> None:
        self.do(self.world.node.jobs.sync())

    @rule()
    def sync_nodes(self) -> None:
        self.do(self.world.node.kubelet.sync())

    @rule()
    def sync_queue(self) -> None:
        self.do(self.kueue.sync())

    @rule(seconds=st.sampled_from([1, 7, 31, 160, 700]))
    def time_passes(self, seconds: int) -> None:
        self.world.clock.forward(seconds)

    @rule()
    def settle(self) -> None:
        for _ in range(20):
            self.reconcile()
            self.do(self.kueue.sync())
            self.do(self.world.node.settle())

    @rule(before=st.integers(0, 2), after=st.integers(0, 1))
    def api_fails(self, before: int, after: int) -> None:
        self.api.fails_before, self.api.fails_after = before, after

    # --- what happens to the job ---

    @rule(value=st.booleans())
    def suspend(self, value: bool) -> None:
        self.do(self.world.set_suspend(value))

    @rule(rank=st.integers(0, NODES - 1), code=st.sampled_from(sorted(CODES)))
    def a_trainer_ends(self, rank: int, code: int) -> None:
        for pod in self.pods(rank):
            message = json.dumps({"exitCode": code, **CODES[code]}) if code < 128 else ""
            self.world.node.runtime.end(pod["metadata"]["name"], code, message)

    @rule()
    def all_trainers_succeed(self) -> None:
        for pod in self.pods():
            self.world.node.runtime.end(pod["metadata"]["name"], 0, json.dumps(RESULT))

    @rule(rank=st.integers(0, NODES - 1))
    def a_pod_is_deleted(self, rank: int) -> None:
        for pod in self.pods(rank):
            self.do(self.world.cluster.delete(POD, Key("ml", pod["metadata"]["name"]), pod["metadata"]["uid"]))

    @rule(rank=st.integers(0, NODES - 1))
    def a_node_is_lost(self, rank: int) -> None:
        for pod in self.pods(rank):
            self.world.node.runtime.lost.add(pod["metadata"]["name"])
        self.a_pod_is_deleted(rank)

    @rule()
    def somebody_deletes_the_workload(self) -> None:
        for job in self.do(self.world.cluster.list(JOB, None, {})):
            self.do(self.world.cluster.delete(JOB, KEY, job["metadata"]["uid"]))

    @precondition(lambda self: self.queued and self.kueue.room)
    @rule()
    def the_queue_takes_it_back(self) -> None:
        for job in self.do(self.world.cluster.list(JOB, None, {})):
            self.do(self.kueue.preempt(job, "Preempted"))

    @rule()
    def there_is_room_in_the_queue(self) -> None:
        self.kueue.room = 1

    @rule(step=st.integers(0, 40))
    def it_makes_progress(self, step: int) -> None:
        attempt = self.status().get("attempt", 1)
        self.world.progress = Progress(attempt=attempt, stage=Stage.TRAINING, step=step, total_steps=40)

    # --- what must hold ---

    def status(self) -> Object:
        found: Object = self.do(self.world.status())
        return found

    def pods(self, rank: int | None = None) -> list[Object]:
        return [pod for pod in self.do(self.world.pods()) if rank in (None, index(pod))]

    @invariant()
    def there_is_one_job_and_one_live_pod_of_each_index(self) -> None:
        assert len(self.do(self.world.cluster.list(JOB, None, {}))) <= 1
        live = [index(pod) for pod in self.pods() if is_live(pod)]
        assert len(live) == len(set(live)), live

    @invariant()
    def counters_never_fall(self) -> None:
        old, new = self.before, self.status()
        for name, value in (old.get("restarts") or {}).items():
            assert new["restarts"][name] >= value
        for name in ("attempt", "activeSeconds"):
            assert new.get(name, 0) >= old.get(name, 0)

    @invariant()
    def the_end_is_the_end(self) -> None:
        old, new = self.before, self.status()
        if old.get("phase") in TERMINAL:
            assert new == old
        elif new.get("phase") in TERMINAL:
            assert self.pods() == []
        self.before = new

    @invariant()
    def nothing_is_written_without_a_difference(self) -> None:
        assert self.api.useless == []

    def check_that_it_converges(self) -> None:
        """When nothing happens any more, the job comes to where its spec and its budget say it must."""
        self.api.fails_before = self.api.fails_after = 0
        self.kueue.room = 1
        for _ in range(8):
            self.settle()
            self.world.clock.forward(700)
        self.settle()
        status, suspended = self.status(), self.do(self.world.cluster.read(FINE_TUNE_JOB, KEY))["spec"].get("suspend")
        assert status["phase"] in (*TERMINAL, "Suspended" if suspended else "Running"), status
        self.counters_never_fall()
        self.the_end_is_the_end()


class QueuedLife(Life):
    """The same in a queue."""

    queued = True


class ElasticLife(Life):
    """The same with room for some of its pods at a time; they go on with fewer."""

    distributed = {"minNodes": 1, "minNodesAfterSeconds": 60}

    @rule(room=st.sampled_from([None, 0, 1]))
    def there_is_room_for(self, room: int | None) -> None:
        self.world.node.kubelet.room = room

    def check_that_it_converges(self) -> None:
        self.world.node.kubelet.room = None
        super().check_that_it_converges()


def run(machine: type[Life], examples: int = EXAMPLES, derandomize: bool = True) -> None:
    """Ten thousand steps are `run(Life, 333, derandomize=False)`."""
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=checks,
            derandomize=derandomize,
        ),
    )


def test_a_job_survives_whatever_happens() -> None:
    run(Life)


def test_a_job_in_a_queue_survives_whatever_happens() -> None:
    run(QueuedLife)


def test_an_elastic_job_survives_whatever_happens() -> None:
    run(ElasticLife)
