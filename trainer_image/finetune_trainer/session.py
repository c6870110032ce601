"""From the spec to a trainer that is ready: files, tokenizer, rows, model, strategy, task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from transformers import set_seed

from finetune_api.contract import Stage
from finetune_trainer.arguments import refuse_what_cannot_work, training_arguments
from finetune_trainer.callbacks import ProgressCallback, StopCallback, StopwatchCallback
from finetune_trainer.data.preparation import Prepared, prepare
from finetune_trainer.hardware import Compute
from finetune_trainer.inputs import BaseFiles, fetch_dataset
from finetune_trainer.model import (
    check_positions,
    load_config,
    load_tokenizer,
    load_weights,
    override_dropout,
    parameter_counts,
    size_in_words,
)
from finetune_trainer.strategies import Strategy, strategy_of
from finetune_trainer.tasks import task_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from finetune_trainer.runtime import Context
    from finetune_trainer.storage import Store
    from finetune_trainer.tasks.language_model import LanguageModelTrainer


@dataclass(frozen=True)
class Session:
    """Everything that training and delivery need.

    Attributes:
        config: the base's configuration as it was read, with the dropout that the spec asks for.
        parameters: (trainable, all).
    """

    base: BaseFiles
    config: PretrainedConfig
    compute: Compute
    strategy: Strategy
    prepared: Prepared
    parameters: tuple[int, int]
    trainer: LanguageModelTrainer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return cast("PreTrainedTokenizerBase", self.trainer.processing_class)


def open_session(context: Context, store: Store, base: BaseFiles) -> Session:
    """Prepare everything up to the first step.

    Raises:
        TrainerError: what the spec asks for cannot work, with the field's name.
    """
    spec = context.job.spec
    compute = Compute.of(spec)
    refuse_what_cannot_work(spec.hyperparameters, compute.hardware)
    config = load_config(base.folder, spec.model)
    check_positions(config, spec.hyperparameters.max_length)
    override_dropout(config, spec.hyperparameters.dropout)
    tokenizer = load_tokenizer(base.folder, spec.model, config)
    prepared = _prepare(context, store, tokenizer)
    strategy, task = strategy_of(spec.strategy), task_of(spec.task.type)
    model = _model(context, base, config, compute, strategy)
    model.generation_config.eos_token_id = ends_of(model, prepared.eos_token_ids)
    task.check(model, prepared)
    context.stop.check()
    parameters = parameter_counts(model)
    _tell(context, parameters)
    arguments = training_arguments(spec, prepared, compute, context.scratch)
    callbacks = [ProgressCallback(context.reporter), StopCallback(context.stop), StopwatchCallback()]
    trainer = task.trainer(model, prepared, tokenizer, arguments, callbacks)
    return Session(base, config, compute, strategy, prepared, parameters, trainer)


def _prepare(context: Context, store: Store, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    files, validation_files = fetch_dataset(context, store)
    context.stop.check()
    context.reporter.stage(Stage.PREPARING)

    def progress(part: str, rows: int) -> None:
        context.stop.check()
        context.reporter.stage(Stage.PREPARING, f"{part} rows: {rows:,}")

    spec = context.job.spec
    prepared = prepare(
        files,
        spec.dataset,
        spec.task.type,
        tokenizer,
        max_length=spec.hyperparameters.max_length,
        seed=spec.hyperparameters.seed,
        scratch=context.scratch,
        validation_files=validation_files,
        packing=bool(spec.hyperparameters.packing),
        samples=spec.evaluation.samples,
        progress=progress,
    )
    for warning in prepared.report.get("warnings", []):
        context.reporter.warn(warning)
    return prepared


def _model(
    context: Context, base: BaseFiles, config: PretrainedConfig, compute: Compute, strategy: Strategy
) -> PreTrainedModel:
    context.stop.check()
    spec = context.job.spec
    context.reporter.stage(Stage.LOADING, spec.model.uri)
    weights = load_weights(
        base.folder,
        spec.model,
        config,
        dtype=strategy.weights_dtype(compute.dtype),
        attention=compute.attention,
        quantization=strategy.quantization(compute.dtype),
    )
    # The adapter's first values are drawn here.
    set_seed(spec.hyperparameters.seed)
    return strategy.prepare(weights)


def _tell(context: Context, parameters: tuple[int, int]) -> None:
    trainable, total = parameters
    context.reporter.update(trainable_parameters=trainable, total_parameters=total)
    detail = f"{size_in_words(trainable)} of {size_in_words(total)} parameters learn"
    context.reporter.stage(Stage.LOADING, detail)


def ends_of(model: PreTrainedModel, learned: list[int]) -> list[int]:
    """Tokens that end generation: what the training data ends answers with, and what ended them before."""
    known = model.generation_config.eos_token_id
    before = [known] if isinstance(known, int) else list(known or [])
    return list(dict.fromkeys([*learned, *before]))
