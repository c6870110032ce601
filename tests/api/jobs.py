"""Jobs for the tests of the API: the smallest one, and those that together have every field that is supported."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from finetune_api.strategy import OWNERS, StrategyType
from finetune_api.task import TaskType
from tests.api.sensible import Object, sensible

REMOVED: Any = object()
PART = {"layers": {"last": 2}, "modules": ["Attention"]}
OPTIONS: dict[str, Object] = {
    "lora": {
        "rank": 8,
        "alpha": 24,
        "dropout": 0.1,
        "targetModules": ["q_proj", "v_proj"],
        "modulesToSave": ["lm_head"],
        "rankPattern": {"v_proj": 4},
        "rsLoRA": True,
        "doRA": True,
    },
    "quantization": {"type": "fp4", "doubleQuant": False},
    "select": {
        "layers": {"last": 2},
        "modules": ["Attention", "FeedForward"],
        "angle": {"from": "job://probe", "topK": 4, "order": "Smallest"},
        "fisher": {"fraction": 0.5, "samples": 32},
    },
    "adapter": {
        "placement": "Pfeiffer",
        "size": 16,
        "activation": "gelu",
        "dropout": 0.1,
        "layerNorms": False,
        "layers": {"first": 3},
    },
    "promptTuning": {"tokens": 8, "initText": "Good or bad?", "encoder": "None"},
    "prefixTuning": {"tokens": 8, "projection": True},
    "ia3": {"targetModules": ["k_proj", "v_proj", "down_proj"]},
    "additive": {"blocks": 4, "placement": "Last", "head": True},
    "green": {"target": 0.4, "everySteps": 50},
    "unfreezing": {"everySteps": 100, "layersPerStage": 2},
}
"""What strategies have of their own, with other values than the defaults."""
TASKS: dict[str, Object] = {
    "Instruction": {"format": "messages", "columns": {"messages": "chat"}, "metrics": ["perplexity"]},
    "CausalLM": {"format": "text", "columns": {"text": "body"}, "metrics": ["perplexity"]},
    "SequenceClassification": {
        "format": "labeled",
        "columns": {"text": "question", "textPair": "answer", "label": "verdict"},
        "metrics": ["f1", "recall"],
        "labels": ["no", "yes"],
        "multiLabel": True,
    },
    "Regression": {"format": "labeled", "columns": {"label": "stars"}, "metrics": ["r2", "mse"]},
    "ImageClassification": {
        "format": "labeled",
        "columns": {"image": "photo", "label": "animal"},
        "metrics": ["accuracy"],
        "labels": ["cat", "dog"],
    },
}
"""What depends on the task: the shape of a row, what is measured, the classes."""


def minimal() -> Object:
    """What must be said, and nothing more."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "small", "namespace": "default"},
        "spec": {
            "task": {"type": "Instruction"},
            "model": {"uri": "s3://models/base"},
            "dataset": {"uri": "s3://data/rows.jsonl"},
            "strategy": {"type": "LoRA"},
            "output": {"uri": "s3://models/out"},
        },
    }


def job_of(strategy: StrategyType, task: TaskType) -> Object:
    """The smallest job of this strategy and task."""
    needed = {"select": {"layers": {"last": 1}}} if strategy is StrategyType.PARTIAL else {}
    changes = {"spec.task.type": task.value, "spec.strategy": {"type": strategy.value, **needed}}
    return changed(minimal(), changes)


def full(strategy: str = "QLoRA", task: str = "Instruction") -> Object:
    """Every field that makes sense for this strategy and this task, with another value than its default."""
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "everything", "namespace": "default"},
        "spec": {**_everything(), **_of_the_task(task), "strategy": _of_the_strategy(strategy)},
    }
    sensible(job["spec"])
    return job


def _of_the_strategy(strategy: str) -> Object:
    own = [field for field, owners in OWNERS.items() if StrategyType(strategy) in owners]
    return {"type": strategy, **{field: copy.deepcopy(OPTIONS[field]) for field in own}}


