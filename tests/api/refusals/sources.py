"""Refused for what training starts from: the name, the task, the model, the data, the places."""

from __future__ import annotations

from tests.api.refusals.refusal import HYPER, Refusal

LABELED = "tasks SequenceClassification and Regression learn from labelled text; set dataset.format to labeled"
IMAGES = {"spec.task.type": "ImageClassification"}
A_STREAM = {"spec.dataset.streaming": True, f"{HYPER}.maxSteps": 100}
CHATS = "messages, conversations, tools, system, instruction, input, output, prompt, completion"
WRONG_FORMATS = (
    (
        "CausalLM",
        "task CausalLM learns from plain text; set dataset.format to text, or task.type to Instruction",
        ("messages", "labeled", "image-folder"),
    ),
    (
        "Instruction",
        "task Instruction needs instructions and answers; set task.type to CausalLM for plain text, to "
        "SequenceClassification or Regression for labelled text, to ImageClassification for images",
        ("text", "labeled", "image-folder"),
    ),
    ("SequenceClassification", LABELED, ("text", "alpaca", "image-folder")),
    ("Regression", LABELED, ("text", "prompt-completion", "image-folder")),
    (
        "ImageClassification",
        "task ImageClassification learns from images; set dataset.format to image-folder, or to "
        "labeled for parquet with the columns image and label",
        ("text", "sharegpt"),
    ),
)
OTHER_FIELDS = (
    ("Instruction", CHATS, "text"),
    ("CausalLM", "text", "label"),
    ("SequenceClassification", "text, textPair, label", "image"),
    ("Regression", "text, textPair, label", "output"),
    ("ImageClassification", "image, label", "text"),
)


def _wrong_format(task: str, given: str, reason: str) -> Refusal:
    changes = {"spec.task.type": task, "spec.dataset.format": given}
    return Refusal(f"{given} for {task}", changes, f"spec.dataset.format: Forbidden: {reason}")


def _other_field(task: str, given: str, fields: str) -> Refusal:
    says = f"task {task} reads {fields}; columns has these for its keys, and the names in the data for its values"
    changes = {"spec.task.type": task, "spec.dataset.columns": {given: "a"}}
    return Refusal(f"the field {given} for {task}", changes, f"spec.dataset.columns: Forbidden: {says}")


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
        'spec.model.uri: Invalid value: "models/base": must be s3://bucket/prefix, hf://org/name@revision, '
        "pvc://claim/path, file:///path or job://name",
    ),
    Refusal(
        "a hub's name without an owner",
        {"spec.model.uri": "hf://tiny-llama"},
        'spec.model.uri: Invalid value: "hf://tiny-llama": must be s3://bucket/prefix, hf://org/name@revision, '
        "pvc://claim/path, file:///path or job://name",
    ),
    Refusal(
        "a hub for a bucket",
        {"spec.model.hub": {"secretName": "hub"}},
        "spec.model.hub: Forbidden: hub is for models of the hub; remove it, or set model.uri to hf://org/name",
    ),
    Refusal(
        "a mirror without scheme",
        {"spec.model": {"uri": "hf://org/name", "hub": {"endpoint": "hub.example.com"}}},
        'spec.model.hub.endpoint: Invalid value: "hub.example.com": must be a URL: http://host:port or https://host',
    ),
    Refusal(
        "two caches",
        {"spec.model.cache": {"pvc": "models", "hostPath": "/var/cache/finetune"}},
        "spec.model.cache: Invalid value: set exactly one of cache.pvc and cache.hostPath",
    ),
    Refusal(
        "another folder of the node",
        {"spec.model.cache": {"hostPath": "/var/cache/finetune/../../lib/kubelet"}},
        'spec.model.cache.hostPath: Invalid value: "/var/cache/finetune/../../lib/kubelet": must be '
        "/var/cache/finetune or a folder below it, which is all that jobs may mount of a node",
    ),
    Refusal(
        "a cache for a volume",
        {"spec.model": {"uri": "pvc://models/base", "cache": {"pvc": "cache"}}},
        "spec.model.cache: Forbidden: what lies on a volume is read where it is; remove model.cache",
    ),
    Refusal(
        "a job that no name can be of",
        {"spec.model.uri": "job://Other_Job"},
        'spec.model.uri: Invalid value: "job://Other_Job": must be s3://bucket/prefix, hf://org/name@revision, '
        "pvc://claim/path, file:///path or job://name",
    ),
    Refusal(
        "a job that begins with its own result",
        {"metadata.name": "same", "spec.model.uri": "job://same"},
        "spec.model.uri: Forbidden: a job cannot begin with its own result; name the job whose model it goes on from",
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
    *(_wrong_format(task, given, reason) for task, reason, formats in WRONG_FORMATS for given in formats),
    *(_other_field(task, given, fields) for task, fields, given in OTHER_FIELDS),
    Refusal(
        "columns of an image folder",
        {**IMAGES, "spec.dataset.format": "image-folder", "spec.dataset.columns": {"label": "animal"}},
        "spec.dataset.columns: Forbidden: the classes of an image folder are the names of its folders, and it has no "
        "columns; remove columns",
    ),
    Refusal(
        "a share of a stream",
        {**A_STREAM, "spec.dataset.validation": {"fraction": 0.1}},
        "spec.dataset.validation.fraction: Forbidden: a stream cannot be split; set validation.uri instead of "
        "validation.fraction, or streaming to false",
    ),
    Refusal(
        "a streamed image folder",
        {**IMAGES, **A_STREAM, "spec.dataset.format": "image-folder", "spec.task.labels": ["cat", "dog"]},
        "spec.dataset.streaming: Forbidden: image folders are not streamed; set streaming to false, or put the images "
        "into parquet",
    ),
    Refusal(
        "a stream without an end",
        {"spec.dataset.streaming": True},
        f"{HYPER}.maxSteps: Required value: the length of a stream is not known beforehand; set "
        "hyperparameters.maxSteps",
    ),
    Refusal(
        "a packed stream",
        {**A_STREAM, f"{HYPER}.packing": True},
        f"{HYPER}.packing: Forbidden: a stream is not packed; set packing or dataset.streaming to false",
    ),
    Refusal(
        "epochs of a stream",
        {**A_STREAM, "spec.strategy": {"type": "Full", "unfreezing": {"everyEpochs": 1}}},
        "spec.strategy.unfreezing.everyEpochs: Forbidden: the length of a stream is not known beforehand; set "
        "unfreezing.everySteps instead of everyEpochs",
    ),
    Refusal(
        "a stream of unknown classes",
        {**A_STREAM, "spec.task.type": "SequenceClassification"},
        "spec.task.labels: Required value: the classes of a stream are not known beforehand; set task.labels",
    ),
    Refusal(
        "classes of an instruction",
        {"spec.task.labels": ["a", "b"]},
        "spec.task.labels: Forbidden: task.labels belongs to the types SequenceClassification and ImageClassification; "
        "remove it",
    ),
    Refusal(
        "several classes of an image",
        {**IMAGES, "spec.task.multiLabel": True},
        "spec.task.multiLabel: Forbidden: task.multiLabel belongs to the type SequenceClassification; remove it",
    ),
    Refusal(
        "the same class twice",
        {**IMAGES, "spec.task.labels": ["cat", "dog", "cat"]},
        'spec.task.labels[2]: Duplicate value: "cat"',
    ),
)
