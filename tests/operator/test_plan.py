"""What a job becomes: one default job written out, then a sentence for each option."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from finetune_operator.cluster.port import Object
from finetune_operator.plan import plan
from finetune_operator.plan.volumes import quantity_bytes, shared_memory
from finetune_operator.settings import Settings
from tests.operator.world import typed

METADATA = """
namespace: ml
labels:
  app.kubernetes.io/name: finetune-trainer
  app.kubernetes.io/instance: tune
  app.kubernetes.io/component: trainer
  app.kubernetes.io/managed-by: finetune-operator
  finetune.dev/job: tune
  finetune.dev/component: trainer
ownerReferences:
- apiVersion: finetune.dev/v1alpha1
  kind: FineTuneJob
  name: tune
  uid: uid-of-tune
  controller: true
"""
SERVICE = """
clusterIP: None
publishNotReadyAddresses: true
selector: {finetune.dev/job: tune, finetune.dev/component: trainer}
ports:
- {name: rendezvous, port: 29500, targetPort: 29500, protocol: TCP}
- {name: progress, port: 8090, targetPort: 8090, protocol: TCP}
"""
JOB = """
completionMode: Indexed
completions: 1
parallelism: 1
suspend: false
backoffLimitPerIndex: 2147483647
podReplacementPolicy: Failed
podFailurePolicy:
  rules:
  - action: Ignore
    onPodConditions: [{type: DisruptionTarget, status: "True"}]
  - action: FailJob
    onExitCodes: {containerName: trainer, operator: In, values: [64, 65, 77, 80]}
"""
POD = """
restartPolicy: Never
terminationGracePeriodSeconds: 120
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
tolerations:
- {key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 30}
- {key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 30}
volumes:
- {name: job, configMap: {name: tune-job, items: [{key: job.json, path: job.json}]}}
- {name: scratch, emptyDir: {sizeLimit: 50Gi}}
- {name: tmp, emptyDir: {sizeLimit: 1Gi}}
- {name: shm, emptyDir: {medium: Memory, sizeLimit: 1024Mi}}
"""
TRAINER = """
name: trainer
image: registry/trainer:1
imagePullPolicy: IfNotPresent
command: [python, -m, finetune_trainer.launch]
ports: [{name: progress, containerPort: 8090, protocol: TCP}]
resources:
  requests: {cpu: "2", memory: 8Gi}
  limits: {memory: 8Gi}
