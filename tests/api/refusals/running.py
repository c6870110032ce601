"""Refused for where and how it runs."""

from __future__ import annotations

from tests.api.refusals.refusal import A_GPU, A_NAME, AN_AMOUNT, HYPER, LABELS, POD, Refusal

SHARDED = {"spec.distributed.sharding": "FSDP"}

BY_RULE = (
    Refusal(
        "a fabric for a single node",
        {"spec.resources.network": {"preset": "Sockets"}},
        "spec.resources.network: Forbidden: resources.network is about the way between nodes; set resources.nodes "
        "above 1, or remove it",
    ),
    Refusal(
        "an interface without a preset",
        {"spec.resources.network": {"interface": "eth0"}},
        "spec.resources.network.interface: Forbidden: interface is a part of a preset; set preset to Sockets, or "
        "remove interface",
    ),
    Refusal(
        "devices without a fabric",
        {"spec.resources.network": {"devices": 2}},
        "spec.resources.network.devices: Forbidden: devices is for the presets InfiniBand and EFA; remove it",
    ),
    Refusal(
        "a device's name without InfiniBand",
        {"spec.resources.network": {"resource": "rdma/ib"}},
        "spec.resources.network.resource: Forbidden: resource is for preset InfiniBand; remove it",
    ),
    Refusal(
        "InfiniBand without GPUs",
        {"spec.resources": {"nodes": 2, "network": {"preset": "InfiniBand"}}},
        "spec.resources.network.preset: Forbidden: this network preset is for GPUs; set resources.gpusPerNode, or "
        "resources.network.preset to Sockets",
    ),
    Refusal(
        "the daemon of another cloud",
        {"spec.resources": {"nodes": 2, "network": {"preset": "TCPX"}}},
        'spec.resources.network.preset: Invalid value: "TCPX": TCPX takes a daemon of Google\'s with privileges beside '
        "the trainer, which is not run; use Sockets",
    ),
    Refusal(
        "an interface that is none",
        {"spec.resources": {"nodes": 2, "network": {"preset": "Sockets", "interface": "eth 0"}}},
        'spec.resources.network.interface: Invalid value: "eth 0": must be the name of an interface, such as eth0',
    ),
    Refusal(
        "a GPU product without GPUs",
        {"spec.resources.gpuProduct": "NVIDIA-L4"},
        "spec.resources.gpuProduct: Forbidden: resources.gpuProduct needs a GPU; set resources.gpusPerNode, or remove "
        "it",
    ),
    Refusal(
        "a GPU product that is no label",
        {"spec.resources.gpuProduct": "NVIDIA L4", **A_GPU},
        'spec.resources.gpuProduct: Invalid value: "NVIDIA L4": must be a label\'s value, such as '
        "NVIDIA-A100-SXM4-80GB",
    ),
    Refusal(
        "two processes on one GPU",
        {"spec.resources.processesPerNode": 2, **A_GPU},
        "spec.resources.processesPerNode: Forbidden: every GPU has one process; remove resources.processesPerNode, or "
        "set it to resources.gpusPerNode",
    ),
    Refusal(
        "options of shards for replicas",
        {"spec.distributed": {"sharding": "DDP", "fsdp": {"reshardAfterForward": False}}},
        "spec.distributed.fsdp: Forbidden: distributed.fsdp belongs to FSDP; remove it, or set distributed.sharding to "
        "FSDP or Auto",
    ),
    Refusal(
        "offloading from no GPU",
        {"spec.distributed": {"fsdp": {"cpuOffload": True}}},
        "spec.distributed.fsdp.cpuOffload: Forbidden: cpuOffload keeps shards out of GPUs, and without GPUs they are "
        "in host memory anyway; remove it, or set resources.gpusPerNode",
    ),
    Refusal(
        "one pod that is to be kept together",
        {"spec.scheduling.topologyKey": "topology.kubernetes.io/zone"},
        "spec.scheduling.topologyKey: Forbidden: topologyKey keeps several pods together; set resources.nodes above 1, "
        "or remove it",
    ),
    Refusal(
        "a topology that is no label",
        {"spec.resources.nodes": 2, "spec.scheduling.topologyKey": "the zone"},
        'spec.scheduling.topologyKey: Invalid value: "the zone": must be the key of a node label, such as '
        "topology.kubernetes.io/zone",
    ),
    Refusal(
        "a second trainer",
        {f"{POD}.initContainers": [{"name": "trainer", "image": "a:1"}]},
        f'{POD}.initContainers[0].name: Invalid value: "trainer": this is the trainer\'s own name; choose another',
    ),
    Refusal(
        "a container's name that is none",
        {f"{POD}.initContainers": [{"name": "A", "image": "a:1"}]},
        f'{POD}.initContainers[0].name: Invalid value: "A": the name of a container has small letters, digits and '
        "'-' only",
    ),
    Refusal(
        "an init container's volume that is not there",
        {f"{POD}.initContainers": [{"name": "a", "image": "a:1", "volumeMounts": [{"name": "b", "mountPath": "/b"}]}]},
        f"{POD}: Invalid value: initContainers may only mount volumes of podTemplate.volumes; add the volume or remove "
        "the mount",
    ),
    Refusal(
        "an init container's variable with a hyphen",
        {f"{POD}.initContainers": [{"name": "a", "image": "a:1", "env": [{"name": "A-B"}]}]},
        f'{POD}.initContainers[0].env[0].name: Invalid value: "A-B": the name of a variable has letters, digits and '
        "'_' only",
    ),
    Refusal(
        "an init container's relative path",
        {
            f"{POD}.volumes": [{"name": "b", "emptyDir": {}}],
            f"{POD}.initContainers": [{"name": "a", "image": "a:1", "volumeMounts": [{"name": "b", "mountPath": "b"}]}],
        },
        f'{POD}.initContainers[0].volumeMounts[0].mountPath: Invalid value: "b": mountPath must be an absolute path '
        "without ':'",
    ),
    Refusal(
        "an elastic job without any play",
        {"spec.resources.nodes": 2, "spec.distributed": {"minNodes": 2}},
        "spec.distributed.minNodes: Forbidden: minNodes is a number of pods that is enough where resources.nodes find "
        "no room; set it below resources.nodes",
    ),
    Refusal(
        "pods that cannot share a step",
        {"spec.resources.nodes": 4, "spec.distributed": {"minNodes": 3}},
        "spec.distributed.minNodes: Forbidden: minNodes pods must be able to share a step's batches evenly; set it to "
        "a divisor of resources.nodes x hyperparameters.gradientAccumulationSteps",
    ),
    Refusal(
        "an elastic job in a queue",
        {"spec.resources.nodes": 4, "spec.distributed": {"minNodes": 2}, "spec.scheduling": {"queue": "team"}},
        "spec.distributed.minNodes: Forbidden: a queue or another controller gives a job room as a whole; remove "
        "minNodes, or scheduling.queue and scheduling.managedBy",
    ),
    Refusal(
        "patience of no elastic job",
        {"spec.distributed": {"minNodesAfterSeconds": 60}},
        "spec.distributed.minNodesAfterSeconds: Forbidden: minNodesAfterSeconds is how long minNodes waits; set "
        "distributed.minNodes, or remove it",
    ),
    Refusal(
        "single elements of shards",
        {
            "spec.strategy": {"type": "Partial", "select": {"layers": {"last": 1}, "fisher": {"fraction": 0.1}}},
            **SHARDED,
        },
        "spec.distributed.sharding: Forbidden: select.fisher picks single elements of tensors, and FSDP tears tensors "
        "apart; set sharding to DDP or Auto",
    ),
    Refusal(
        "moments in 8 bits in shards",
        {f"{HYPER}.optimizer": "adamw8bit", **SHARDED},
        "spec.distributed.sharding: Forbidden: the 8-bit optimizers and adafactor take tensors whole, and FSDP shards "
        "the moments anyway; set optimizer to adamw, or sharding to DDP",
    ),
    Refusal(
        "sums of rows and columns in shards",
        {f"{HYPER}.optimizer": "adafactor", **SHARDED},
        "spec.distributed.sharding: Forbidden: the 8-bit optimizers and adafactor take tensors whole, and FSDP shards "
        "the moments anyway; set optimizer to adamw, or sharding to DDP",
    ),
    Refusal(
        "compiled shards",
        {f"{HYPER}.torchCompile": True, **SHARDED},
        "spec.distributed.sharding: Forbidden: torchCompile is not supported with FSDP yet; remove it, or set sharding "
        "to DDP",
    ),
    Refusal(
        "a GPU resource without domain",
        {"spec.resources.gpuResource": "gpu"},
        'spec.resources.gpuResource: Invalid value: "gpu": must be an extended resource: domain/name',
    ),
    Refusal(
        "gigabytes as people say it",
        {"spec.resources.memory": "16GB"},
        f'spec.resources.memory: Invalid value: "16GB": {AN_AMOUNT}',
    ),
    Refusal(
        "a queue that is no name",
        {"spec.scheduling.queue": "Team A"},
        'spec.scheduling.queue: Invalid value: "Team A": must be the name of a LocalQueue in the job\'s namespace',
    ),
    Refusal(
        "a manager without domain",
        {"spec.scheduling.managedBy": "multikueue"},
        'spec.scheduling.managedBy: Invalid value: "multikueue": must be a path with a domain: domain/name',
    ),
    Refusal("no processor", {"spec.resources.cpu": 0}, f"spec.resources.cpu: Invalid value: 0: {AN_AMOUNT}"),
    Refusal(
        "shared memory by a word",
        {"spec.resources.sharedMemory": "half"},
        'spec.resources.sharedMemory: Invalid value: "half": must be auto or a quantity above 0, such as 2, 500m, 16Gi '
        "or "
        "1.5T",
    ),
    Refusal(
        "an endpoint without scheme",
        {"spec.storage.s3.endpoint": "minio:9000"},
        'spec.storage.s3.endpoint: Invalid value: "minio:9000": must be a URL: http://host:port or https://host',
    ),
    Refusal(
        "a CA for plain http",
        {"spec.storage.s3": {"endpoint": "http://minio:9000", "caBundleConfigMap": "ca"}},
        "spec.storage.s3.caBundleConfigMap: Forbidden: caBundleConfigMap is for an endpoint of its own with https://; "
        "set endpoint, or remove it",
    ),
    Refusal(
        "a CA for AWS",
        {"spec.storage.s3.caBundleConfigMap": "ca"},
        "spec.storage.s3.caBundleConfigMap: Forbidden: caBundleConfigMap is for an endpoint of its own with https://; "
        "set endpoint, or remove it",
    ),
    Refusal(
        "a secret with capitals",
        {"spec.storage.s3.secretName": "Keys"},
        f'spec.storage.s3.secretName: Invalid value: "Keys": {A_NAME}',
    ),
    Refusal(
        "a node label with a space",
        {"spec.scheduling.nodeSelector": {"zone": "a b"}},
        f"spec.scheduling.nodeSelector: Invalid value: {LABELS}",
    ),
    Refusal("a label without a key", {f"{POD}.labels": {"": "x"}}, f"{POD}.labels: Invalid value: {LABELS}"),
    Refusal(
        "labels of the operator",
        {f"{POD}.labels": {"finetune.dev/job": "other"}},
        f"{POD}.labels: Invalid value: labels under finetune.dev/, app.kubernetes.io/ and batch.kubernetes.io/ are set "
        "by the operator; choose other keys",
    ),
    Refusal(
        "an annotation with a bad key",
        {f"{POD}.annotations": {"a b": "x"}},
        f"{POD}.annotations: Invalid value: keys of annotations have letters, digits, '-', '_' and '.', after an "
        "optional prefix/",
    ),
    Refusal(
        "annotations of the operator",
        {f"{POD}.annotations": {"finetune.dev/attempt": "9"}},
        f"{POD}.annotations: Invalid value: annotations under finetune.dev/ are set by the operator; choose other keys",
    ),
    Refusal(
        "a variable with a hyphen",
        {f"{POD}.env": [{"name": "A-B"}]},
        f"{POD}.env[0].name: Invalid value: \"A-B\": the name of a variable has letters, digits and '_' only",
    ),
    Refusal(
        "a variable of the trainer",
        {f"{POD}.env": [{"name": "PET_NNODES", "value": "9"}]},
        f'{POD}.env[0].name: Invalid value: "PET_NNODES": this variable is set by the operator; remove it (S3 is set '
        "by "
        "storage.s3)",
    ),
    Refusal(
        "a volume with capitals",
        {f"{POD}.volumes": [{"name": "Cache", "emptyDir": {}}]},
        f"{POD}.volumes[0].name: Invalid value: \"Cache\": the name of a volume has small letters, digits and '-' only",
    ),
    Refusal(
        "a volume of the trainer",
        {f"{POD}.volumes": [{"name": "scratch", "emptyDir": {}}]},
        f'{POD}.volumes[0].name: Invalid value: "scratch": this volume is there anyway; give yours another name',
    ),
    Refusal(
        "a volume of the node",
        {f"{POD}.volumes": [{"name": "root"}]},
        f"{POD}.volumes[0]: Invalid value: a volume needs exactly one source; set one of emptyDir, configMap, secret, "
        "persistentVolumeClaim, csi",
    ),
    Refusal(
        "a mount without its volume",
        {f"{POD}.volumeMounts": [{"name": "cache", "mountPath": "/cache"}]},
        f"{POD}: Invalid value: volumeMounts may only name volumes of podTemplate.volumes; add the volume or remove "
        "the mount",
    ),
    Refusal(
        "a relative mount",
        {
            f"{POD}.volumes": [{"name": "cache", "emptyDir": {}}],
            f"{POD}.volumeMounts": [{"name": "cache", "mountPath": "cache"}],
        },
        f"{POD}.volumeMounts[0].mountPath: Invalid value: \"cache\": mountPath must be an absolute path without ':'",
    ),
    Refusal(
        "a mount over the trainer's own",
        {
            f"{POD}.volumes": [{"name": "cache", "emptyDir": {}}],
            f"{POD}.volumeMounts": [{"name": "cache", "mountPath": "/scratch/x"}],
        },
        f'{POD}.volumeMounts[0].mountPath: Invalid value: "/scratch/x": the trainer itself uses this path; mount yours '
        "elsewhere",
    ),
)
