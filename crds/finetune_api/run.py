"""Where and under which rules a job runs: resources, distribution, storage, scheduling, policy, pod additions."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

from pydantic import Field

from finetune_api.affinity import Affinity, Toleration
from finetune_api.common import As, Message, cel, form, ruled, rules
from finetune_api.names import LABEL_KEY, LABELS, LabelValue, ObjectName, Text
from finetune_api.network import EXTENDED_RESOURCE, Network
from finetune_api.pod import PodTemplate
from finetune_api.quantities import Quantity, quantity

__all__ = ["Distributed", "PodTemplate", "Preflight", "Resources", "RunPolicy", "Scheduling", "StorageSpec", "Tracking"]


class Resources(Message):
    """What each pod gets; one pod is one node's share of the job."""

    model_config = ruled(
        cel(
            "!has(self.gpuProduct) || self.gpusPerNode > 0",
            "resources.gpuProduct needs a GPU; set resources.gpusPerNode, or remove it",
            at=".gpuProduct",
        ),
        cel(
            "!has(self.network) || self.network.preset == 'None' || self.nodes > 1",
            "resources.network is about the way between nodes; set resources.nodes above 1, or remove it",
            at=".network",
        ),
        cel(
            "!has(self.network) || !(self.network.preset in ['InfiniBand', 'EFA']) || self.gpusPerNode > 0",
            "this network preset is for GPUs; set resources.gpusPerNode, or resources.network.preset to Sockets",
            at=".network.preset",
        ),
        cel(
            "!has(self.processesPerNode) || self.gpusPerNode == 0 || self.processesPerNode == self.gpusPerNode",
            "every GPU has one process; remove resources.processesPerNode, or set it to resources.gpusPerNode",
            at=".processesPerNode",
        ),
    )

    nodes: int = Field(1, ge=1, le=1024, description="Number of pods.")
    gpus_per_node: int = Field(0, ge=0, le=64, description="GPUs of a pod, one process each; 0: on the CPU.")
    processes_per_node: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Processes of a pod that train together. Absent: one for each GPU, one on the CPU.",
    )
    gpu_resource: str = Field(
        "nvidia.com/gpu",
        max_length=253,
        description="Name of the GPUs' extended resource.",
        json_schema_extra=rules(EXTENDED_RESOURCE),
    )
    gpu_product: str | None = Field(
        None,
        min_length=1,
        max_length=63,
        description="Only nodes whose label nvidia.com/gpu.product has this value.",
        json_schema_extra=rules(
            form("^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", "must be a label's value, such as NVIDIA-A100-SXM4-80GB")
        ),
    )
    cpu: Quantity = Field("2", description="CPU request of a pod.", json_schema_extra=quantity())
    memory: Quantity = Field("8Gi", description="Memory request and limit of a pod.", json_schema_extra=quantity())
    scratch: Quantity = Field(
        "50Gi",
        description="Size limit of the pod's scratch volume: downloads and staging.",
        json_schema_extra=quantity(),
    )
    shared_memory: Quantity = Field(
        "auto",
        description="Size of /dev/shm, counted against memory. auto: an eighth of memory.",
        json_schema_extra=quantity(also="auto"),
    )
    network: Network | None = Field(None, description="The fabric between the nodes; absent: preset None.")

    @property
    def processes(self) -> int:
        """Of each pod that train: processesPerNode, or what it means where it is absent."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def ranks(self) -> int:
        """All processes that train."""
        return self.nodes * self.processes


class Sharding(str, Enum):
    AUTO = "Auto"
    DDP = "DDP"
    FSDP = "FSDP"


class FsdpOptions(Message):
    """Options of FSDP; also of Auto, should it pick FSDP."""

    reshard_after_forward: bool = Field(
        True,
        description="Let go of a block's weights between its forward and its backward pass. false: hold them, which "
        "saves a third of the communication and costs the memory of the whole model's weights.",
    )
    cpu_offload: bool = Field(
        False, description="Keep shards and moments in host memory, and step there: much slower, for the last resort."
    )


class Distributed(Message):
    """How the work is spread over processes."""

    model_config = ruled(
        cel(
            "!has(self.fsdp) || self.sharding != 'DDP'",
            "distributed.fsdp belongs to FSDP; remove it, or set distributed.sharding to FSDP or Auto",
            at=".fsdp",
        ),
        cel(
            "!has(self.minNodesAfterSeconds) || has(self.minNodes)",
            "minNodesAfterSeconds is how long minNodes waits; set distributed.minNodes, or remove it",
            at=".minNodesAfterSeconds",
        ),
    )

    sharding: Sharding = Field(
        Sharding.AUTO,
        description="DDP: every process holds the whole model. FSDP: each holds a shard of weights, gradients and "
        "moments. Auto: DDP where that fits into the devices, else FSDP.",
    )
    fsdp: FsdpOptions | None = Field(None, description="Options of FSDP.")
    min_nodes: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Elastic runs: where not all of resources.nodes find room, go on with those that do, so many at "
        "least. A step learns from the same global batch: fewer pods take more turns. Every restart tries all again.",
    )
    min_nodes_after_seconds: int | None = Field(
        None,
        ge=10,
        le=600,
        description="How long pods may find no room before the job goes on with fewer; a cluster that adds nodes needs "
        "some minutes. Absent: 300.",
    )


class S3Spec(Message):
    """The S3 service behind all s3:// URIs of the job."""

    model_config = ruled(
        cel(
            "!has(self.caBundleConfigMap) || (has(self.endpoint) && self.endpoint.startsWith('https://'))",
            "caBundleConfigMap is for an endpoint of its own with https://; set endpoint, or remove it",
            at=".caBundleConfigMap",
        )
    )

    endpoint: str | None = Field(
        None,
        max_length=512,
        description="URL of the service. Absent: AWS, or what `finetune run` starts itself.",
        json_schema_extra=rules(form("^https?://[^/ ]+.*$", "must be a URL: http://host:port or https://host")),
    )
    region: str = Field("us-east-1", min_length=1, max_length=64, description="Region that requests are signed for.")
    path_style: bool | None = Field(
        None, description="Bucket in the path instead of the host name. Absent: true where an endpoint is set."
    )
    ca_bundle_config_map: ObjectName | None = Field(
        None, description="ConfigMap whose key ca.crt holds the endpoint's certificate authority."
    )
    secret_name: ObjectName | None = Field(
        None,
        description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_SESSION_TOKEN. "
        "Absent: the service account's cloud role.",
    )


