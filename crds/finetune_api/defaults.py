"""Defaults that depend on other fields: resolved here, shown by `finetune plan` and written into job.json."""

from __future__ import annotations

from collections.abc import Callable

from finetune_api.common import Message
from finetune_api.evaluation import METRICS
from finetune_api.hyperparameters import PACK_MIN_LENGTH
from finetune_api.job import FineTuneJob, FineTuneJobSpec, StrategyType, TaskType, Weights
from finetune_api.pairs import PROMPTS
from finetune_api.run import FsdpOptions, Sharding
from finetune_api.strategy import (
    AdditiveOptions,
    BottleneckOptions,
    GreenOptions,
    Ia3Options,
    LoraOptions,
    PrefixTuningOptions,
    PromptTuningOptions,
    QuantizationOptions,
)
from finetune_api.task import LANGUAGE

LEARNING_RATE = {
    StrategyType.FULL: 2e-5,
    StrategyType.PARTIAL: 5e-5,
    StrategyType.LORA: 2e-4,
    StrategyType.QLORA: 2e-4,
    StrategyType.ADAPTER: 5e-4,
    StrategyType.PROMPT_TUNING: 3e-2,
    StrategyType.PREFIX_TUNING: 1e-2,
    StrategyType.IA3: 5e-3,
    StrategyType.LAYER_NORM: 1e-3,
    StrategyType.ADDITIVE: 2e-4,
    StrategyType.GREEN: 5e-5,
}
"""Usual peak rates: the fewer parameters learn, and the nearer to zero they begin, the more they bear."""
OPTIONS: dict[StrategyType, dict[str, Callable[[], Message]]] = {
    StrategyType.LORA: {"lora": LoraOptions},
    StrategyType.QLORA: {"lora": LoraOptions, "quantization": QuantizationOptions},
    StrategyType.ADAPTER: {"adapter": BottleneckOptions},
    StrategyType.PROMPT_TUNING: {"prompt_tuning": PromptTuningOptions},
    StrategyType.PREFIX_TUNING: {"prefix_tuning": PrefixTuningOptions},
    StrategyType.IA3: {"ia3": Ia3Options},
    StrategyType.ADDITIVE: {"additive": AdditiveOptions},
    StrategyType.GREEN: {"green": GreenOptions},
}
"""What a strategy has of its own, to be filled in where it is absent."""


def resolve(job: FineTuneJob) -> FineTuneJob:
    """The job with everything filled in that its strategy, task and hardware imply; idempotent, the input is kept."""
    resolved = job.model_copy(deep=True)
    spec = resolved.spec
    _resolve_strategy(spec)
    _resolve_hyperparameters(spec)
    if spec.evaluation.metrics is None:
        spec.evaluation.metrics = list(METRICS.get(spec.task.type, ()))
    if spec.output.weights is None:
        spec.output.weights = Weights.LAST if spec.evaluation.every_steps is None else Weights.BEST
    if spec.distributed.fsdp is None and spec.distributed.sharding is not Sharding.DDP:
        spec.distributed.fsdp = FsdpOptions()
    spec.resources.processes_per_node = spec.resources.processes
    s3 = spec.storage.s3
    if s3.path_style is None:
        s3.path_style = s3.endpoint is not None
    return resolved


def _resolve_strategy(spec: FineTuneJobSpec) -> None:
    strategy = spec.strategy
    for field, default in OPTIONS.get(strategy.type, {}).items():
        if getattr(strategy, field) is None:
            setattr(strategy, field, default())
    unfreezing = strategy.unfreezing
    if unfreezing is not None and unfreezing.stages is None and unfreezing.layers_per_stage is None:
        unfreezing.layers_per_stage = 1


def _resolve_hyperparameters(spec: FineTuneJobSpec) -> None:
    values = spec.hyperparameters
    if values.learning_rate is None:
        values.learning_rate = LEARNING_RATE[spec.strategy.type]
    if values.eval_batch_size is None:
        values.eval_batch_size = values.per_device_batch_size
    if values.packing is None:
        packable = spec.task.type is TaskType.CAUSAL_LM and spec.strategy.type not in PROMPTS
        values.packing = packable and not spec.dataset.streaming and values.max_length >= PACK_MIN_LENGTH
    if values.gradient_checkpointing is None:
        # Of the image models only some can recompute, which is not known here.
        able = spec.strategy.type is not StrategyType.PREFIX_TUNING
        recomputable = able and spec.task.type is not TaskType.IMAGE_CLASSIFICATION
        values.gradient_checkpointing = recomputable and spec.resources.gpus_per_node > 0
    if spec.task.type not in LANGUAGE:
        spec.evaluation.samples = 0
