"""Where and under which rules a job runs: resources, distribution, storage, scheduling, policy, pod additions."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

from pydantic import Field

from finetune_api.common import Message, cel, not_yet, only, rules

QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"
Label = Annotated[str, Field(max_length=253)]
ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]


class Resources(Message):
    """What each pod gets; one pod is one node's share of the job."""

    nodes: int = Field(
        1,
        ge=1,
        le=1024,
        description="Number of pods.",
        json_schema_extra=rules(cel("self == 1", "more than one node is not supported yet; set resources.nodes to 1")),
    )
    gpus_per_node: int = Field(
        0,
        ge=0,
        le=64,
        description="GPUs of a pod, one process each; 0: one process on the CPU.",
        json_schema_extra=rules(
            cel("self <= 1", "more than one GPU is not supported yet; set resources.gpusPerNode to 0 or 1")
        ),
    )
    gpu_resource: str = Field("nvidia.com/gpu", max_length=253, description="Name of the GPUs' extended resource.")
    gpu_product: str | None = Field(
        None, max_length=63, description="Only nodes whose label nvidia.com/gpu.product has this value."
    )
    cpu: str = Field("2", pattern=QUANTITY, max_length=32, description="CPU request of a pod.")
    memory: str = Field("8Gi", pattern=QUANTITY, max_length=32, description="Memory request and limit of a pod.")
    scratch: str = Field(
        "50Gi",
        pattern=QUANTITY,
        max_length=32,
        description="Size limit of the pod's scratch volume: downloads and staging.",
    )
    shared_memory: str = Field(
        "auto",
        max_length=32,
        pattern=r"^(auto|[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?)$",
        description="Size of /dev/shm, counted against memory. auto: an eighth of memory.",
    )
    network: dict[str, Any] | None = Field(
        None, description="Network presets.", json_schema_extra=not_yet("resources.network", "remove it")
    )


class Sharding(str, Enum):
    AUTO = "Auto"
    DDP = "DDP"
    FSDP = "FSDP"


class Distributed(Message):
    """How the work is spread over processes."""

    sharding: Annotated[Sharding, Field(json_schema_extra=only(["Auto", "DDP"], "sharding"))] = Field(
        Sharding.AUTO, description="Auto picks from the memory estimate."
    )
    min_nodes: int | None = Field(None, ge=1, le=1024, json_schema_extra=not_yet("distributed.minNodes", "remove it"))


class S3Spec(Message):
    """The S3 service behind all s3:// URIs of the job."""

    endpoint: str | None = Field(
        None, pattern=r"^https?://.+$", max_length=512, description="Absent: AWS, or what `finetune run` starts itself."
    )
    region: str = Field("us-east-1", max_length=64)
    path_style: bool | None = Field(
        None, description="Bucket in the path instead of the host name. Absent: true where an endpoint is set."
    )
    ca_bundle_config_map: ObjectName | None = Field(
        None, description="ConfigMap whose key ca.crt holds the endpoint's certificate authority."
    )
    secret_name: ObjectName | None = Field(
        None,
        description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_SESSION_TOKEN. Absent: "
        "the service account's cloud role.",
    )


class StorageSpec(Message):
    """Access to models, data and output."""

    s3: S3Spec = S3Spec()
    service_account_name: ObjectName | None = Field(
        None, description="Service account whose cloud role (IRSA, workload identity) may read and write the buckets."
    )


class Scheduling(Message):
    """Where the pods may run, and in which order."""

    queue: str | None = Field(
        None,
        max_length=63,
        description="Kueue's LocalQueue.",
        json_schema_extra=not_yet("scheduling.queue", "remove it"),
    )
    priority_class_name: ObjectName | None = None
    scheduler_name: ObjectName | None = None
    node_selector: dict[str, Label] = Field({}, max_length=32)
    tolerations: list[dict[str, Any]] = Field([], max_length=32, description="As in a pod.")
    affinity: dict[str, Any] | None = Field(None, description="As in a pod.")
    topology_key: str | None = Field(
        None,
        max_length=253,
        description="Keep all pods in one domain of this node label.",
        json_schema_extra=not_yet("scheduling.topologyKey", "set scheduling.affinity"),
    )


class Retries(Message):
    """How often a job is started again, by what ended it. Disruptions (preemption, eviction, node loss) are free."""

    infrastructure: int = Field(3, ge=0, le=1000, description="Storage, network, hardware.")
    application: int = Field(0, ge=0, le=1000, description="Unexpected errors of the program.")
    out_of_memory: int = Field(0, ge=0, le=1000, description="GPU or host memory exhausted.")


class RunPolicy(Message):
    """When a job is stopped, started again and cleaned up; can be changed at any time."""

    active_deadline_seconds: int | None = Field(
        None, ge=1, json_schema_extra=not_yet("runPolicy.activeDeadlineSeconds", "set hyperparameters.maxSteps")
    )
    start_deadline_seconds: int | None = Field(
        None, ge=1, json_schema_extra=not_yet("runPolicy.startDeadlineSeconds", "remove it")
    )
    stall_timeout_seconds: int | None = Field(
        None, ge=1, json_schema_extra=not_yet("runPolicy.stallTimeoutSeconds", "remove it")
    )
    ttl_seconds_after_finished: int | None = Field(
        None, ge=0, json_schema_extra=not_yet("runPolicy.ttlSecondsAfterFinished", "delete the job yourself")
    )
    termination_grace_period_seconds: int = Field(
        120, ge=30, le=3600, description="Time between the request to stop and the kill: a checkpoint must fit into it."
    )
    retries: Retries = Retries()


class Tracking(Message):
    """Experiment trackers."""

    tensorboard: bool = False
    wandb: dict[str, Any] | None = None
    mlflow: dict[str, Any] | None = None


class EnvVar(Message):
    """An environment variable with a plain value."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)
    value: str = Field("", max_length=4096)


class PodTemplate(Message):
    """Additions to the pods; the product's own settings cannot be taken away."""

    labels: dict[str, Label] = Field({}, max_length=32)
    annotations: dict[str, Annotated[str, Field(max_length=4096)]] = Field({}, max_length=32)
    env: list[EnvVar] = Field([], max_length=64, description="Added to the trainer; names of the contract win.")
    volumes: list[dict[str, Any]] = Field([], max_length=16, description="As in a pod.")
    volume_mounts: list[dict[str, Any]] = Field([], max_length=16, description="As in a container.")
    image_pull_secrets: list[ObjectName] = Field([], max_length=8)
    security_context: dict[str, Any] | None = Field(
        None, json_schema_extra=not_yet("podTemplate.securityContext", "remove it")
    )
    init_containers: list[dict[str, Any]] | None = Field(
        None, max_length=8, json_schema_extra=not_yet("podTemplate.initContainers", "remove it")
    )