class StorageSpec(Message):
    """Access to models, data and output."""

    s3: S3Spec = Field(S3Spec(), description="The S3 service behind all s3:// URIs of the job.")
    service_account_name: ObjectName | None = Field(
        None, description="Service account whose cloud role (IRSA, workload identity) may read and write the buckets."
    )


class Scheduling(Message):
    """Where the pods may run, and in which order."""

    queue: str | None = Field(
        None,
        max_length=63,
        description="Kueue's LocalQueue, which then says when the job starts, and may take it back.",
        json_schema_extra=rules(
            form("^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "must be the name of a LocalQueue in the job's namespace")
        ),
    )
    managed_by: Text | None = Field(
        None,
        description="managedBy of the Job: who runs it instead of the cluster's own Job controller, such as "
        "kueue.x-k8s.io/multikueue.",
        json_schema_extra=rules(
            form("^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-a-z0-9._/]+$", "must be a path with a domain: domain/name")
        ),
    )
    priority_class_name: ObjectName | None = Field(None, description="PriorityClass of the pods.")
    scheduler_name: ObjectName | None = Field(None, description="Scheduler of the pods; absent: the cluster's own.")
    node_selector: dict[str, LabelValue] = Field(
        {}, max_length=32, description="Only nodes with these labels.", json_schema_extra=rules(LABELS)
    )
    tolerations: list[Annotated[dict[str, Any], As(Toleration)]] = Field(
        [], max_length=32, description="Taints of nodes that the pods bear, as in a pod."
    )
    affinity: Annotated[dict[str, Any], As(Affinity)] | None = Field(
        None, description="Which nodes and neighbours, as in a pod."
    )
    topology_key: str | None = Field(
        None,
        max_length=253,
        description="Keep all pods in one domain of this node label, such as a zone; the first pod chooses it.",
        json_schema_extra=rules(
            form(LABEL_KEY, "must be the key of a node label, such as topology.kubernetes.io/zone")
        ),
    )


class Retries(Message):
    """How often a job is started again, by what ended it. Disruptions (preemption, eviction, node loss) are free."""

    infrastructure: int = Field(
        3, ge=0, le=1000, description="Storage, network, hardware; and standstills, which most often are one of these."
    )
    application: int = Field(0, ge=0, le=1000, description="Unexpected errors of the program.")
    out_of_memory: int = Field(0, ge=0, le=1000, description="GPU or host memory exhausted.")


class Preflight(str, Enum):
    AUTO = "Auto"
    ALWAYS = "Always"
    NEVER = "Never"


MAX_SECONDS = 10 * 366 * 24 * 3600


class RunPolicy(Message):
    """When a job is stopped, started again and cleaned up; all but the grace period can be changed at any time."""

    active_deadline_seconds: int | None = Field(
        None,
        ge=1,
        le=MAX_SECONDS,
        description="Time of running after which the job fails. status.activeSeconds counts it: over all attempts, "
        "without the time in which it waits, is suspended or starts.",
    )
    start_deadline_seconds: int | None = Field(
        None,
        ge=1,
        le=MAX_SECONDS,
        description="Time after which the job fails when its pods do not all run: for lack of nodes, images, volumes. "
        "It begins anew only when they did run, were suspended, or wait in a queue, which is not counted.",
    )
    stall_timeout_seconds: int = Field(
        1800,
        ge=1,
        le=604800,
        description="Time without progress (of any rank: a step, bytes, rows) after which the stacks of all threads "
        "are written down and the pods are started again, at the expense of retries.infrastructure.",
    )
    ttl_seconds_after_finished: int | None = Field(
        None,
        ge=0,
        le=MAX_SECONDS,
        description="Time after the end after which the FineTuneJob is deleted with all that belongs to it in the "
        "cluster; what it has written stays. Absent: never.",
    )
    termination_grace_period_seconds: int = Field(
        120, ge=30, le=3600, description="Time between the request to stop and the kill: a checkpoint must fit into it."
    )
    retries: Retries = Field(Retries(), description="How often a job is started again, by what ended it.")
    preflight: Preflight = Field(
        Preflight.AUTO,
        description="Check access, data, masks and memory in a small pod without a GPU before the job starts. Auto: "
        "where it has GPUs or several pods.",
    )


class Tracking(Message):
    """Experiment trackers."""

    tensorboard: bool = Field(False, description="Write TensorBoard files beside the report.")
    wandb: dict[str, Any] | None = Field(None, description="Weights & Biases.")
    mlflow: dict[str, Any] | None = Field(None, description="MLflow.")
