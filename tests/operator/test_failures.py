"""Evidence of pods -> cause, message and advice: each row is a sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api.contract import Cause
from finetune_operator.cluster.port import Object
from finetune_operator.failures import classify, classify_pod, obstacle, termination_message


def pod(
    code: int | None = None,
    *,
    name: str = "tune-0-abcde",
    reason: str = "Error",
    message: str = "",
    disrupted: str = "",
    deleted: bool = False,
    **status: Any,
) -> Object:
    """A pod whose trainer ended with code; None: it has not ended."""
    state = (
        {"running": {}} if code is None else {"terminated": {"exitCode": code, "reason": reason, "message": message}}
    )
    sidecar = {"name": "istio-proxy", "state": {"terminated": {"exitCode": 1}}}
    conditions = [{"type": "DisruptionTarget", "status": "True", "message": disrupted}] if disrupted else []
    metadata = {
        "name": name,
        "uid": f"uid-{name}",
        **({"deletionTimestamp": "2026-01-01T00:00:00Z"} if deleted else {}),
    }
    return {
        "metadata": metadata,
        "spec": {"nodeName": "gpu-7"},
        "status": {
            "phase": "Running" if code is None else ("Failed" if code else "Succeeded"),
            "containerStatuses": [sidecar, {"name": "trainer", "state": state}],
            "conditions": conditions,
            **status,
        },
    }


def said(code: int, message: str, advice: str = "") -> str:
    return json.dumps({"exitCode": code, "message": message, "advice": advice})


LOG = "Traceback (most recent call last):\n  File x\nImportError: no module named torch\n"
CASES: dict[str, tuple[Object, Cause, str]] = {
    "a spec that cannot work is told in the trainer's words": (
        pod(64, message=said(64, "targetModules matches nothing")), Cause.USAGE, "targetModules matches nothing",
    ),
    "a code without a message takes the last line of the log": (
        pod(70, message=LOG), Cause.APPLICATION, "exit code 70: ImportError: no module named torch",
    ),
    "a message cut off in the middle is not shown": (
        pod(65, message='{"exitCode": 65, "mess'), Cause.DATA, "The trainer ended with exit code 65",
    ),
    "refused credentials are a matter of permission": (pod(77), Cause.PERMISSION, "exit code 77"),
    "divergence is told": (pod(80), Cause.DIVERGED, "exit code 80"),
    "unreachable storage is infrastructure": (
        pod(69, message=said(69, "s3://b: timed out")), Cause.INFRASTRUCTURE, "s3://b: timed out",
    ),
    "GPU memory is charged to memory": (pod(79, message=said(79, "CUDA out of memory")), Cause.OUT_OF_MEMORY, "CUDA"),
    "the kernel's kill is host memory": (pod(137, reason="OOMKilled"), Cause.OUT_OF_MEMORY, "host memory"),
    "a kill from outside without that reason is infrastructure": (pod(137), Cause.INFRASTRUCTURE, "SIGKILL"),
    "a crash of the process is its own": (pod(139), Cause.APPLICATION, "SIGSEGV"),
    "an unknown code is the program's": (pod(1, message="SyntaxError: x"), Cause.APPLICATION, "code 1: SyntaxError"),
    "a stop that nobody asked the operator for is a disruption": (pod(75), Cause.DISRUPTION, "asked to stop"),
    "a deleted pod is a disruption before it has ended": (pod(deleted=True), Cause.DISRUPTION, "it was deleted"),
    "a preempted pod is a disruption, on a node with a name": (
        pod(143, disrupted="preempted by a pod of higher priority"), Cause.DISRUPTION,
        "on node gpu-7 was stopped from outside: preempted",
    ),
    "what breaks while a node goes down is the node's": (
        pod(70, disrupted="node is shutting down"), Cause.DISRUPTION, "node is shutting down",
    ),
    "bad data stays bad data on a node that goes down": (pod(65, disrupted="drain"), Cause.DATA, "exit code 65"),
    "a lost node is a disruption": (
        pod() | {"status": {"phase": "Failed", "reason": "NodeLost", "message": "node gpu-7 is gone"}},
        Cause.DISRUPTION, "node gpu-7 is gone",
    ),
    "a node that refuses the pod is infrastructure": (
        pod() | {"status": {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "no healthy GPU"}},
        Cause.INFRASTRUCTURE, "UnexpectedAdmissionError): no healthy GPU",
    ),
    "a container that the node cannot start is infrastructure": (
        pod(128, reason="StartError", message="nvidia: device error"), Cause.INFRASTRUCTURE, "device error",
    ),
    "a node under pressure is a disruption": (
        pod() | {"status": {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: x"}},
        Cause.DISRUPTION, "low on resource",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_pod(case: str) -> None:
    evidence, cause, words = CASES[case]
    failure = classify_pod(evidence)
    assert failure is not None
    assert failure.cause is cause
    assert words in failure.message


def test_a_pod_that_filled_its_scratch_is_told_which_field_to_raise_and_is_not_tried_again() -> None:
    text = 'Usage of EmptyDir volume "scratch" exceeds the limit "50Gi". '
    failure = classify_pod(pod() | {"status": {"phase": "Failed", "reason": "Evicted", "message": text}})
    assert failure is not None
    assert (failure.cause, failure.advice) == (Cause.USAGE, "raise resources.scratch")


@pytest.mark.parametrize("well", [pod(), pod(0), pod() | {"status": {"phase": "Pending"}}, pod() | {"status": {}}])
def test_a_pod_that_is_well_has_no_failure(well: Object) -> None:
    assert classify_pod(well) is None


def test_a_sidecars_exit_code_says_nothing_about_the_job() -> None:
    assert classify_pod(pod(0)) is None


def test_a_long_foreign_text_is_cut() -> None:
    failure = classify_pod(pod(1, message="x" * 4000))
    assert failure is not None
    assert len(failure.message) < 1100


def test_an_own_error_beats_a_signal_and_a_broken_collective_whatever_the_order() -> None:
    peer = pod(69, name="tune-0-a", message=said(69, "lost peer"))
    killed = pod(137, name="tune-1-b")
    culprit = pod(70, name="tune-2-c", message=said(70, "index out of range"))
    for pods in ([peer, killed, culprit], [culprit, killed, peer], [killed, culprit, peer]):
        failure = classify(pods)
        assert failure is not None
        assert (failure.cause, failure.pod, failure.message) == (Cause.APPLICATION, "tune-2-c", "index out of range")


def test_a_disrupted_pod_beats_the_peers_that_it_took_down() -> None:
    failure = classify(
        [pod(69, name="tune-0-a"), pod(75, name="tune-1-b", disrupted="preempted"), pod(69, name="tune-2-c")]
    )
    assert failure is not None
    assert (failure.cause, failure.pod) == (Cause.DISRUPTION, "tune-1-b")


def test_no_failure_among_healthy_pods() -> None:
    assert classify([pod(), pod(0, name="b")]) is None


def test_a_termination_message_of_a_newer_release_is_still_read() -> None:
    message = termination_message(pod(0, message='{"exitCode": 0, "somethingNew": {"a": 1}}'))
    assert message is not None
    assert message.exit_code == 0


# --- pods that do not start ------------------------------------------------------------------------------------------


def waiting(reason: str, message: str = "", container: str = "trainer") -> Object:
    statuses = [{"name": container, "state": {"waiting": {"reason": reason, "message": message}}}]
    return {"metadata": {"name": "tune-0-abcde"}, "status": {"phase": "Pending", "containerStatuses": statuses}}


def unscheduled(reason: str, message: str) -> Object:
    condition = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
    return {"metadata": {"name": "tune-0-abcde"}, "status": {"phase": "Pending", "conditions": [condition]}}


@pytest.mark.parametrize(
    ("reason", "help_"),
    [
        ("ImagePullBackOff", "imagePullSecrets"),
        ("ErrImagePull", "imagePullSecrets"),
        ("CreateContainerConfigError", "create the Secret"),
        ("CreateContainerError", "events"),
        ("InvalidImageName", "trainer image"),
    ],
)
def test_a_pod_that_cannot_start_says_why_and_what_helps(reason: str, help_: str) -> None:
    found = obstacle([waiting(reason, 'secret "keys" not found')])
    assert found is not None
    assert found.reason == reason
    assert 'Container trainer of pod tune-0-abcde cannot start: secret "keys" not found' in found.message
    assert help_ in found.message


def test_a_pod_that_is_about_to_start_is_no_obstacle() -> None:
    assert obstacle([waiting("ContainerCreating"), waiting("PodInitializing")]) is None


def test_unschedulable_pods_are_counted_and_the_schedulers_sentence_is_shown() -> None:
    found = obstacle(
        [unscheduled("Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."), waiting("")]
    )
    assert found is not None
    assert found.reason == "Unschedulable"
    assert found.message == "1 of 2 pods cannot be scheduled: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


def test_a_gated_pod_is_not_called_unschedulable() -> None:
    found = obstacle([unscheduled("SchedulingGated", "Scheduling is blocked due to non-empty scheduling gates")])
    assert found is not None
    assert found.reason == "SchedulingGated"


def test_an_init_container_that_fails_is_the_programs_error_and_named() -> None:
    trainer = {"name": "trainer", "state": {"waiting": {"reason": "PodInitializing"}}}
    ended = {"exitCode": 3, "reason": "Error", "message": "fetching\nno such file"}
    status = {
        "phase": "Failed",
        "initContainerStatuses": [
            {"name": "first", "state": {"terminated": {"exitCode": 0}}},
            {"name": "fetch", "state": {"terminated": ended}},
        ],
        "containerStatuses": [trainer],
    }
    found = classify([{"metadata": {"name": "tune-0-x", "uid": "1"}, "spec": {}, "status": status}])
    assert found is not None
    assert (found.cause, found.exit_code) == (Cause.APPLICATION, 3)
    assert found.message == "Init container fetch ended with exit code 3: no such file"
