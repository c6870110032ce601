"""Random FineTuneJobs that are valid by construction."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from finetune_api.crd import job_schema
from finetune_api.schema import RULES, Schema
from tests.api.jobs import Object, changed, full, minimal

SPEC = job_schema()["properties"]["spec"]
FULL = full()["spec"]
ONLY = {
    "spec.task.type": ["Instruction", "CausalLM"],
    "spec.dataset.format": ["auto"],
    "spec.strategy.type": ["Full", "LoRA", "QLoRA"],
    "spec.distributed.sharding": ["Auto", "DDP"],
    "spec.resources.nodes": [1],
    "spec.resources.gpusPerNode": [0, 1],
    "spec.dataset.streaming": [False],
    "spec.evaluation.metrics[]": ["perplexity"],
}
"""Values that are supported where the schema has more."""


def _numbers(schema: Schema) -> st.SearchStrategy[Any]:
    low, high = schema.get("minimum"), schema.get("maximum")
    if schema["type"] == "integer":
        return st.integers(low, high)
    return st.floats(
        *(None if bound is None else float(bound) for bound in (low, high)),
        exclude_min=bool(schema.get("exclusiveMinimum")),
        exclude_max=bool(schema.get("exclusiveMaximum")),
        allow_nan=False,
        allow_infinity=False,
    )


def _values(schema: Schema, example: Any, path: str) -> st.SearchStrategy[Any]:
    """Values of a field; texts and lists are those of the example, since rules say how they look."""
    if path in ONLY:
        return st.sampled_from(ONLY[path])
    if isinstance(example, dict) and "properties" in schema:
        return _objects(schema, example, path)
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema.get("type") in ("integer", "number"):
        return _numbers(schema)
    return st.booleans() if schema.get("type") == "boolean" else st.just(example)


def _objects(schema: Schema, example: Object, path: str) -> st.SearchStrategy[Object]:
    known = {name: schema["properties"][name] for name in example}
    fields = {name: _values(child, example[name], f"{path}.{name}") for name, child in known.items()}
    required = schema.get("required", [])
    return st.fixed_dictionaries(
        {name: field for name, field in fields.items() if name in required},
        optional={name: field for name, field in fields.items() if name not in required},
    )


def _sensible(spec: Object) -> Object:
    """The spec without the pairs of fields that make no sense: what rules over several fields refuse."""
    strategy, hyper = spec["strategy"], spec.get("hyperparameters", {})
    if strategy["type"] == "Full":
        strategy.pop("lora", None)
        spec["output"].pop("merge", None)
    if strategy["type"] != "QLoRA":
        strategy.pop("quantization", None)
    if not spec["dataset"].get("validation"):
        spec["dataset"].pop("validation", None)
        spec.get("evaluation", {}).pop("everySteps", None)
    if spec.get("resources", {}).get("gpusPerNode", 0) == 0:
        spec.get("resources", {}).pop("gpuProduct", None)
        for name in ("dtype", "attention"):
            spec["model"].pop(name, None)
        hyper.pop("optimizer", None)
    if spec["model"].get("dtype") == "float32":
        spec["model"].pop("attention", None)
    if hyper.get("optimizer") in ("adafactor", "sgd"):
        for name in ("beta1", "beta2", "epsilon"):
            hyper.pop(name, None)
    if hyper.get("scheduler") == "constant":
        hyper.pop("warmupSteps", None)
    if hyper.get("maxLength", 2048) < 16:
        hyper.pop("packing", None)
    s3 = spec.get("storage", {}).get("s3", {})
    if "endpoint" not in s3:
        s3.pop("caBundleConfigMap", None)
    template = spec.get("podTemplate", {})
    if "volumes" not in template:
        template.pop("volumeMounts", None)
    return spec


def jobs() -> st.SearchStrategy[Object]:
    """Valid jobs, from nearly minimal to nearly full."""
    return _objects(SPEC, FULL, "spec").map(lambda spec: changed(minimal(), {"spec": _sensible(spec)}))


def unsupported(schema: Schema) -> bool:
    return any(rule["rule"] == "false" for rule in schema.get(RULES, []))
