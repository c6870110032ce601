"""Settings that make no sense together: CEL rules over the whole spec, each with the reason and the way out.

What only the model's architecture tells (no norms in it, no linear layers) is the trainer's to refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum

from finetune_api.common import cel, missing
from finetune_api.evaluation import MEASURED, METRICS
from finetune_api.strategy import ADAPTERS, StrategyType
from finetune_api.task import CLASSIFICATION, LANGUAGE, SUPERVISED, TaskType

PROMPTS = (StrategyType.PROMPT_TUNING, StrategyType.PREFIX_TUNING)
"""Strategies that put virtual tokens before the text."""
WITHOUT_LAYERS = PROMPTS
"""Strategies whose parameters lie in no layer of the model."""
LABELED_TEXT = ("text", "textPair", "label")
FIELDS: dict[TaskType, tuple[str, ...]] = {
    TaskType.INSTRUCTION: (
        *("messages", "conversations", "tools", "system", "instruction", "input", "output", "prompt", "completion"),
    ),
    TaskType.CAUSAL_LM: ("text",),
    TaskType.SEQUENCE_CLASSIFICATION: LABELED_TEXT,
    TaskType.REGRESSION: LABELED_TEXT,
    TaskType.IMAGE_CLASSIFICATION: ("image", "label"),
}
"""Names of the fields that the formats of a task read."""


def _in(field: str, values: Iterable[Enum]) -> str:
    return f"{field} in [{', '.join(repr(value.value) for value in values)}]"


def _strategy_and_task() -> Iterator[dict[str, str]]:
    yield cel(
        f"!({_in('self.strategy.type', PROMPTS)}) || self.task.type != 'ImageClassification'",
        "PromptTuning and PrefixTuning put virtual tokens before a text, and an image has none; use LoRA, Adapter, "
        "LayerNorm or Partial",
        at=".strategy.type",
    )
    yield cel(
        f"self.strategy.type != 'Additive' || !has(self.strategy.additive) || self.strategy.additive.blocks > 0 || "
        f"self.strategy.additive.head || !({_in('self.task.type', LANGUAGE)})",
        "additive.blocks 0 trains a new head alone, and a language model has its head already; set blocks to at least "
        "1, or additive.head to true",
        at=".strategy.additive.blocks",
    )
    yield cel(
        f"!self.output.merge || {_in('self.strategy.type', ADAPTERS)}",
        "output.merge belongs to the strategies LoRA, QLoRA and IA3: no other adapter can be merged, and whole models "
        "are delivered anyway; remove it",
        at=".output.merge",
    )


def _strategy_and_training() -> Iterator[dict[str, str]]:
    hyper = "self.hyperparameters"
    yield cel(
        f"self.strategy.type != 'PrefixTuning' || !has({hyper}.gradientCheckpointing) || "
        f"!{hyper}.gradientCheckpointing",
        "PrefixTuning gives every block keys and values that recomputation would lose; set gradientCheckpointing to "
        "false",
        at=".hyperparameters.gradientCheckpointing",
    )
    yield cel(
        f"!({_in('self.strategy.type', PROMPTS)}) || !has({hyper}.packing) || !{hyper}.packing",
        "packing puts several rows into one, and only the first would see the virtual tokens of PromptTuning and "
        "PrefixTuning; set packing to false",
        at=".hyperparameters.packing",
    )
    for field in ("layerDecay", "learningRateGroups"):
        yield cel(
            f"!has({hyper}.{field}) || !({_in('self.strategy.type', WITHOUT_LAYERS)})",
            f"{field} gives rates to parts of the model, and the virtual tokens of PromptTuning and PrefixTuning lie "
            "in none; set learningRate",
            at=f".hyperparameters.{field}",
        )


def _task_and_data() -> Iterator[dict[str, str]]:
    yield cel(
        "self.task.type != 'CausalLM' || self.dataset.format in ['auto', 'text']",
        "task CausalLM learns from plain text; set dataset.format to text, or task.type to Instruction",
        at=".dataset.format",
    )
    yield cel(
        "self.task.type != 'Instruction' || !(self.dataset.format in ['text', 'labeled', 'image-folder'])",
        "task Instruction needs instructions and answers; set task.type to CausalLM for plain text, to "
        "SequenceClassification or Regression for labelled text, to ImageClassification for images",
        at=".dataset.format",
    )
    yield cel(
        "!(self.task.type in ['SequenceClassification', 'Regression']) || self.dataset.format in ['auto', 'labeled']",
        "tasks SequenceClassification and Regression learn from labelled text; set dataset.format to labeled",
        at=".dataset.format",
    )
    yield cel(
        "self.task.type != 'ImageClassification' || self.dataset.format in ['auto', 'labeled', 'image-folder']",
        "task ImageClassification learns from images; set dataset.format to image-folder, or to labeled for parquet "
        "with the columns image and label",
        at=".dataset.format",
    )
    yield from _columns()


def _columns() -> Iterator[dict[str, str]]:
    for task, fields in FIELDS.items():
        yield cel(
            f"self.task.type != '{task.value}' || "
            f"self.dataset.columns.all(name, name in [{', '.join(map(repr, fields))}])",
            f"task {task.value} reads {', '.join(fields)}; columns has these for its keys, and the names in the data "
            "for its values",
            at=".dataset.columns",
        )


def _streams() -> Iterator[dict[str, str]]:
    yield missing(
        "!self.dataset.streaming || has(self.hyperparameters.maxSteps)",
        "the length of a stream is not known beforehand; set hyperparameters.maxSteps",
        at=".hyperparameters.maxSteps",
    )
    yield cel(
        "!self.dataset.streaming || !has(self.hyperparameters.packing) || !self.hyperparameters.packing",
        "a stream is not packed; set packing or dataset.streaming to false",
        at=".hyperparameters.packing",
    )
    yield cel(
        "!self.dataset.streaming || !has(self.strategy.unfreezing) || !has(self.strategy.unfreezing.everyEpochs)",
        "the length of a stream is not known beforehand; set unfreezing.everySteps instead of everyEpochs",
        at=".strategy.unfreezing.everyEpochs",
    )
    yield missing(
        f"!self.dataset.streaming || has(self.task.labels) || !({_in('self.task.type', CLASSIFICATION)})",
        "the classes of a stream are not known beforehand; set task.labels",
        at=".task.labels",
    )


def _task_and_training() -> Iterator[dict[str, str]]:
    hyper = "self.hyperparameters"
    yield cel(
        f"{_in('self.task.type', LANGUAGE)} || !has({hyper}.packing) || !{hyper}.packing",
        "packing belongs to the tasks Instruction and CausalLM: a classifier answers once for each row; set it to "
        "false",
        at=".hyperparameters.packing",
    )
    yield cel(
        f"self.task.type != 'Regression' && !self.task.multiLabel || {hyper}.labelSmoothing == 0.0",
        "labelSmoothing spreads the probability of one class over all, and neither numbers nor several labels have "
        "one; remove it",
        at=".hyperparameters.labelSmoothing",
    )
    yield cel(
        f"!has({hyper}.neftuneAlpha) || self.task.type != 'ImageClassification'",
        "neftuneAlpha is noise on the embeddings of words, and images have none; remove it",
        at=".hyperparameters.neftuneAlpha",
    )


def _evaluation() -> Iterator[dict[str, str]]:
    yield cel(
        "!has(self.evaluation.everySteps) || has(self.dataset.validation)",
        "evaluation.everySteps needs held-out rows; set dataset.validation",
        at=".evaluation.everySteps",
    )
    yield cel(
        "!has(self.output.weights) || self.output.weights != 'Best' || has(self.evaluation.everySteps)",
        "without evaluations while training no step is known to be the best; set evaluation.everySteps, or "
        "output.weights to Last",
        at=".output.weights",
    )
    for group in (LANGUAGE, CLASSIFICATION, (TaskType.REGRESSION,)):
        yield from _metrics_of(group)


def _metrics_of(tasks: tuple[TaskType, ...]) -> Iterator[dict[str, str]]:
    """What other tasks are measured by; what no task is yet has its own refusal."""
    metrics = [metric.value for metric in METRICS[tasks[0]]]
    others = [metric.value for metric in MEASURED if metric.value not in metrics]
    names = " and ".join(task.value for task in tasks)
    yield cel(
        f"!({_in('self.task.type', tasks)}) || !has(self.evaluation.metrics) || "
        f"!self.evaluation.metrics.exists(metric, metric in [{', '.join(map(repr, others))}])",
        f"{names} can be measured by {', '.join(metrics)}; remove the others",
        at=".evaluation.metrics",
    )
    watched = ", ".join(f"eval_{metric}" for metric in metrics)
    yield cel(
        f"!({_in('self.task.type', tasks)}) || !has(self.evaluation.earlyStopping) || "
        f"!(self.evaluation.earlyStopping.metric in [{', '.join(repr(f'eval_{metric}') for metric in others)}])",
        f"{names} can be stopped by eval_loss, {watched}; set one of these",
        at=".evaluation.earlyStopping.metric",
    )


def _hardware() -> Iterator[dict[str, str]]:
    yield cel(
        "self.model.dtype != 'float16' || self.resources.gpusPerNode > 0",
        "float16 needs a GPU; set model.dtype to auto (float32 on a CPU) or bfloat16, or resources.gpusPerNode",
        at=".model.dtype",
    )
    yield cel(
        "self.model.attention != 'flash_attention_2' || "
        "(self.resources.gpusPerNode > 0 && self.model.dtype != 'float32')",
        "flash_attention_2 needs a GPU and bfloat16 or float16; set model.attention to auto",
        at=".model.attention",
    )
    yield cel(
        "self.hyperparameters.optimizer != 'pagedAdamw8bit' || self.resources.gpusPerNode > 0",
        "pagedAdamw8bit pages GPU memory and needs a GPU; set optimizer to adamw8bit (works on CPUs) or adamw",
        at=".hyperparameters.optimizer",
    )


def _sharding() -> Iterator[dict[str, str]]:
    yield cel(
        "!has(self.distributed.fsdp) || !self.distributed.fsdp.cpuOffload || self.resources.gpusPerNode > 0",
        "cpuOffload keeps shards out of GPUs, and without GPUs they are in host memory anyway; remove it, or set "
        "resources.gpusPerNode",
        at=".distributed.fsdp.cpuOffload",
    )
    sharded = "self.distributed.sharding != 'FSDP'"
    yield cel(
        f"{sharded} || !has(self.strategy.select) || !has(self.strategy.select.fisher)",
        "select.fisher picks single elements of tensors, and FSDP tears tensors apart; set sharding to DDP or Auto",
        at=".distributed.sharding",
    )
    yield cel(
        f"{sharded} || !(self.hyperparameters.optimizer in ['adamw8bit', 'pagedAdamw8bit', 'adafactor'])",
        "the 8-bit optimizers and adafactor take tensors whole, and FSDP shards the moments anyway; set optimizer to "
        "adamw, or sharding to DDP",
        at=".distributed.sharding",
    )
    yield cel(
        f"{sharded} || !self.hyperparameters.torchCompile",
        "torchCompile is not supported with FSDP yet; remove it, or set sharding to DDP",
        at=".distributed.sharding",
    )


def _topology() -> Iterator[dict[str, str]]:
    yield cel(
        "!has(self.scheduling.topologyKey) || self.resources.nodes > 1",
        "topologyKey keeps several pods together; set resources.nodes above 1, or remove it",
        at=".scheduling.topologyKey",
    )


def _elastic() -> Iterator[dict[str, str]]:
    fewer, at = "!has(self.distributed.minNodes)", ".distributed.minNodes"
    yield cel(
        f"{fewer} || self.distributed.minNodes < self.resources.nodes",
        "minNodes is a number of pods that is enough where resources.nodes find no room; set it below resources.nodes",
        at=at,
    )
    yield cel(
        # What the schema refuses is judged here too.
        f"{fewer} || self.distributed.minNodes < 1 || "
        "self.resources.nodes * self.hyperparameters.gradientAccumulationSteps % self.distributed.minNodes == 0",
        "minNodes pods must be able to share a step's batches evenly; set it to a divisor of resources.nodes x "
        "hyperparameters.gradientAccumulationSteps",
        at=at,
    )
    yield cel(
        f"{fewer} || (!has(self.scheduling.queue) && !has(self.scheduling.managedBy))",
        "a queue or another controller gives a job room as a whole; remove minNodes, or scheduling.queue and "
        "scheduling.managedBy",
        at=at,
    )


RULES = tuple(
    rule
    for family in (
        _strategy_and_task,
        _strategy_and_training,
        _task_and_data,
        _streams,
        _task_and_training,
        _evaluation,
        _hardware,
        _sharding,
        _topology,
        _elastic,
    )
    for rule in family()
)
"""All of them, in the order in which they are told."""

ALLOWED = tuple(
    (strategy, task)
    for strategy in StrategyType
    for task in SUPERVISED
    if not (strategy in PROMPTS and task is TaskType.IMAGE_CLASSIFICATION)
)
"""Every pair of strategy and task that works; the others are refused by the rules above."""
