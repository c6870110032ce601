"""Nodes that are lost with pods of a job on them: one falls silent, one is deleted, and one that was real stops.

The first two exist in the API alone, and the test plays their kubelets; what comes after the loss, the node and pod
controllers of the cluster do, and the job trains to its end on nodes that are real. The third takes two commands, by
variables, which get the node's name as NODE:

E2E_NODE_DOWN   takes a node away at once, with what jobs run on it; on a cluster's only node the operator must live on
E2E_NODE_UP     brings it back
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.e2e.bucket import Bucket
from tests.e2e.cluster import Object, get, items, status_of
from tests.e2e.operating import play_kubelet
from tests.e2e.paper import PaperNode, paper_node
from tests.e2e.training import (
    CHECKPOINT_STEPS,
    READY_SECONDS,
    TRAINED_SECONDS,
    Installed,
    assert_same_weights,
    first_step,
    gang,
    long_job,
    pods_of,
    start,
    succeed,
    trains_beyond,
    until,
)

GRACE_SECONDS = 30
COMMANDS = ("E2E_NODE_DOWN", "E2E_NODE_UP")
pytestmark = pytest.mark.timeout(2 * TRAINED_SECONDS + READY_SECONDS)


@dataclass(frozen=True)
class Lost:
    """A gang of two, one pod of which was on a node that is no more."""

    name: str
    node: str
    pods: frozenset[str]
    """UIDs of both."""


def drawn(installed: Installed, bucket: Bucket, name: str, node: PaperNode) -> Object:
    """A gang of two that would both like to be on the node, which has room for one."""
    wire = gang(installed.jobs, name, bucket, 2)
    wire["spec"]["scheduling"] = {"tolerations": [node.toleration], "affinity": {"nodeAffinity": node.preference}}
    wire["spec"]["runPolicy"] = {"preflight": "Never", "terminationGracePeriodSeconds": GRACE_SECONDS}
    return wire


def run_on_paper(installed: Installed, name: str, node: PaperNode) -> Lost:
    """Wait until one of the pods is on the node and the other one elsewhere, and say that both run."""

    def placed() -> list[Object] | None:
        pods = pods_of(installed.jobs, name)
        here = [pod for pod in pods if pod["spec"].get("nodeName") == node.name]
        there = [pod for pod in pods if pod["status"]["phase"] == "Running"]
        return pods if (len(pods), len(here), len(there)) == (2, 1, 1) else None

    pods = until(placed)
    (mine,) = [pod["metadata"]["name"] for pod in pods if pod["spec"]["nodeName"] == node.name]
    play_kubelet(installed.jobs, mine, None)
    until(lambda: status_of(installed.jobs, name)["phase"] == "Running")
    return Lost(name, node.name, frozenset(pod["metadata"]["uid"] for pod in pods))


@pytest.fixture(scope="module")
def lost(installed: Installed, bucket: Bucket) -> Iterator[dict[str, Lost]]:
    """Jobs by what has happened to their nodes, at the same moment."""
    with paper_node() as silent, paper_node() as deleted:
        nodes = {"silent": silent, "deleted": deleted}
        start(bucket, *(drawn(installed, bucket, name, node) for name, node in nodes.items()))
        found = {name: run_on_paper(installed, name, node) for name, node in nodes.items()}
        silent.fall_silent()
        deleted.delete()
        yield found


@pytest.mark.parametrize("name", ["silent", "deleted"])
def test_a_gang_whose_node_is_gone_is_counted_once_and_trains_elsewhere(
    installed: Installed, bucket: Bucket, lost: dict[str, Lost], name: str
) -> None:
    status = succeed(installed.jobs, name)
    assert (status["attempt"], status["restarts"]["total"], status["restarts"]["disruption"]) == (2, 1, 1)
    pods = pods_of(installed.jobs, name)
    assert len(pods) == 2
    assert not lost[name].pods & {pod["metadata"]["uid"] for pod in pods}
    assert lost[name].node not in {pod["spec"]["nodeName"] for pod in pods}
    assert bucket.json(f"{name}/result.json")["worldSize"] == 2
    restarts = [event for event in events(installed.jobs, name) if event["reason"] == "Restarting"]
    assert [event.get("count", 1) for event in restarts] == [1]


def events(namespace: str, name: str) -> list[Object]:
    return [event for event in items("events", "-n", namespace) if event["involvedObject"]["name"] == name]


def run_command(variable: str, node: str) -> None:
    subprocess.run(["sh", "-c", os.environ[variable]], env={**os.environ, "NODE": node}, check=True, timeout=120)


def is_ready(node: str) -> bool:
    conditions = get("node", node, "default")["status"]["conditions"]
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


@pytest.mark.skipif(
    not all(os.environ.get(name) for name in COMMANDS),
    reason=f"takes a real node away: set {' and '.join(COMMANDS)} to commands that stop and start $NODE",
)
def test_a_job_goes_on_after_its_node_has_stopped(installed: Installed, bucket: Bucket) -> None:
    """Another node stays ready, on paper if need be: where all are lost at once, Kubernetes takes itself for cut off
    and evicts nothing."""
    start(bucket, long_job(installed.jobs, "undisturbed", bucket))
    succeed(installed.jobs, "undisturbed")
    start(bucket, long_job(installed.jobs, "stopped", bucket, GRACE_SECONDS))
    before = trains_beyond(bucket, installed.jobs, "stopped", CHECKPOINT_STEPS)
    (pod,) = pods_of(installed.jobs, "stopped")
    node = pod["spec"]["nodeName"]
    with paper_node():
        run_command("E2E_NODE_DOWN", node)
        try:
            until(lambda: not is_ready(node))
            until(lambda: status_of(installed.jobs, "stopped")["attempt"] == 2)
            assert pod["metadata"]["uid"] not in {
                item["metadata"]["uid"] for item in pods_of(installed.jobs, "stopped")
            }
        finally:
            run_command("E2E_NODE_UP", node)
        until(lambda: is_ready(node))
        status = succeed(installed.jobs, "stopped")
    assert (status["attempt"], status["restarts"]["total"], status["restarts"]["disruption"]) == (2, 1, 1)
    (last,) = pods_of(installed.jobs, "stopped")
    assert first_step(installed.jobs, last) > before
    assert_same_weights(bucket, "stopped", "undisturbed")
