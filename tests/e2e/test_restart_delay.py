"""How long a gang stands still when its pods are lost one after the other, over what a start takes anyway."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from statistics import median

import pytest

from tests.e2e.bucket import Bucket
from tests.e2e.cluster import Object, kubectl
from tests.e2e.training import Installed, gang, pods_of, start

INCIDENTS, STEP_SECONDS = 10, 240
MOST_SECONDS = 10.0
"""Over the floor: from the start of a pod's container to its first step."""
pytestmark = pytest.mark.timeout(INCIDENTS * STEP_SECONDS)


def running(namespace: str, name: str, attempt: int) -> list[Object]:
    """Pods of this attempt that run, lowest index first."""
    found = [pod for pod in pods_of(namespace, name) if pod["status"]["phase"] == "Running"]
    return [pod for pod in found if pod["metadata"]["annotations"]["finetune.dev/attempt"] == str(attempt)]


def first_step(namespace: str, name: str, attempt: int) -> tuple[datetime, float]:
    """When this attempt made its first step, by its pod's log, and the seconds since its last container had started."""
    until = time.monotonic() + STEP_SECONDS
    while time.monotonic() < until:
        pods = running(namespace, name, attempt)
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
    installed: Installed, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    wire = gang(installed.jobs, "lossy", bucket, 2)
    wire["spec"]["hyperparameters"] |= {"epochs": 1000, "maxSteps": 14_000, "loggingSteps": 1}
    wire["spec"]["checkpoint"] = {"everySteps": 40}
    wire["spec"]["runPolicy"] = {"preflight": "Never"}
    start(bucket, wire)
    floors, delays = [first_step(installed.jobs, "lossy", 1)[1]], []
    for incident in range(INCIDENTS):
        pod = running(installed.jobs, "lossy", incident + 1)[incident % 2]["metadata"]["name"]
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
