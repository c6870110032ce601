"""Jobs that name other jobs, on a real API server under the chart's own Role; the test plays the kubelet."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from finetune_operator.cluster.port import Object
from tests.e2e.cluster import apply, get, items, kubectl, kubectl_program, status_of
from tests.e2e.operating import Operator, eventually, live_pod, play_kubelet, reaches, tune

PHASES = ("Blocked", "Starting", "Running", "Succeeded")


def model(namespace: str, name: str, **spec: Any) -> Object:
    """A job that delivers a whole model."""
    return tune(namespace, name, strategy={"type": "Full"}, **spec)


def delivered(name: str) -> str:
    output = {"uri": f"s3://out/{name}/model", "kind": "model"}
    return json.dumps({"exitCode": 0, "warnings": ["3 rows were cut"], "result": {
        "job": name, "output": output, "steps": 9,
    }})  # fmt: skip


async def runs(namespace: str, name: str) -> str:
    """The pod of a job, which runs from now on."""
    pod = await live_pod(namespace, name, 1)
    play_kubelet(namespace, pod, None)
    await reaches(namespace, name, "Running")
    return pod


def events(namespace: str, name: str) -> dict[str, str]:
    mine = (event for event in items("events", "-n", namespace) if event["involvedObject"]["name"] == name)
    return {event["reason"]: event["message"] for event in mine}


def watching(namespace: str) -> subprocess.Popen[str]:
    command = [kubectl_program(), "-n", namespace, "get", "ftj", "-w", "--no-headers"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def watched(watch: subprocess.Popen[str]) -> list[tuple[str, str]]:
    """Names and phases in the order in which kubectl has shown them, those that were shown again left out."""
    watch.terminate()
    rows = [line.split() for line in watch.communicate()[0].splitlines()]
    return list(dict.fromkeys((row[0], row[2]) for row in rows if len(row) > 2))


async def test_a_chain_of_three_runs_link_by_link_and_kubectl_tells_the_truth(
    operator: Operator, namespace: str
) -> None:
    watch = watching(namespace)
    # The last one first: whoever is named may come later.
    apply(tune(namespace, "policy", model={"uri": "job://reward"}))
    await reaches(namespace, "policy", "Blocked", reason="ReferencedJobMissing")
    apply(
        model(namespace, "reward", model={"uri": "job://sft"}),
        model(namespace, "sft"),
    )
    first = await runs(namespace, "sft")
    waiting = await reaches(namespace, "reward", "Blocked", reason="WaitingForJob")
    assert waiting["message"] == "Waiting for job sft (spec.model.uri), which is Running"
    await reaches(namespace, "policy", "Blocked", reason="WaitingForJob")
    assert items("jobs", "-n", namespace, "-l", "finetune.dev/job=reward") == []

    play_kubelet(namespace, first, 0, delivered("sft"))
    second = await runs(namespace, "reward")
    assert status_of(namespace, "reward")["references"] == {"spec.model.uri": "s3://out/sft/model"}
    job_json = json.loads(get("configmap", "reward-job", namespace)["data"]["job.json"])
    assert job_json["spec"]["model"]["uri"] == "s3://out/sft/model"
    assert status_of(namespace, "policy")["phase"] == "Blocked"
    play_kubelet(namespace, second, 0, delivered("reward"))
    third = await runs(namespace, "policy")
    play_kubelet(namespace, third, 0, delivered("policy"))
    done = await reaches(namespace, "policy", "Succeeded")
    assert done["warnings"] == ["3 rows were cut"]
    told = events(namespace, "policy")
    assert told["ReferencedJobMissing"].startswith("spec.model.uri: there is no FineTuneJob reward")
    assert told["TrainerWarning"] == "3 rows were cut"

    shown = watched(watch)
    assert [phase for name, phase in shown if name == "policy" and phase in PHASES] == list(PHASES)
    links = [shown.index((name, "Succeeded")) for name in ("sft", "reward")]
    assert links[0] < shown.index(("reward", "Running")) < links[1] < shown.index(("policy", "Running"))


async def test_a_job_whose_forerunner_failed_waits_for_another_one_of_that_name(
    operator: Operator, namespace: str
) -> None:
    apply(model(namespace, "broken"), tune(namespace, "heir", model={"uri": "job://broken"}))
    pod = await runs(namespace, "broken")
    play_kubelet(namespace, pod, 65, json.dumps({"exitCode": 65, "message": "s3://d/a.jsonl line 3 is cut"}))
    held = await reaches(namespace, "heir", "Blocked", reason="ReferencedJobFailed")
    assert held["message"] == (
        "spec.model.uri: job broken has failed (s3://d/a.jsonl line 3 is cut); delete it and create it anew"
    )
    kubectl("-n", namespace, "delete", "ftj", "broken", "--wait=true")
    await reaches(namespace, "heir", "Blocked", reason="ReferencedJobMissing")
    apply(model(namespace, "broken"))
    play_kubelet(namespace, await runs(namespace, "broken"), 0, delivered("broken"))
    await reaches(namespace, "heir", "Starting", attempt=1)
    # Without an operator a namespace with a Job that runs could not be deleted.
    kubectl("-n", namespace, "delete", "ftj", "heir")


async def test_an_operator_that_comes_later_finds_who_waits(
    operator: Operator, namespace: str, kubeconfig: Path
) -> None:
    apply(model(namespace, "early"), tune(namespace, "late", model={"uri": "job://early"}))
    pod = await runs(namespace, "early")
    await reaches(namespace, "late", "Blocked", reason="WaitingForJob")
    operator.stop(kill=True)
    play_kubelet(namespace, pod, 0, delivered("early"))
    second = Operator(namespace, kubeconfig)
    try:
        await reaches(namespace, "late", "Starting", attempt=1)
        kubectl("-n", namespace, "delete", "ftj", "late")
    finally:
        second.stop()


async def test_a_circle_is_named(operator: Operator, namespace: str) -> None:
    names = ("round-a", "round-b", "round-c")
    for name, following in zip(names, (*names[1:], names[0]), strict=True):
        apply(model(namespace, name, model={"uri": f"job://{following}"}))

    def all_told() -> bool:
        return all(status_of(namespace, name)["reason"] == "CircularReference" for name in names)

    await eventually(all_told)
    assert "round-b -> round-c -> round-a -> round-b" in status_of(namespace, "round-b")["message"]
