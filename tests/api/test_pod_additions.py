"""What a job may add to its pods never meets what the operator puts there itself."""

from __future__ import annotations

import re

import pytest

from finetune_api.job import FineTuneJob
from finetune_api.pod import RESERVED_PATHS, RESERVED_VARIABLES, RESERVED_VOLUMES
from finetune_operator.plan import plan
from finetune_operator.settings import Settings
from finetune_operator.validation import admit, validate
from tests.api.jobs import REMOVED, changed, full
from tests.api.sensible import Object


@pytest.fixture(scope="module")
def pod() -> Object:
    """The pod of a job that uses all there is but adds nothing."""
    job = changed(full(), {"spec.podTemplate": REMOVED, "spec.output.uri": "pvc://claim/out"})
    stored = FineTuneJob.from_wire({**admit(job), "metadata": {"name": "everything", "uid": "uid-1"}})
    template: Object = plan(stored, Settings(trainer_image="trainer:1")).workload["spec"]["template"]
    return template


def test_the_operators_variables_cannot_be_set(pod: Object) -> None:
    # Those of a network's preset can: who knows the network better may say so.
    preset = ("NCCL_", "GLOO_", "FI_")
    names = [item["name"] for item in pod["spec"]["containers"][0]["env"] if not item["name"].startswith(preset)]
    assert len(names) > 10
    assert [name for name in names if not re.search(RESERVED_VARIABLES, name)] == []


def test_a_variable_of_the_job_stands_in_for_that_of_its_networks_preset() -> None:
    network = {"preset": "Sockets", "interface": "eth7"}
    resources = {"spec.resources.nodes": 2, "spec.resources.network": network}
    own = [{"name": "NCCL_SOCKET_IFNAME", "value": "bond"}]
    job = changed(full(), {"spec.podTemplate": {"env": own}, **resources})
    stored = FineTuneJob.from_wire({**admit(job), "metadata": {"name": "everything", "uid": "uid-1"}})
    (container,) = plan(stored, Settings(trainer_image="trainer:1")).workload["spec"]["template"]["spec"]["containers"]
    found = [(item["name"], item["value"]) for item in container["env"] if item["name"].endswith("_IFNAME")]
    assert sorted(found) == [("GLOO_SOCKET_IFNAME", "eth7"), ("NCCL_SOCKET_IFNAME", "bond")]


def test_the_operators_volumes_and_paths_cannot_be_taken(pod: Object) -> None:
    volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
    paths = [mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]]
    assert {"scratch", "ca-bundle", "claim-0"} <= set(volumes)
    assert [name for name in volumes if not re.search(RESERVED_VOLUMES, name)] == []
    assert [path for path in paths if not re.search(RESERVED_PATHS, path)] == []


@pytest.mark.parametrize("kind", ["labels", "annotations"])
def test_the_operators_labels_and_annotations_cannot_be_set(pod: Object, kind: str) -> None:
    for key in pod["metadata"][kind]:
        found = validate(changed(full(), {f"spec.podTemplate.{kind}": {key: "mine"}}))
        assert [problem.path for problem in found] == [f"spec.podTemplate.{kind}"], key


def test_what_is_added_reaches_the_pod() -> None:
    stored = FineTuneJob.from_wire({**admit(full()), "metadata": {"name": "everything", "uid": "uid-1"}})
    template = plan(stored, Settings(trainer_image="trainer:1")).workload["spec"]["template"]
    container = template["spec"]["containers"][0]
    assert template["metadata"]["labels"]["team"] == "nlp"
    assert {"name": "NCCL_DEBUG", "value": "WARN"} in container["env"]
    assert {"name": "cache", "emptyDir": {"sizeLimit": "1Gi"}} in template["spec"]["volumes"]
    assert {"name": "cache", "mountPath": "/cache"} in container["volumeMounts"]
    assert {"key": "spot", "operator": "Exists", "effect": "NoSchedule"} in template["spec"]["tolerations"]
    assert container["resources"]["requests"]["cpu"] == "4"