def _of_the_task(task: str) -> Object:
    own = TASKS[TaskType(task).value]
    return {
        "task": {"type": task, **{name: own[name] for name in ("labels", "multiLabel") if name in own}},
        "dataset": {
            "uri": "s3://data/*.jsonl",
            "format": own["format"],
            "columns": dict(own["columns"]),
            "validation": {"fraction": 0.1},
            "onInvalidRow": "Drop",
            "streaming": False,
        },
        "evaluation": {
            "everySteps": 50,
            "metrics": list(own["metrics"]),
            "samples": 2,
            "earlyStopping": {"metric": f"eval_{own['metrics'][0]}", "patience": 2, "minDelta": 0.01},
        },
    }


def _everything() -> Object:
    return {
        "model": {
            "uri": "hf://org/base@main",
            "hub": {"endpoint": "https://hub.example.com", "secretName": "hub-token"},
            "cache": {"pvc": "models"},
            "dtype": "bfloat16",
            "attention": "sdpa",
            "trustRemoteCode": True,
        },
        "hyperparameters": {
            "epochs": 2.5,
            "maxSteps": 500,
            "learningRate": 0.0001,
            "layerDecay": 0.9,
            "learningRateGroups": [{"select": copy.deepcopy(PART), "learningRate": 0.001}],
            "perDeviceBatchSize": 2,
            "evalBatchSize": 8,
            "gradientAccumulationSteps": 4,
            "maxLength": 1024,
            "packing": True,
            "optimizer": "adamw8bit",
            "scheduler": "linear",
            "warmupRatio": 0.1,
            "warmupSteps": 10,
            "weightDecay": 0.01,
            "noWeightDecay": ["Embedding"],
            "beta1": 0.8,
            "beta2": 0.95,
            "epsilon": 1e-6,
            "maxGradNorm": 0.5,
            "gradientCheckpointing": True,
            "labelSmoothing": 0.1,
            "dropout": 0.1,
            "neftuneAlpha": 5,
            "seed": 7,
            "deterministic": True,
            "loggingSteps": 5,
            "dataWorkers": 2,
            "torchCompile": True,
        },
        "checkpoint": {"everySteps": 100, "keep": 2},
        "output": {"uri": "s3://models/out", "merge": True, "weights": "Last"},
        "resources": {
            "nodes": 2,
            "gpusPerNode": 8,
            "processesPerNode": 8,
            "gpuResource": "amd.com/gpu",
            "gpuProduct": "NVIDIA-L4",
            "cpu": 4,
            "memory": "16Gi",
            "scratch": "20Gi",
            "sharedMemory": "1Gi",
            "network": {"preset": "InfiniBand", "interface": "eth0", "resource": "rdma/ib", "devices": 8},
        },
        "distributed": {"sharding": "FSDP", "fsdp": {"reshardAfterForward": False, "cpuOffload": True}},
        "storage": {
            "s3": {
                "endpoint": "https://s3.example.com",
                "region": "eu-central-1",
                "pathStyle": True,
                "caBundleConfigMap": "ca",
                "secretName": "keys",
            },
            "serviceAccountName": "trainer",
        },
        "scheduling": {
            "queue": "team",
            "managedBy": "kueue.x-k8s.io/multikueue",
            "priorityClassName": "low",
            "schedulerName": "other",
            "nodeSelector": {"zone": "a"},
            "tolerations": [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}],
            "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": _nodes()}},
            "topologyKey": "topology.kubernetes.io/zone",
        },
        "runPolicy": {
            "stallTimeoutSeconds": 3600,
            "terminationGracePeriodSeconds": 60,
            "activeDeadlineSeconds": 86400,
            "startDeadlineSeconds": 3600,
            "ttlSecondsAfterFinished": 604800,
            "retries": {"infrastructure": 1, "application": 2, "outOfMemory": 3},
            "preflight": "Always",
        },
        "suspend": True,
        "podTemplate": {
            "labels": {"team": "nlp"},
            "annotations": {"note": "for the paper"},
            "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
            "volumes": [{"name": "cache", "emptyDir": {"sizeLimit": "1Gi"}}],
            "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
            "imagePullSecrets": ["registry"],
            "securityContext": {
                "runAsUser": 1000,
                "runAsGroup": 1000,
                "fsGroup": 2000,
                "fsGroupChangePolicy": "Always",
                "supplementalGroups": [3000],
                "seLinuxOptions": {"level": "s0", "role": "r", "type": "t", "user": "u"},
            },
            "initContainers": [
                {
                    "name": "fetch",
                    "image": "fetcher:1",
                    "command": ["fetch"],
                    "args": ["--all"],
                    "env": [{"name": "PLACE", "value": "here"}],
                    "volumeMounts": [{"name": "cache", "mountPath": "/to", "subPath": "a", "readOnly": False}],
                    "resources": {
                        "requests": {"cpu": "100m", "memory": "1Gi"},
                        "limits": {"cpu": 1, "memory": "1Gi"},
                    },
                }
            ],
        },
    }


