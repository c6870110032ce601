"""How long a gang stands still when its pods are lost one after the other, over what a start takes anyway."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from statistics import median

import pytest

from tests.e2e.cluster import Object, apply, items, kubectl
from tests.e2e.conftest import ClusterS3
from tests.e2e.test_gang_pods import bucket, gang, installed
from tests.e2e.test_install import Installed

__all__ = ["bucket", "installed"]
INCIDENTS, STEP_SECONDS = 10, 240
MOST_SECONDS = 10.0
"""Over the floor: from the start of a pod's container to its first step."""
pytestmark = pytest.mark.timeout(INCIDENTS * STEP_SECONDS)


def pods_of(namespace: str, name: str, attempt: int) -> list[Object]:
    """Those that run, lowest index first."""
    found = items("pod", "-n", namespace, "-l", f"finetune.dev/job={name},finetune.dev/component=trainer")
    running = [pod for pod in found if pod["status"]["phase"] == "Running"]
    mine = [pod for pod in running if pod["metadata"]["annotations"]["finetune.dev/attempt"] == str(attempt)]
    return sorted(mine, key=lambda pod: str(pod["metadata"]["name"]))


def first_step(namespace: str, name: str, attempt: int) -> tuple[datetime, float]:
    """When this attempt made its first step, by its pod's log, and the seconds since its last container had started."""
    until = time.monotonic() + STEP_SECONDS
    while time.monotonic() < until:
        pods = pods_of(namespace, name, attempt)
        if not pods:
            continue
        log = kubectl("-n", namespace, "logs", pods[0]["metadata"]["name"], "--timestamps")
        line = next((line for line in log.splitlines() if " step " in line), None)
        if line is not None:
            at = datetime.fromisoformat(line.split()[0])
            starts = [pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] for pod in pods]
            return at, (at - max(map(datetime.fromisoformat, starts))).total_seconds()
    raise AssertionError(f"attempt {attempt} of {name} made no step within {STEP_SECONDS} s")


def test_ten_lost_pods_cost_ten_times_the_same(
    installed: Installed, cluster_s3: ClusterS3, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wire = gang(installed.jobs, bucket, cluster_s3.endpoint, 2, "lossy")
    wire["spec"]["hyperparameters"] |= {"epochs": 1000, "maxSteps": 14_000, "loggingSteps": 1}
    wire["spec"]["runPolicy"] = {"preflight": "Never"}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bucket-keys", "namespace": installed.jobs}}
    apply({**secret, "stringData": cluster_s3.keys}, wire)
    floors, delays = [first_step(installed.jobs, "lossy", 1)[1]], []
    for incident in range(INCIDENTS):
        pod = pods_of(installed.jobs, "lossy", incident + 1)[incident % 2]["metadata"]["name"]
        lost = datetime.now(UTC)
        kubectl("-n", installed.jobs, "delete", "pod", pod, "--grace-period=0", "--force")
        at, floor = first_step(installed.jobs, "lossy", incident + 2)
        floors.append(floor)
        delays.append((at - lost).total_seconds())
    kubectl("-n", installed.jobs, "delete", "ftj", "lossy", "--wait=true")
    over = [delay - median(floors) for delay in delays]
    with capsys.disabled():
        print(f"\nfloor {median(floors):.1f} s; over it: {', '.join(f'{seconds:.1f}' for seconds in over)} s")
    assert median(over) <= MOST_SECONDS
    assert median(over[-3:]) <= median(over[:3]) + MOST_SECONDS / 2
