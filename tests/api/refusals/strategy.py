"""Refused for what learns: options of another strategy, selections of nothing, pairs that make no sense."""

from __future__ import annotations

from tests.api.refusals.refusal import HYPER, Refusal
from tests.api.sensible import Object

ANGLE = {"from": "job://probe", "topK": 4}
WHICH_LAYERS = "Invalid value: set exactly one of layers.first, layers.last and layers.indices"
BELONGINGS = (
    ("select", {"layers": {"last": 1}}, ("Partial", "LayerNorm")),
    ("adapter", {}, ("Adapter",)),
    ("promptTuning", {}, ("PromptTuning",)),
    ("prefixTuning", {}, ("PrefixTuning",)),
    ("ia3", {}, ("IA3",)),
    ("additive", {}, ("Additive",)),
    ("green", {}, ("Green",)),
    ("unfreezing", {"everySteps": 5}, ("Full", "Partial", "LayerNorm")),
)
"""Options, and the strategies that have them."""


def _partial(select: Object) -> Object:
    return {"spec.strategy": {"type": "Partial", "select": select}}


def _full(unfreezing: Object) -> Object:
    return {"spec.strategy": {"type": "Full", "unfreezing": unfreezing}}


def _of_another(field: str, value: Object, owners: tuple[str, ...]) -> Refusal:
    if len(owners) == 1:
        whose = f"the type {owners[0]}; remove it or set strategy.type to {owners[0]}"
    else:
        whose = f"the types {', '.join(owners[:-1])} and {owners[-1]}; remove it or change strategy.type"
    says = f"spec.strategy.{field}: Forbidden: strategy.{field} belongs to {whose}"
    return Refusal(f"{field} for LoRA", {f"spec.strategy.{field}": value}, says)


def _of_prompts(strategy: str) -> tuple[Refusal, ...]:
    """What virtual tokens cannot bear."""
    lie = "the virtual tokens of PromptTuning and PrefixTuning lie in none; set learningRate"
    changes = {"spec.strategy.type": strategy}
    groups = [{"select": {"modules": ["Head"]}, "learningRate": 0.1}]
    return (
        Refusal(
            f"{strategy} on images",
            {**changes, "spec.task.type": "ImageClassification"},
            "spec.strategy.type: Forbidden: PromptTuning and PrefixTuning put virtual tokens before a text, and an "
            "image has none; use LoRA, Adapter, LayerNorm or Partial",
        ),
        Refusal(
            f"{strategy} with packing",
            {**changes, f"{HYPER}.packing": True},
            f"{HYPER}.packing: Forbidden: packing puts several rows into one, and only the first would see the virtual "
            "tokens of PromptTuning and PrefixTuning; set packing to false",
        ),
        Refusal(
            f"{strategy} with rates by layers",
            {**changes, f"{HYPER}.layerDecay": 0.9},
            f"{HYPER}.layerDecay: Forbidden: layerDecay gives rates to parts of the model, and {lie}",
        ),
        Refusal(
            f"{strategy} with rates by groups",
            {**changes, f"{HYPER}.learningRateGroups": groups},
            f"{HYPER}.learningRateGroups: Forbidden: learningRateGroups gives rates to parts of the model, and {lie}",
        ),
    )


