"""A spec without what the rules refuse: fields that make no sense beside others go, what they need comes.

Written anew, not derived from the rules: what is left must be admitted.
"""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]
LANGUAGE = ("Instruction", "CausalLM")
PROMPTS = ("PromptTuning", "PrefixTuning")


def sensible(spec: Object) -> Object:
    """The spec itself, changed."""
    for part in (_strategy, _selection, _data, _evaluation, _training, _hardware, _sharding, _fabric, _storage, _pod):
        part(spec)
    return spec


def _without(values: Object | None, *names: str) -> None:
    for name in names:
        (values or {}).pop(name, None)


def _strategy(spec: Object) -> None:
    strategy = spec["strategy"]
    if strategy["type"] not in ("LoRA", "QLoRA", "IA3"):
        _without(spec["output"], "merge")
    if strategy.get("promptTuning", {}).get("encoder", "None") != "None":
        _without(strategy["promptTuning"], "initText")
    additive = strategy.get("additive", {})
    if additive.get("blocks") == 0 and spec["task"]["type"] in LANGUAGE:
        additive["head"] = True
    unfreezing = strategy.get("unfreezing")
    if unfreezing is not None and not unfreezing.keys() & {"everySteps", "everyEpochs"}:
        unfreezing["everySteps"] = 10


def _selection(spec: Object) -> None:
    strategy = spec["strategy"]
    select = strategy.get("select")
    if select is not None and strategy["type"] == "LayerNorm":
        _without(select, "modules", "angle")
    for part in (select, strategy.get("adapter")):
        if part and part.get("layers") == {}:
            part["layers"] = {"last": 1}
    if select == {} or (select is None and strategy["type"] == "Partial"):
        strategy["select"] = {"layers": {"last": 1}}


def _data(spec: Object) -> None:
    data, task = spec["dataset"], spec["task"]
    if data.get("streaming"):
        spec.setdefault("hyperparameters", {}).setdefault("maxSteps", 100)
        _without(spec["hyperparameters"], "packing")
        if data.get("validation"):
            data["validation"] = {"uri": "s3://data/held-out.jsonl"}
        if data.get("format") == "image-folder":
            _without(data, "format")
        unfreezing = spec["strategy"].get("unfreezing")
        if unfreezing and unfreezing.pop("everyEpochs", None):
            unfreezing["everySteps"] = 10
        if task["type"] in ("SequenceClassification", "ImageClassification"):
            task.setdefault("labels", ["a", "b"])
    if data.get("format") == "image-folder":
        _without(data, "columns")
    if not data.get("validation"):
        _without(data, "validation")


def _evaluation(spec: Object) -> None:
    evaluation = spec.get("evaluation", {})
    if "validation" not in spec["dataset"]:
        _without(evaluation, "everySteps")
    if "everySteps" not in evaluation:
        _without(evaluation, "earlyStopping")
        if spec["output"].get("weights") == "Best":
            _without(spec["output"], "weights")
    if "metric" not in evaluation.get("earlyStopping", {"metric": ""}):
        evaluation["earlyStopping"]["metric"] = "eval_loss"


def _training(spec: Object) -> None:
    hyper, task, strategy = spec.get("hyperparameters"), spec["task"], spec["strategy"]["type"]
    if hyper is None:
        return
    if strategy in PROMPTS:
        _without(hyper, "layerDecay", "learningRateGroups", "packing")
    if strategy == "PrefixTuning" and hyper.get("gradientCheckpointing"):
        hyper["gradientCheckpointing"] = False
    if task["type"] not in LANGUAGE or hyper.get("maxLength", 2048) < 16:
        _without(hyper, "packing")
    if task["type"] == "Regression" or task.get("multiLabel"):
        _without(hyper, "labelSmoothing")
    if task["type"] == "ImageClassification":
        _without(hyper, "neftuneAlpha")
    if hyper.get("optimizer") in ("adafactor", "sgd"):
        _without(hyper, "beta1", "beta2", "epsilon")
    if hyper.get("scheduler") == "constant":
        _without(hyper, "warmupSteps")


def _hardware(spec: Object) -> None:
    if spec.get("resources", {}).get("gpusPerNode", 0) == 0:
        _without(spec.get("resources"), "gpuProduct")
        _without(spec["model"], "dtype", "attention")
        _without(spec.get("hyperparameters"), "optimizer")
    elif spec["resources"].get("processesPerNode") != spec["resources"]["gpusPerNode"]:
        _without(spec["resources"], "processesPerNode")
    if spec["model"].get("dtype") == "float32":
        _without(spec["model"], "attention")


def _fabric(spec: Object) -> None:
    resources = spec.get("resources", {})
    network = resources.get("network", {})
    preset = network.get("preset", "None")
    if preset != "None" and resources.get("nodes", 1) == 1:
        _without(resources, "network")
    elif preset == "TCPX" or (preset in ("InfiniBand", "EFA") and resources.get("gpusPerNode", 0) == 0):
        network["preset"] = preset = "Sockets"
    if preset == "None":
        _without(network, "interface")
    if preset != "InfiniBand":
        _without(network, "resource")
    if preset not in ("InfiniBand", "EFA"):
        _without(network, "devices")


def _sharding(spec: Object) -> None:
    distributed, hyper = spec.get("distributed", {}), spec.get("hyperparameters", {})
    optimizer = hyper.get("optimizer", "")
    whole = hyper.get("torchCompile") or "8bit" in optimizer or optimizer == "adafactor"
    if distributed.get("sharding") == "FSDP" and (whole or "fisher" in spec["strategy"].get("select", {})):
        _without(distributed, "sharding")
    if spec.get("resources", {}).get("gpusPerNode", 0) == 0:
        _without(distributed.get("fsdp"), "cpuOffload")
    if distributed.get("sharding") == "DDP":
        _without(distributed, "fsdp")
    _elastic(spec, distributed)
    if spec.get("resources", {}).get("nodes", 1) == 1:
        _without(spec.get("scheduling"), "topologyKey")


def _elastic(spec: Object, distributed: Object) -> None:
    scheduling = spec.get("scheduling", {})
    if spec.get("resources", {}).get("nodes", 1) == 1 or scheduling.keys() & {"queue", "managedBy"}:
        _without(distributed, "minNodes")
    if "minNodes" in distributed:
        distributed["minNodes"] = 1
    else:
        _without(distributed, "minNodesAfterSeconds")


def _storage(spec: Object) -> None:
    if spec["model"].get("cache") == {}:
        spec["model"]["cache"] = {"pvc": "models"}
    s3 = spec.get("storage", {}).get("s3", {})
    if "endpoint" not in s3:
        _without(s3, "caBundleConfigMap")


def _pod(spec: Object) -> None:
    if "volumes" not in spec.get("podTemplate", {}):
        _without(spec.get("podTemplate"), "volumeMounts", "initContainers")