def _nodes() -> Object:
    wanted = {"key": "disk", "operator": "In", "values": ["ssd"]}
    return {"nodeSelectorTerms": [{"matchExpressions": [wanted]}]}


def changed(job: Object, changes: Mapping[str, Any]) -> Object:
    """A copy with values at paths such as `spec.podTemplate.env[0].name`; what is missing on the way is made."""
    found = copy.deepcopy(job)
    for path, value in changes.items():
        *way, last = [int(step) if step.isdigit() else step for step in re.findall(r"[^.\[\]]+", path)]
        node: Any = found
        for step in way:
            node = node.setdefault(step, {}) if isinstance(node, dict) else node[step]
        if value is REMOVED:
            del node[last]
        else:
            node[last] = value
    return found


FULLS: dict[str, Object] = {
    f"{strategy} of {task}": full(strategy, task)
    for strategy, task in (
        ("QLoRA", "Instruction"),
        ("Full", "CausalLM"),
        ("Partial", "ImageClassification"),
        ("LoRA", "SequenceClassification"),
        ("Adapter", "Regression"),
        ("PromptTuning", "Instruction"),
        ("PrefixTuning", "CausalLM"),
        ("IA3", "SequenceClassification"),
        ("LayerNorm", "SequenceClassification"),
        ("Additive", "ImageClassification"),
        ("Green", "Regression"),
    )
}
"""Each strategy and each task at least once."""
FULLS |= {
    "a stream": changed(
        full("LoRA", "CausalLM"),
        {
            "spec.dataset.streaming": True,
            "spec.dataset.validation": {"uri": "s3://data/held-out.jsonl"},
            "spec.hyperparameters.packing": REMOVED,
        },
    ),
    "shards": changed(
        full("Full"),
        {
            "spec.distributed.sharding": "FSDP",
            "spec.hyperparameters.optimizer": REMOVED,
            "spec.hyperparameters.torchCompile": REMOVED,
        },
    ),
    "fewer pods where there is no room": changed(
        full("LoRA"),
        {
            "spec.distributed": {"minNodes": 1, "minNodesAfterSeconds": 60},
            "spec.scheduling.queue": REMOVED,
            "spec.scheduling.managedBy": REMOVED,
        },
    ),
    "stages by epochs": changed(
        full("Full", "SequenceClassification"),
        {"spec.strategy.unfreezing": {"everyEpochs": 0.5, "stages": [{"modules": ["Head"]}, PART]}},
    ),
    "the first blocks": changed(full("Partial"), {"spec.strategy.select.layers": {"first": 2}}),
    "blocks by their numbers": changed(full("Partial"), {"spec.strategy.select.layers": {"indices": [0, 5]}}),
    "adapters in the last blocks": changed(full("Adapter"), {"spec.strategy.adapter.layers": {"last": 2}}),
    "adapters by numbers": changed(full("Adapter"), {"spec.strategy.adapter.layers": {"indices": [0, 5]}}),
    "models kept on nodes": changed(full(), {"spec.model.cache": {"hostPath": "/var/cache/finetune/models"}}),
    "an encoder of prompts": changed(
        full("PromptTuning", "Regression"), {"spec.strategy.promptTuning": {"tokens": 8, "encoder": "LSTM"}}
    ),
}
"""With those that are one of several: together all fields that are supported."""
