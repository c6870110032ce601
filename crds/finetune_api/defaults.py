"""Defaults that depend on other fields: resolved here, shown by `finetune plan` and written into job.json."""

from __future__ import annotations

from finetune_api.job import FineTuneJob, LoraOptions, QuantizationOptions, StrategyType, TaskType

LEARNING_RATE = {StrategyType.FULL: 2e-5, StrategyType.LORA: 2e-4, StrategyType.QLORA: 2e-4}
"""Usual peak rates: adapters start from zero and bear ten times what whole weights do."""


def resolve(job: FineTuneJob) -> FineTuneJob:
    """The job with everything filled in that its strategy, task and hardware imply; idempotent, the input is kept."""
    resolved = job.model_copy(deep=True)
    _resolve_strategy(resolved)
    _resolve_hyperparameters(resolved)
    s3 = resolved.spec.storage.s3
    if s3.path_style is None:
        s3.path_style = s3.endpoint is not None
    return resolved


def _resolve_strategy(job: FineTuneJob) -> None:
    strategy = job.spec.strategy
    if strategy.type in (StrategyType.LORA, StrategyType.QLORA) and strategy.lora is None:
        strategy.lora = LoraOptions()
    if strategy.type is StrategyType.QLORA and strategy.quantization is None:
        strategy.quantization = QuantizationOptions()


def _resolve_hyperparameters(job: FineTuneJob) -> None:
    spec, values = job.spec, job.spec.hyperparameters
    if values.learning_rate is None:
        values.learning_rate = LEARNING_RATE[spec.strategy.type]
    if values.eval_batch_size is None:
        values.eval_batch_size = values.per_device_batch_size
    if values.packing is None:
        values.packing = spec.task.type is TaskType.CAUSAL_LM
    if values.gradient_checkpointing is None:
        values.gradient_checkpointing = spec.resources.gpus_per_node > 0