volumeMounts:
- {name: job, mountPath: /etc/finetune, readOnly: true}
- {name: scratch, mountPath: /scratch}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
terminationMessagePath: /dev/termination-log
terminationMessagePolicy: FallbackToLogsOnError
"""
ENVIRONMENT = {
    "FINETUNE_ATTEMPT": "field metadata.annotations['finetune.dev/attempt']",
    "FINETUNE_POD_NAME": "field metadata.name",
    "FINETUNE_POD_IP": "field status.podIP",
    "FINETUNE_GRACE_PERIOD_SECONDS": "120",
    "PET_NNODES": "field metadata.annotations['finetune.dev/nodes']",
    "PET_NPROC_PER_NODE": "1",
    "PET_NODE_RANK": "field metadata.annotations['batch.kubernetes.io/job-completion-index']",
    "PET_MASTER_PORT": "29500",
    "AWS_REGION": "us-east-1",
    "FINETUNE_S3_PATH_STYLE": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HOME": "/tmp",
    "USER": "trainer",
    "XDG_CACHE_HOME": "/scratch/.cache",
    "HF_HOME": "/scratch/.cache/huggingface",
    "TORCHINDUCTOR_CACHE_DIR": "/scratch/.cache/inductor",
    "TRITON_CACHE_DIR": "/scratch/.cache/triton",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
SETTINGS = Settings(trainer_image="registry/trainer:1")


def job_of(**spec: Any) -> Object:
    return plan(typed(**spec), SETTINGS).workload


def pod_of(**spec: Any) -> Object:
    template: Object = job_of(**spec)["spec"]["template"]
    return template


def trainer_of(**spec: Any) -> Object:
    trainer: Object = pod_of(**spec)["spec"]["containers"][0]
    return trainer


def environment(trainer: Object) -> dict[str, str]:
    """Name -> value, or in words where it comes from."""

    def told(item: Object) -> str:
        if "value" in item:
            return str(item["value"])
        source = item["valueFrom"]
        if "fieldRef" in source:
            return f"field {source['fieldRef']['fieldPath']}"
        reference = source["secretKeyRef"]
        return f"secret {reference['name']}" + (" optional" if reference.get("optional") else "")

    return {item["name"]: told(item) for item in trainer["env"]}


# --- the default job -------------------------------------------------------------------------------------------------


def test_the_default_job_is_exactly_this() -> None:
    manifests = plan(typed(), SETTINGS)
    common, trainer = yaml.safe_load(METADATA), yaml.safe_load(TRAINER)
    assert manifests.service is None
    trainer["env"] = manifests.workload["spec"]["template"]["spec"]["containers"][0]["env"]
    assert environment(trainer) == ENVIRONMENT
    template = {
        "metadata": {
            "labels": common["labels"],
            "annotations": {"finetune.dev/attempt": "1", "finetune.dev/nodes": "1"},
        },
        "spec": {**yaml.safe_load(POD), "containers": [trainer]},
    }
    assert manifests.workload == {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "tune", **common},
        "spec": {**yaml.safe_load(JOB), "template": template},
    }  # fmt: skip
    assert {**manifests.config_map, "data": None} == {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "tune-job", **common},
        "data": None,
    }  # fmt: skip


def test_job_json_holds_the_resolved_spec_and_the_identity_but_nothing_that_changes() -> None:
    document = json.loads(plan(typed(), SETTINGS).config_map["data"]["job.json"])
    assert document["metadata"] == {"name": "tune", "namespace": "ml", "uid": "uid-of-tune"}
    assert document["spec"]["hyperparameters"]["learningRate"] == 2e-4
    assert document["spec"]["strategy"]["lora"]["rank"] == 16
    assert "status" not in document
    assert "suspend" not in document["spec"]


def test_the_same_job_gives_the_same_manifests_byte_by_byte() -> None:
    first, second = (json.dumps([*plan(typed(), SETTINGS).all()]) for _ in range(2))
    assert first == second


# --- options ---------------------------------------------------------------------------------------------------------


def test_an_attempt_is_an_annotation_of_the_template() -> None:
    workload = plan(typed(), SETTINGS, attempt=4).workload
    assert workload["spec"]["template"]["metadata"]["annotations"]["finetune.dev/attempt"] == "4"


def test_several_nodes_are_one_indexed_job_whose_first_pod_is_the_master() -> None:
    job = job_of(resources={"nodes": 4, "gpusPerNode": 8})
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (4, 4)
    assert job["spec"]["template"]["metadata"]["annotations"]["finetune.dev/nodes"] == "4"
    env = environment(job["spec"]["template"]["spec"]["containers"][0])
    assert (env["PET_NNODES"], env["PET_NPROC_PER_NODE"]) == (ENVIRONMENT["PET_NNODES"], "8")
    assert env["PET_MASTER_ADDR"] == "tune-0.tune.ml.svc.cluster.local"


def test_several_pods_find_each_other_by_a_headless_service_and_one_alone_needs_none() -> None:
    manifests = plan(typed(resources={"nodes": 2}), SETTINGS)
    common, pod = yaml.safe_load(METADATA), manifests.workload["spec"]["template"]["spec"]
    assert manifests.service == {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "tune", **common}, "spec": yaml.safe_load(SERVICE),
    }  # fmt: skip
    assert pod["subdomain"] == manifests.service["metadata"]["name"]
    assert [item["kind"] for item in plan(typed(), SETTINGS).all()] == ["ConfigMap", "Job"]


def test_gpus_are_requested_and_limited_alike_and_their_taint_is_tolerated() -> None:
    pod = pod_of(resources={"gpusPerNode": 1, "gpuProduct": "NVIDIA-A100-SXM4-80GB", "memory": "64Gi", "cpu": "8"})
    assert pod["spec"]["containers"][0]["resources"] == {
        "requests": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "1"},
        "limits": {"memory": "64Gi", "nvidia.com/gpu": "1"},
    }
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["spec"]["tolerations"]
    assert pod["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}


def test_s3_settings_go_in_by_environment_and_keys_by_reference_only() -> None:
    s3 = {"endpoint": "https://minio:9000", "region": "eu-1", "secretName": "keys", "caBundleConfigMap": "ca"}
    pod = pod_of(storage={"s3": s3})
    env = environment(pod["spec"]["containers"][0])
    assert env["AWS_ENDPOINT_URL_S3"] == "https://minio:9000"
    assert (env["AWS_REGION"], env["FINETUNE_S3_PATH_STYLE"]) == ("eu-1", "true")
    assert (env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"]) == ("secret keys", "secret keys")
    assert env["AWS_SESSION_TOKEN"] == "secret keys optional"
    assert env["AWS_CA_BUNDLE"] == "/etc/finetune-ca/ca.crt"
    assert pod["spec"]["volumes"][-1] == {
        "name": "ca-bundle", "configMap": {"name": "ca", "items": [{"key": "ca.crt", "path": "ca.crt"}]},
    }  # fmt: skip


def test_path_style_can_be_refused_although_there_is_an_endpoint() -> None:
    env = environment(trainer_of(storage={"s3": {"endpoint": "https://s3.example", "pathStyle": False}}))
    assert env["FINETUNE_S3_PATH_STYLE"] == "false"


def test_a_claim_is_mounted_once_and_writable_only_where_the_output_goes() -> None:
    pod = pod_of(
        model={"uri": "pvc://models/llama"}, dataset={"uri": "pvc://models/data.jsonl"}, output={"uri": "pvc://out/run"}
    )
    assert pod["spec"]["volumes"][-2:] == [
        {"name": "claim-0", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
        {"name": "claim-1", "persistentVolumeClaim": {"claimName": "out"}},
    ]
    assert pod["spec"]["containers"][0]["volumeMounts"][-2:] == [
        {"name": "claim-0", "mountPath": "/volumes/models", "readOnly": True},
        {"name": "claim-1", "mountPath": "/volumes/out"},
    ]


def test_the_claim_with_another_runs_angles_is_mounted_too() -> None:
    select = {"angle": {"from": "pvc://probes/report/angles.json", "topK": 2}}
    pod = pod_of(strategy={"type": "Partial", "select": select})
    assert pod["spec"]["volumes"][-1]["persistentVolumeClaim"] == {"claimName": "probes", "readOnly": True}


def test_a_hub_is_reached_by_the_trainer_alone_with_a_token_from_the_jobs_secret() -> None:
    trainer = trainer_of(
        model={"uri": "hf://org/name", "hub": {"endpoint": "https://mirror.example.com", "secretName": "hub"}}
    )
    env = environment(trainer)
    # The trainer brings a hub's files itself, and no library asks one behind its back.
    assert (env["HF_HUB_OFFLINE"], env["HF_ENDPOINT"]) == ("1", "https://mirror.example.com")
    token = next(item for item in trainer["env"] if item["name"] == "HF_TOKEN")
    assert token["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}
    assert not {"HF_TOKEN", "HF_ENDPOINT"} & environment(trainer_of(model={"uri": "hf://org/name"})).keys()


@pytest.mark.parametrize(
    ("cache", "source"),
    [
        ({"pvc": "models"}, {"persistentVolumeClaim": {"claimName": "models"}}),
        (
            {"hostPath": "/var/cache/finetune"},
            {"hostPath": {"path": "/var/cache/finetune", "type": "DirectoryOrCreate"}},
        ),
    ],
)
def test_a_model_cache_is_mounted_to_be_written(cache: dict[str, str], source: Object) -> None:
    pod = pod_of(model={"uri": "s3://models/smol", "cache": cache})
    assert pod["spec"]["volumes"][-1] == {"name": "model-cache", **source}
    trainer = pod["spec"]["containers"][0]
    assert trainer["volumeMounts"][-1] == {"name": "model-cache", "mountPath": "/model-cache"}
    assert environment(trainer)["FINETUNE_MODEL_CACHE"] == "/model-cache"


def test_additions_to_the_pod_come_in_and_cannot_take_the_products_settings_away() -> None:
    pod = pod_of(podTemplate={
        "labels": {"team": "nlp", "finetune.dev/job": "other"},
        "annotations": {"note": "x", "finetune.dev/attempt": "9", "finetune.dev/nodes": "9"},
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "PET_NNODES", "value": "7"}],
        "volumes": [{"name": "extra", "emptyDir": {}}],
        "volumeMounts": [{"name": "extra", "mountPath": "/extra"}],
        "imagePullSecrets": ["registry"],
    })  # fmt: skip
    assert (pod["metadata"]["labels"]["team"], pod["metadata"]["labels"]["finetune.dev/job"]) == ("nlp", "tune")
    assert pod["metadata"]["annotations"] == {"note": "x", "finetune.dev/attempt": "1", "finetune.dev/nodes": "1"}
    trainer = pod["spec"]["containers"][0]
    env = environment(trainer)
    assert (env["NCCL_DEBUG"], env["PET_NNODES"]) == ("INFO", ENVIRONMENT["PET_NNODES"])
    assert len(env) == len(trainer["env"])
    assert pod["spec"]["volumes"][-1]["name"] == trainer["volumeMounts"][-1]["name"] == "extra"
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]


def test_scheduling_is_handed_to_the_pods() -> None:
    affinity = {"podAntiAffinity": {}, "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}
    pod = pod_of(
        scheduling={
            "priorityClassName": "high", "schedulerName": "volcano", "nodeSelector": {"pool": "a"},
            "tolerations": [{"key": "spot", "operator": "Exists"}], "affinity": affinity,
        },
        storage={"serviceAccountName": "trainer-role"},
    )["spec"]  # fmt: skip
    assert (pod["priorityClassName"], pod["schedulerName"], pod["nodeSelector"]) == ("high", "volcano", {"pool": "a"})
    assert pod["tolerations"][-1] == {"key": "spot", "operator": "Exists"}
    assert (pod["affinity"], pod["serviceAccountName"]) == (affinity, "trainer-role")
    assert pod["automountServiceAccountToken"] is False


def test_a_queue_is_named_on_the_job_which_is_created_suspended_and_nobody_else_runs_it() -> None:
    job = plan(typed(scheduling={"queue": "team", "managedBy": "kueue.x-k8s.io/multikueue"}), Settings()).workload
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert (job["spec"]["suspend"], job["spec"]["managedBy"]) == (True, "kueue.x-k8s.io/multikueue")
    plain = plan(typed(), Settings()).workload
    assert "kueue.x-k8s.io/queue-name" not in plain["metadata"]["labels"]
    assert (plain["spec"]["suspend"], "managedBy" in plain["spec"]) == (False, False)


def test_the_grace_period_reaches_both_the_pod_and_the_trainer() -> None:
    pod = pod_of(runPolicy={"terminationGracePeriodSeconds": 600})
    assert pod["spec"]["terminationGracePeriodSeconds"] == 600
    assert environment(pod["spec"]["containers"][0])["FINETUNE_GRACE_PERIOD_SECONDS"] == "600"


def test_the_administrator_sets_image_pull_policy_and_cluster_domain() -> None:
    settings = Settings(trainer_image="mirror/t:2", image_pull_policy="Never", cluster_domain="corp.example")
    trainer = plan(typed(resources={"nodes": 2}), settings).workload["spec"]["template"]["spec"]["containers"][0]
    assert (trainer["image"], trainer["imagePullPolicy"]) == ("mirror/t:2", "Never")
    assert environment(trainer)["PET_MASTER_ADDR"] == "tune-0.tune.ml.svc.corp.example"


@pytest.mark.parametrize(
    ("resources", "size"),
    [({"memory": "8Gi"}, "1024Mi"), ({"memory": "100M"}, "64Mi"), ({"memory": "8Gi", "sharedMemory": "3Gi"}, "3Gi")],
)
def test_shared_memory_is_an_eighth_of_memory_unless_it_is_set(resources: dict[str, str], size: str) -> None:
    assert shared_memory(typed(resources=resources).spec.resources) == size


@pytest.mark.parametrize(("text", "number"), [("8Gi", 8 * 2**30), ("1.5G", 1.5e9), ("500m", 0.5), ("12", 12)])
def test_quantities_are_read_as_kubernetes_reads_them(text: str, number: float) -> None:
    assert quantity_bytes(text) == pytest.approx(number)


def test_a_longest_name_leaves_every_child_a_valid_dns_label() -> None:
    job = typed(resources={"nodes": 2})
    job.metadata.name = "a" * 45
    manifests = plan(job, SETTINGS)
    for manifest in manifests.all():
        # What is added to a name where it becomes a pod's; the check has one alone.
        suffix = "-0-xxxxx" if manifest is manifests.preflight else "-999-xxxxx"
        assert len(manifest["metadata"]["name"]) <= 63 - len(suffix)


# --- where, as whom, and after what ----------------------------------------------------------------------------------


def test_pods_of_one_topology_domain_are_near_their_own_job_alone() -> None:
    pod = pod_of(resources={"nodes": 2}, scheduling={"topologyKey": "topology.kubernetes.io/zone"})
    (term,) = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "topology.kubernetes.io/zone"
    wanted = term["labelSelector"]["matchLabels"]
    assert wanted == {"finetune.dev/job": "tune", "finetune.dev/component": "trainer"}
    # Else the first pod, which has nobody to be near to, would find no node.
    assert wanted.items() <= pod["metadata"]["labels"].items()


def test_a_topology_domain_comes_beside_the_jobs_own_affinity() -> None:
    cache = {"labelSelector": {"matchLabels": {"app": "cache"}}, "topologyKey": "kubernetes.io/hostname"}
    own = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [cache]}, "nodeAffinity": {}}
    scheduling = {"topologyKey": "rack", "affinity": own}
    found = pod_of(resources={"nodes": 2}, scheduling=scheduling)["spec"]["affinity"]
    terms = found["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert [term["topologyKey"] for term in terms] == ["kubernetes.io/hostname", "rack"]
    assert "nodeAffinity" in found


def test_pods_run_as_whom_the_job_says_and_stay_restricted() -> None:
    own = {"runAsUser": 1000, "fsGroup": 2000, "supplementalGroups": [3000]}
    plain = pod_of()["spec"]["securityContext"]
    assert pod_of(podTemplate={"securityContext": own})["spec"]["securityContext"] == {**plain, **own}
    assert (plain["runAsNonRoot"], plain["seccompProfile"]) == (True, {"type": "RuntimeDefault"})


def test_init_containers_are_handed_on_and_restricted() -> None:
    fetch = {"name": "fetch", "image": "fetcher:1", "resources": {"limits": {"memory": "1Gi"}}}
    (found,) = pod_of(podTemplate={"initContainers": [fetch]})["spec"]["initContainers"]
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert found == {**fetch, "securityContext": security}