BY_RULE = (
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
        "merging a whole model",
        {"spec.strategy.type": "Full", "spec.output.merge": True},
        "spec.output.merge: Forbidden: output.merge belongs to the strategies LoRA, QLoRA and IA3: no other adapter "
        "can be merged, and whole models are delivered anyway; remove it",
    ),
    Refusal(
        "merging a prompt",
        {"spec.strategy.type": "PromptTuning", "spec.output.merge": True},
        "spec.output.merge: Forbidden: output.merge belongs to the strategies LoRA, QLoRA and IA3: no other adapter "
        "can be merged, and whole models are delivered anyway; remove it",
    ),
    *(_of_another(field, value, owners) for field, value, owners in BELONGINGS),
    Refusal(
        "a rank of a module without a name",
        {"spec.strategy.lora.rankPattern": {"": 8}},
        "spec.strategy.lora.rankPattern: Invalid value: keys must be names of modules, of 1 to 128 characters",
    ),
    Refusal(
        "a rank of a long name",
        {"spec.strategy.lora.rankPattern": {"x" * 129: 8}},
        "spec.strategy.lora.rankPattern: Invalid value: keys must be names of modules, of 1 to 128 characters",
    ),
    Refusal(
        "Partial without a part",
        {"spec.strategy.type": "Partial"},
        "spec.strategy.select: Required value: Partial needs strategy.select, such as {layers: {last: 2}}; to train "
        "everything use type Full",
    ),
    Refusal(
        "a selection of nothing",
        {"spec.strategy": {"type": "Partial", "select": {}}},
        "spec.strategy.select: Invalid value: set at least one of layers, modules, angle and fisher; to train "
        "everything use strategy Full",
    ),
    Refusal(
        "norms that are something else",
        {"spec.strategy": {"type": "LayerNorm", "select": {"modules": ["Attention"]}}},
        "spec.strategy.select.modules: Forbidden: LayerNorm trains norms and nothing else; remove select.modules, or "
        "use type Partial",
    ),
    Refusal(
        "norms by their angle",
        {"spec.strategy": {"type": "LayerNorm", "select": {"angle": ANGLE}}},
        "spec.strategy.select.angle: Forbidden: angle ranks attention and feed-forward parts, and LayerNorm trains "
        "neither; use select.fisher, or type Partial",
    ),
    Refusal(
        "an angle of what has none",
        _partial({"modules": ["Head", "LayerNorm"], "angle": ANGLE}),
        "spec.strategy.select.angle: Forbidden: angle ranks the attention and feed-forward parts of blocks; add one of "
        "these to modules, or remove it",
    ),
    Refusal(
        "an angle from nowhere",
        _partial({"angle": {**ANGLE, "from": "report/angles.json"}}),
        'spec.strategy.select.angle.from: Invalid value: "report/angles.json": must be job://name, or angles.json or a '
        "model's folder at s3://, pvc:// or file:///",
    ),
    Refusal(
        "an angle of the job itself",
        {"metadata.name": "same", **_partial({"angle": {**ANGLE, "from": "job://same"}})},
        "spec.strategy.select.angle.from: Forbidden: a job cannot choose its parameters by its own result; name the "
        "job that was trained before",
    ),
    *(
        Refusal(f"{name} of a part", _partial({"layers": layers}), f"spec.strategy.select.layers: {WHICH_LAYERS}")
        for name, layers in (("no blocks", {}), ("two kinds of blocks", {"first": 1, "last": 1}))
    ),
    Refusal(
        "two kinds of blocks for adapters",
        {"spec.strategy": {"type": "Adapter", "adapter": {"layers": {"first": 1, "indices": [3]}}}},
        f"spec.strategy.adapter.layers: {WHICH_LAYERS}",
    ),
    Refusal(
        "a stage of two kinds of blocks",
        _full({"everySteps": 5, "stages": [{"layers": {"last": 1, "indices": [3]}}]}),
        f"spec.strategy.unfreezing.stages[0].layers: {WHICH_LAYERS}",
    ),
    Refusal(
        "a stage that adds nothing",
        _full({"everySteps": 5, "stages": [{"modules": ["Head"]}, {}]}),
        "spec.strategy.unfreezing.stages[1]: Invalid value: set layers, modules, or both",
    ),
    *(
        Refusal(
            f"stages of {name} length",
            _full(unfreezing),
            "spec.strategy.unfreezing: Invalid value: set exactly one of unfreezing.everySteps and "
            "unfreezing.everyEpochs",
        )
        for name, unfreezing in (("no", {}), ("twice told", {"everySteps": 5, "everyEpochs": 0.5}))
    ),
    Refusal(
        "stages by name and by number",
        _full({"everySteps": 5, "layersPerStage": 2, "stages": [{"modules": ["Head"]}]}),
        "spec.strategy.unfreezing.layersPerStage: Forbidden: unfreezing.stages says what each stage adds; remove "
        "layersPerStage",
    ),
    Refusal(
        "a text for an encoder",
        {"spec.strategy": {"type": "PromptTuning", "promptTuning": {"initText": "Classify:", "encoder": "MLP"}}},
        "spec.strategy.promptTuning.initText: Forbidden: initText begins with the embeddings of a text, which an "
        "encoder does not; set encoder to None, or remove it",
    ),
    *(
        Refusal(
            f"no block and no head for {task}",
            {"spec.task.type": task, "spec.strategy": {"type": "Additive", "additive": {"blocks": 0}}},
            "spec.strategy.additive.blocks: Forbidden: additive.blocks 0 trains a new head alone, and a language model "
            "has its head already; set blocks to at least 1, or additive.head to true",
        )
        for task in ("Instruction", "CausalLM")
    ),
    Refusal(
        "recomputed prefixes",
        {"spec.strategy.type": "PrefixTuning", f"{HYPER}.gradientCheckpointing": True},
        f"{HYPER}.gradientCheckpointing: Forbidden: PrefixTuning gives every block keys and values that recomputation "
        "would lose; set gradientCheckpointing to false",
    ),
    *(refusal for strategy in ("PromptTuning", "PrefixTuning") for refusal in _of_prompts(strategy)),
)
