"""Jobs for the tests of the API: the smallest one, and one with every field that is supported."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

Object = dict[str, Any]
REMOVED: Any = object()


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


def full() -> Object:
    """Every field that is supported, with another value than its default."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "everything", "namespace": "default"},
        "spec": {
            "task": {"type": "Instruction"},
            "model": {
                "uri": "s3://models/base",
                "dtype": "bfloat16",
                "attention": "sdpa",
                "trustRemoteCode": True,
            },
            "dataset": {
                "uri": "s3://data/*.jsonl",
                "format": "messages",
                "validation": {"fraction": 0.1},
                "onInvalidRow": "Drop",
                "streaming": False,
            },
            "strategy": {
                "type": "QLoRA",
                "lora": {
                    "rank": 8,
                    "alpha": 24,
                    "dropout": 0.1,
                    "targetModules": ["q_proj", "v_proj"],
                    "modulesToSave": ["lm_head"],
                    "rsLoRA": True,
                    "doRA": True,
                },
                "quantization": {"type": "fp4", "doubleQuant": False},
            },
            "hyperparameters": {
                "epochs": 2.5,
                "maxSteps": 500,
                "learningRate": 0.0001,
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
            "evaluation": {"everySteps": 50, "metrics": ["perplexity"], "samples": 2},
            "checkpoint": {"everySteps": 100, "keep": 2},
            "output": {"uri": "s3://models/out", "merge": True},
            "resources": {
                "nodes": 1,
                "gpusPerNode": 1,
                "gpuResource": "amd.com/gpu",
                "gpuProduct": "NVIDIA-L4",
                "cpu": 4,
                "memory": "16Gi",
                "scratch": "20Gi",
                "sharedMemory": "1Gi",
            },
            "distributed": {"sharding": "DDP"},
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
                "priorityClassName": "low",
                "schedulerName": "other",
                "nodeSelector": {"zone": "a"},
                "tolerations": [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}],
                "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": _nodes()}},
            },
            "runPolicy": {
                "terminationGracePeriodSeconds": 60,
                "retries": {"infrastructure": 1, "application": 2, "outOfMemory": 3},
            },
            "suspend": True,
            "podTemplate": {
                "labels": {"team": "nlp"},
                "annotations": {"note": "for the paper"},
                "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
                "volumes": [{"name": "cache", "emptyDir": {"sizeLimit": "1Gi"}}],
                "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
                "imagePullSecrets": ["registry"],
            },
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
