"""Refused by types, bounds and enumerations."""

from __future__ import annotations

from tests.api.jobs import REMOVED
from tests.api.refusals.refusal import HYPER, POD, Refusal, outside

BY_SCHEMA = (
    outside(f"{HYPER}.epochs", -1, "greater than 0"),
    outside(f"{HYPER}.epochs", 0, "greater than 0"),
    outside(f"{HYPER}.epochs", 1000.5, "less than or equal to 1000"),
    outside(f"{HYPER}.maxSteps", 0, "greater than or equal to 1"),
    outside(f"{HYPER}.warmupRatio", 1, "less than 1"),
    outside(f"{HYPER}.learningRate", -0.0001, "greater than 0"),
    outside("spec.checkpoint.keep", 101, "less than or equal to 100"),
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
