"""The CRD on a real API server: it is taken, its defaults and columns are right, and every refusal has our words.

Needs KUBECONFIG with permission to apply CRDs and to make a namespace; no pods run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config
from kubernetes.client import ApiException

from finetune_api.pairs import ALLOWED
from finetune_api.strategy import StrategyType
from finetune_api.task import TaskType
from finetune_operator.cluster.port import FINE_TUNE_JOB
from finetune_operator.validation import admit, validate, validate_update
from tests.api.changes import CHANGES, Change
from tests.api.jobs import FULLS, changed, job_of, minimal
from tests.api.refusals import BY_BOUND, REFUSALS, Refusal
from tests.api.sensible import Object
from tests.e2e.cluster import fresh_namespace, install_crd, kubectl

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("**/*.yaml"))
NAMES = {"group": "finetune.dev", "version": "v1alpha1", "plural": FINE_TUNE_JOB.plural}


class Jobs:
    """FineTuneJobs of one namespace, by a client that wants its fields known, as kubectl does."""

    def __init__(self, namespace: str) -> None:
        config.load_kube_config()
        self.namespace = namespace
        self._api = client.CustomObjectsApi()
        self._stored: dict[str, Object] = {}

    def create(self, job: Object, dry_run: bool = True) -> Object:
        """The object as stored, or as it would be."""
        body = changed(job, {"metadata.namespace": self.namespace})
        more: dict[str, Any] = {"dry_run": "All"} if dry_run else {}
        found: Object = self._api.create_namespaced_custom_object(
            **NAMES, namespace=self.namespace, body=body, field_validation="Strict", **more
        )
        return found

    def stored(self, job: Object) -> Object:
        """A job like this that is really there, under a name of its own."""
        key = json.dumps(job, sort_keys=True)
        if key not in self._stored:
            name = f"stored-{len(self._stored)}"
            self._stored[key] = self.create(changed(job, {"metadata.name": name}), dry_run=False)
        return self._stored[key]

    def replace(self, stored: Object, job: Object) -> Object:
        """What would become of a stored job."""
        known = {name: stored["metadata"][name] for name in ("name", "namespace", "resourceVersion")}
        found: Object = self._api.replace_namespaced_custom_object(
            **NAMES,
            namespace=self.namespace,
            name=known["name"],
            body={**job, "metadata": known},
            field_validation="Strict",
            dry_run="All",
        )
        return found

    def set_status(self, name: str, status: Object) -> None:
        self._api.patch_namespaced_custom_object_status(
            **NAMES, namespace=self.namespace, name=name, body={"status": status}
        )


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    install_crd()
    with fresh_namespace("api") as namespace:
        yield Jobs(namespace)


def words(error: ApiException) -> set[str]:
    """What the API server says of each field, in lines such as ours."""
    answer = json.loads(error.body)
    assert error.status == 422, answer["message"]
    found = {f"{cause['field']}: {cause['message']}" for cause in answer["details"]["causes"]}
    # It adds remarks without a field, on what it did not check and on a type that it has named already.
    return {line for line in found if not line.startswith("<nil>: ")}


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_the_api_server_refuses_in_our_words(jobs: Jobs, refusal: Refusal) -> None:
    with pytest.raises(ApiException) as caught:
        jobs.create(refusal.job)
    assert words(caught.value) == {refusal.says}
    assert {str(problem) for problem in validate(refusal.job)} == {refusal.says}


@pytest.mark.parametrize("refusal", BY_BOUND, ids=lambda refusal: refusal.name)
def test_the_api_server_speaks_of_bounds_as_we_do(jobs: Jobs, refusal: Refusal) -> None:
    with pytest.raises(ApiException) as caught:
        jobs.create(refusal.job)
    said = words(caught.value)
    assert refusal.says in said
    assert said == {str(problem) for problem in validate(refusal.job)}


@pytest.mark.parametrize(("strategy", "task"), ALLOWED)
def test_every_pair_that_works_is_taken_with_the_same_defaults(
    jobs: Jobs, strategy: StrategyType, task: TaskType
) -> None:
    job = job_of(strategy, task)
    assert jobs.create(job)["spec"] == admit(job)["spec"]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_the_api_server_judges_changes_as_we_do(jobs: Jobs, change: Change) -> None:
    stored = jobs.stored(change.before)
    found: set[str] = set()
    try:
        jobs.replace(stored, change.after)
    except ApiException as error:
        found = words(error)
    assert found == {str(problem) for problem in validate_update(change.before, change.after)}
    assert bool(found) == change.refused


@pytest.mark.parametrize("job", [minimal(), *FULLS.values()], ids=["minimal", *FULLS])
def test_defaults_are_the_same_here_and_there(jobs: Jobs, job: Object) -> None:
    assert jobs.create(job)["spec"] == admit(job)["spec"]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_is_taken_by_kubectl(jobs: Jobs, file: Path) -> None:
    kubectl("-n", jobs.namespace, "apply", "--dry-run=server", "-f", str(file))


def test_an_unknown_field_is_refused_by_kubectl(jobs: Jobs) -> None:
    misspelt = changed(minimal(), {"spec.hyperparameters.epoch": 3, "metadata.namespace": jobs.namespace})
    with pytest.raises(AssertionError, match=r'strict decoding error: unknown field "spec.hyperparameters.epoch"'):
        kubectl("create", "--dry-run=server", "-f", "-", stdin=misspelt)
    said = [str(problem) for problem in validate(misspelt)]
    assert said == ['unknown field "spec.hyperparameters.epoch"; did you mean epochs?']


def test_kubectl_explains_fields(jobs: Jobs) -> None:
    text = kubectl("explain", "finetunejob.spec.strategy")
    assert "Which parameters learn, and what is delivered." in text
    assert "Options of LoRA and QLoRA" in text
    assert "For people and kubectl: 120/1000." in kubectl("explain", "ftj.status.progress.steps")


def test_kubectl_shows_the_columns(jobs: Jobs) -> None:
    jobs.create(minimal(), dry_run=False)
    jobs.set_status("small", STATUS)
    wide = _row(kubectl("-n", jobs.namespace, "get", "ftj", "small", "-o", "wide"))
    shown = _row(kubectl("-n", jobs.namespace, "get", "finetune", "small"))
    assert list(shown) == ["NAME", "STRATEGY", "PHASE", "STEP", "LOSS", "ETA", "RESTARTS", "AGE"]
    assert list(wide) == [*shown, "TASK", "NODES", "GPUS", "MODEL", "CHECKPOINT", "REASON"]
    assert wide | {"AGE": ""} == {
        **{"NAME": "small", "STRATEGY": "LoRA", "PHASE": "Running", "STEP": "120/1000", "LOSS": "1.234"},
        **{"ETA": "1h23m", "RESTARTS": "2", "AGE": "", "TASK": "Instruction", "NODES": "1", "GPUS": "0"},
        **{"MODEL": "s3://models/base", "CHECKPOINT": "100", "REASON": "Training"},
    }


STATUS = {
    "phase": "Running",
    "reason": "Training",
    "progress": {
        "stage": "Training",
        "step": 120,
        "totalSteps": 1000,
        "steps": "120/1000",
        "loss": "1.234",
        "eta": "1h23m",
    },
    "checkpoint": {"uri": "s3://models/out/checkpoints/step-00000100", "step": 100, "time": "2026-01-01T00:00:00Z"},
    "restarts": {"total": 2},
}


def _row(table: str) -> dict[str, str]:
    """The only row of a table of kubectl, by its head."""
    head, row = table.splitlines()
    return dict(zip(head.split(), row.split(), strict=True))
