"""Specs that are refused: what is changed in the minimal job, and what the API server says of it, word by word.

The tests here compare with our validator, tests/e2e/test_api_server.py with a real API server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.api.jobs import REMOVED, Object, changed, minimal


@dataclass(frozen=True)
class Refusal:
    """One problem and no other: `says` is the whole of it, its path first."""

    name: str
    changes: dict[str, Any]
    says: str

    @property
    def job(self) -> Object:
        return changed(minimal(), self.changes)


HYPER = "spec.hyperparameters"
POD = "spec.podTemplate"
A_NAME = "must be the name of an object: small letters, digits, '-' and '.', a letter or digit at both ends"
LABELS = (
    "must be labels: letters, digits, '-', '_' and '.' in keys (after an optional prefix/) and in values, at most 63 "
    "of them, a letter or digit at both ends"
)
AN_AMOUNT = "must be a quantity above 0, such as 2, 500m, 16Gi or 1.5T"
A_GPU = {"spec.resources.gpusPerNode": 1}


def _outside(path: str, value: Any, bound: str) -> Refusal:
    return Refusal(
        f"{path} {value}", {path: value}, f"{path}: Invalid value: {value}: {path} in body should be {bound}"
    )


def _not_yet(path: str, value: Any, instead: str, name: str = "") -> Refusal:
    what = name or path.removeprefix("spec.")
    return Refusal(f"{what} not yet", {path: value}, f"{path}: Forbidden: {what} is not supported yet; {instead}")


def _only(path: str, value: Any, what: str, allowed: str) -> Refusal:
    says = f'{path}: Invalid value: "{value}": this {what} is not supported yet; use one of {allowed}'
    return Refusal(f"{what} {value}", {path.removesuffix("[0]"): [value] if path.endswith("]") else value}, says)


BY_SCHEMA = (
    _outside(f"{HYPER}.epochs", -1, "greater than 0"),
    _outside(f"{HYPER}.epochs", 0, "greater than 0"),
    _outside(f"{HYPER}.epochs", 1000.5, "less than or equal to 1000"),
    _outside(f"{HYPER}.maxSteps", 0, "greater than or equal to 1"),
    _outside(f"{HYPER}.warmupRatio", 1, "less than 1"),
    _outside(f"{HYPER}.learningRate", -0.0001, "greater than 0"),
    _outside("spec.checkpoint.keep", 101, "less than or equal to 100"),
    Refusal(
        "wrong enum",
        {"spec.strategy.type": "Lora"},
        'spec.strategy.type: Unsupported value: "Lora": supported values: "Full", "Partial", "LoRA", "QLoRA", '
        '"Adapter", "PromptTuning", "PrefixTuning", "IA3", "LayerNorm", "Additive", "Green"',
    ),
    Refusal("no task", {"spec.task": REMOVED}, "spec.task: Required value"),
    Refusal("no spec", {"spec": REMOVED}, "spec: Required value"),
    Refusal(
        "text for a number",
        {f"{HYPER}.epochs": "three"},
        f'{HYPER}.epochs: Invalid value: "string": {HYPER}.epochs in body must be of type number: "string"',
    ),
    Refusal(
        "text for an integer",
        {f"{HYPER}.seed": "42"},
        f'{HYPER}.seed: Invalid value: "string": {HYPER}.seed in body must be of type integer: "string"',
    ),
    Refusal(
        "a fraction of a step",
        {f"{HYPER}.maxSteps": 1.5},
        f'{HYPER}.maxSteps: Invalid value: "float64": {HYPER}.maxSteps in body must be of type int64: "float64"',
    ),
    Refusal(
        "a number for a switch",
        {"spec.suspend": 1},
        'spec.suspend: Invalid value: "integer": spec.suspend in body must be of type boolean: "integer"',
    ),
    Refusal(
        "one name instead of a list",
        {"spec.strategy.lora.targetModules": "q_proj"},
        'spec.strategy.lora.targetModules: Invalid value: "string": spec.strategy.lora.targetModules in body must be '
        'of type array: "string"',
    ),
    Refusal(
        "a list instead of an object",
        {"spec.dataset": ["s3://data/x"]},
        'spec.dataset: Invalid value: "array": spec.dataset in body must be of type object: "array"',
    ),
    Refusal(
        "half a processor without quotes",
        {"spec.resources.cpu": 0.5},
        'spec.resources.cpu: Invalid value: "number": spec.resources.cpu in body must be of type integer,string: '
        '"number"',
    ),
    Refusal(
        "null in a list",
        {"spec.strategy.lora.modulesToSave": [None]},
        'spec.strategy.lora.modulesToSave[0]: Invalid value: "null": spec.strategy.lora.modulesToSave[0] in body must '
        'be of type string: "null"',
    ),
    Refusal(
        "no target module",
        {"spec.strategy.lora.targetModules": []},
        "spec.strategy.lora.targetModules: Invalid value: 0: spec.strategy.lora.targetModules in body should have at "
        "least 1 items",
    ),
    Refusal(
        "the same module twice",
        {"spec.strategy.lora.modulesToSave": ["lm_head", "lm_head"]},
        'spec.strategy.lora.modulesToSave[1]: Duplicate value: "lm_head"',
    ),
    Refusal(
        "the same variable twice",
        {f"{POD}.env": [{"name": "A"}, {"name": "A", "value": "b"}]},
        f'{POD}.env[1]: Duplicate value: {{"name":"A"}}',
    ),
    Refusal(
        "too many pull secrets",
        {f"{POD}.imagePullSecrets": [f"s{n}" for n in range(9)]},
        f"{POD}.imagePullSecrets: Too many: 9: must have at most 8 items",
    ),
    Refusal(
        "too many labels",
        {f"{POD}.labels": {f"l{n}": "x" for n in range(33)}},
        f"{POD}.labels: Too many: 33: must have at most 32 items",
    ),
    Refusal(
        "a long region",
        {"spec.storage.s3.region": "x" * 65},
        "spec.storage.s3.region: Too long: may not be more than 64 bytes",
    ),
    Refusal(
        "an empty region",
        {"spec.storage.s3.region": ""},
        'spec.storage.s3.region: Invalid value: "": spec.storage.s3.region in body should be at least 1 chars long',
    ),
    Refusal("a long name", {"metadata.name": "a" * 46}, "metadata.name: Too long: may not be more than 45 bytes"),
    Refusal("a variable without a name", {f"{POD}.env": [{"value": "x"}]}, f"{POD}.env[0].name: Required value"),
)
"""Refused by types, bounds and enumerations."""

UNSUPPORTED = (
    _only("spec.task.type", "Evaluation", "task type", "Instruction, CausalLM"),
    _only("spec.dataset.format", "preference", "format", "auto, messages, sharegpt, alpaca, prompt-completion, text"),
    _only("spec.strategy.type", "IA3", "strategy type", "Full, LoRA, QLoRA"),
    _only("spec.evaluation.metrics[0]", "rouge", "metric", "perplexity"),
    _only("spec.distributed.sharding", "FSDP", "sharding", "Auto, DDP"),
    _not_yet("spec.model.adapter", {"uri": "s3://a/b"}, "merge the adapter into the model and name that"),
    Refusal(
        "models of the hub",
        {"spec.model.uri": "hf://org/name"},
        'spec.model.uri: Invalid value: "hf://org/name": hf:// and job:// models are not supported yet; copy the model '
        "to "
        "s3:// or pvc:// and name that",
    ),
    _not_yet("spec.dataset.preparation", {"deduplicate": True}, "prepare the data before the job"),
    Refusal(
        "streaming",
        {"spec.dataset.streaming": True},
        "spec.dataset.streaming: Invalid value: true: dataset.streaming is not supported yet; leave it false",
    ),
    _not_yet("spec.evaluation.earlyStopping", {}, "set hyperparameters.maxSteps"),
    Refusal(
        "two nodes",
        {"spec.resources.nodes": 2},
        "spec.resources.nodes: Invalid value: 2: more than one node is not supported yet; set resources.nodes to 1",
    ),
    Refusal(
        "two GPUs",
        {"spec.resources.gpusPerNode": 2},
        "spec.resources.gpusPerNode: Invalid value: 2: more than one GPU is not supported yet; set "
        "resources.gpusPerNode to 0 or 1",
    ),
    _not_yet("spec.resources.network", {}, "remove it"),
    _not_yet("spec.distributed.minNodes", 1, "remove it"),
    _not_yet("spec.scheduling.queue", "team", "remove it"),
    _not_yet("spec.scheduling.topologyKey", "zone", "set scheduling.affinity"),
    _not_yet("spec.runPolicy.activeDeadlineSeconds", 60, "set hyperparameters.maxSteps"),
    _not_yet("spec.runPolicy.startDeadlineSeconds", 60, "remove it"),
    _not_yet("spec.runPolicy.stallTimeoutSeconds", 60, "remove it"),
    _not_yet("spec.runPolicy.ttlSecondsAfterFinished", 60, "delete the job yourself"),
    _not_yet("spec.tracking", {}, "remove it"),
    _not_yet(f"{POD}.securityContext", {}, "remove it"),
    _not_yet(f"{POD}.initContainers", [{"name": "a"}], "remove it"),
)
"""Features that come later."""

BY_RULE = (
    Refusal(
        "a name with a digit first",
        {"metadata.name": "7b"},
        "metadata.name: Forbidden: the name must start with a small letter and have small letters, digits and '-' "
        "only: names of pods and services are made from it",
    ),
    Refusal(
        "a name with a dot",
        {"metadata.name": "llama-3.1"},
        "metadata.name: Forbidden: the name must start with a small letter and have small letters, digits and '-' "
        "only: names of pods and services are made from it",
    ),
    Refusal(
        "LoRA options on a Full job",
        {"spec.strategy": {"type": "Full", "lora": {"rank": 8}}},
        "spec.strategy.lora: Forbidden: strategy.lora belongs to the types LoRA and QLoRA; remove it or change "
        "strategy.type",
    ),
    Refusal(
        "quantization without QLoRA",
        {"spec.strategy.quantization": {}},
        "spec.strategy.quantization: Forbidden: strategy.quantization belongs to the type QLoRA; remove it or set "
        "strategy.type to QLoRA",
    ),
    Refusal(
        "all-linear and more",
        {"spec.strategy.lora.targetModules": ["all-linear", "q_proj"]},
        "spec.strategy.lora.targetModules: Invalid value: all-linear means every linear layer; remove it or the other "
        "names",
    ),
    Refusal(
        "two sources of held-out rows",
        {"spec.dataset.validation": {"fraction": 0.1, "uri": "s3://data/v.jsonl"}},
        "spec.dataset.validation: Invalid value: set exactly one of validation.fraction and validation.uri",
    ),
    Refusal(
        "no source of held-out rows",
        {"spec.dataset.validation": {}},
        "spec.dataset.validation: Invalid value: set exactly one of validation.fraction and validation.uri",
    ),
    Refusal(
        "a model without a scheme",
        {"spec.model.uri": "models/base"},
        'spec.model.uri: Invalid value: "models/base": must be s3://bucket/prefix, pvc://claim/path or file:///path',
    ),
    Refusal(
        "data without a scheme",
        {"spec.dataset.uri": "/data/rows.jsonl"},
        'spec.dataset.uri: Invalid value: "/data/rows.jsonl": must be s3://bucket/prefix, pvc://claim/path or '
        "file:///path; a file, a glob or a prefix",
    ),
    Refusal(
        "a bucket alone for the output",
        {"spec.output.uri": "s3://models"},
        'spec.output.uri: Invalid value: "s3://models": must be a prefix of its own: s3://bucket/prefix, '
        "pvc://claim/path "
        "or file:///path",
    ),
    Refusal(
        "merging a whole model",
        {"spec.strategy.type": "Full", "spec.output.merge": True},
        "spec.output.merge: Forbidden: output.merge belongs to the strategies LoRA and QLoRA: Full delivers a whole "
        "model anyway; remove it",
    ),
    Refusal(
        "conversations for CausalLM",
        {"spec.task.type": "CausalLM", "spec.dataset.format": "messages"},
        "spec.dataset.format: Forbidden: task CausalLM learns from plain text; set dataset.format to text, or "
        "task.type to Instruction",
    ),
    Refusal(
        "plain text for Instruction",
        {"spec.dataset.format": "text"},
        "spec.dataset.format: Forbidden: task Instruction needs instructions and answers; set task.type to CausalLM "
        "for plain text",
    ),
    Refusal(
        "evaluation without held-out rows",
        {"spec.evaluation.everySteps": 10},
        "spec.evaluation.everySteps: Forbidden: evaluation.everySteps needs held-out rows; set dataset.validation",
    ),
    Refusal(
        "float16 on the CPU",
        {"spec.model.dtype": "float16"},
        "spec.model.dtype: Forbidden: float16 needs a GPU; set model.dtype to auto (float32 on a CPU) or bfloat16, or "
        "resources.gpusPerNode",
    ),
    Refusal(
        "flash attention in float32",
        {"spec.model.attention": "flash_attention_2", "spec.model.dtype": "float32", **A_GPU},
        "spec.model.attention: Forbidden: flash_attention_2 needs a GPU and bfloat16 or float16; set model.attention "
        "to auto",
    ),
    Refusal(
        "paging without a GPU",
        {f"{HYPER}.optimizer": "pagedAdamw8bit"},
        f"{HYPER}.optimizer: Forbidden: pagedAdamw8bit pages GPU memory and needs a GPU; set optimizer to adamw8bit "
        "(works on CPUs) or adamw",
    ),
    Refusal(
        "packs of eight tokens",
        {f"{HYPER}.packing": True, f"{HYPER}.maxLength": 8},
        f"{HYPER}.packing: Forbidden: packing needs a maxLength of at least 16; raise maxLength or set packing: false",
    ),
    Refusal(
        "a warm-up to a constant",
        {f"{HYPER}.scheduler": "constant", f"{HYPER}.warmupSteps": 10},
        f"{HYPER}.warmupSteps: Forbidden: the scheduler constant has no warm-up; set scheduler to constantWithWarmup, "
        "or remove warmupSteps",
    ),
    Refusal(
        "betas without Adam",
        {f"{HYPER}.optimizer": "sgd", f"{HYPER}.beta1": 0.8},
        f"{HYPER}.optimizer: Forbidden: beta1, beta2 and epsilon belong to the adamw optimizers; remove them, or set "
        "optimizer to adamw",
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
        "a GPU resource without domain",
        {"spec.resources.gpuResource": "gpu"},
        'spec.resources.gpuResource: Invalid value: "gpu": must be an extended resource: domain/name',
    ),
    Refusal(
        "gigabytes as people say it",
        {"spec.resources.memory": "16GB"},
        f'spec.resources.memory: Invalid value: "16GB": {AN_AMOUNT}',
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
"""Refused by CEL: forms, and pairs that make no sense."""

REFUSALS = (*BY_SCHEMA, *UNSUPPORTED, *BY_RULE)
