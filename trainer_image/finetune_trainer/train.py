"""The worker: from the spec to a verified result in the bucket."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import disable_progress_bars
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from finetune_api.contract import CheckpointRef, OutputRef, Result, Stage
from finetune_trainer.arguments import refuse_what_cannot_work, training_arguments
from finetune_trainer.callbacks import ProgressCallback, StopCallback, StopwatchCallback, trained_seconds
from finetune_trainer.checkpoints import Checkpoints, Manifest
from finetune_trainer.data.preparation import Prepared, prepare
from finetune_trainer.errors import DivergedError, StoppedError
from finetune_trainer.evaluation.answers import answers
from finetune_trainer.export import Exporter, probe_of, size_in_words
from finetune_trainer.hardware import Compute
from finetune_trainer.inputs import BaseFiles, fetch_dataset, fetch_model
from finetune_trainer.model import (
    check_positions,
    load_config,
    load_tokenizer,
    load_weights,
    override_dropout,
    parameter_counts,
)
from finetune_trainer.report import Report, card, page
from finetune_trainer.result import Baseline, Output, samples, versions
from finetune_trainer.runtime import Context
from finetune_trainer.storage import Store
from finetune_trainer.strategies import Strategy, strategy_of
from finetune_trainer.tasks import task_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from finetune_trainer.tasks.language_model import LanguageModelTrainer


def main(context: Context) -> None:
    """Train the job of the context and deliver the result.

    Raises:
        TrainerError: with the exit code that tells the operator what to do; StoppedError after SIGTERM, when
            everything that matters is saved.
    """
    # The reporter tells how far things are; bars that redraw themselves only fill a pod's log.
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    with Store.connect(os.environ) as store:
        output = Output(store, context.job)
        result = output.finished() or Run(context, store, output).result()
    context.result_file.write_text(result.model_dump_json(by_alias=True))
    context.reporter.stage(Stage.FINISHED, result.output.uri)


@dataclass
class Run:
    """One attempt at a job."""

    context: Context
    store: Store
    output: Output

    def __post_init__(self) -> None:
        self.spec = self.context.job.spec
        self.compute = Compute.of(self.spec)
        self.strategy: Strategy = strategy_of(self.spec.strategy)
        refuse_what_cannot_work(self.spec.hyperparameters, self.compute.hardware)

    def result(self) -> Result:
        """The whole run, from files to a verified result."""
        base = fetch_model(self.context, self.store)
        config, tokenizer = self._read(base)
        prepared = self._prepare(tokenizer)
        model = self._model(base, config, prepared)
        checkpoints = self._checkpoints(base)
        try:
            trainer = self._trainer(model, tokenizer, prepared)
            trainer.checkpoints = checkpoints
            checkpoints.refuse_foreign_output()
            baseline = self._baseline(trainer, prepared)
            self._train(trainer, checkpoints)
        finally:
            checkpoints.close()
        return self._deliver(base, config, trainer, prepared, baseline)

    def _read(self, base: BaseFiles) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
        values = self.spec.hyperparameters
        config = load_config(base.folder, self.spec.model)
        check_positions(config, values.max_length)
        override_dropout(config, values.dropout)
        return config, load_tokenizer(base.folder, self.spec.model, config)

    def _prepare(self, tokenizer: PreTrainedTokenizerBase) -> Prepared:
        files, validation_files = fetch_dataset(self.context, self.store)
        self.context.stop.check()
        self.context.reporter.stage(Stage.PREPARING)
        values = self.spec.hyperparameters
        prepared = prepare(
            files,
            self.spec.dataset,
            self.spec.task.type,
            tokenizer,
            max_length=values.max_length,
            seed=values.seed,
            scratch=self.context.scratch,
            validation_files=validation_files,
            packing=bool(values.packing),
            samples=self.spec.evaluation.samples,
            progress=self._prepared_rows,
        )
        for warning in prepared.report.get("warnings", []):
            self.context.reporter.warn(warning)
        return prepared

    def _prepared_rows(self, part: str, rows: int) -> None:
        self.context.stop.check()
        self.context.reporter.stage(Stage.PREPARING, f"{part} rows: {rows:,}")

    def _model(self, base: BaseFiles, config: PretrainedConfig, prepared: Prepared) -> torch.nn.Module:
        self.context.stop.check()
        self.context.reporter.stage(Stage.LOADING, self.spec.model.uri)
        weights = load_weights(
            base.folder,
            self.spec.model,
            config,
            dtype=self.strategy.weights_dtype(self.compute.dtype),
            attention=self.compute.attention,
            quantization=self.strategy.quantization(self.compute.dtype),
        )
        weights.generation_config.eos_token_id = ends_of(weights, prepared.eos_token_ids)
        task_of(self.spec.task.type).check(weights, prepared)
        # The adapter's first values are drawn here.
        set_seed(self.spec.hyperparameters.seed)
        model = self.strategy.prepare(weights)
        trainable, total = parameter_counts(model)
        self.context.reporter.update(trainable_parameters=trainable, total_parameters=total)
        self.context.reporter.stage(
            Stage.LOADING, f"{size_in_words(trainable)} of {size_in_words(total)} parameters learn"
        )
        return model

    def _checkpoints(self, base: BaseFiles) -> Checkpoints:
        context, metadata = self.context, self.context.job.metadata
        identity = Manifest(
            step=0,
            job=metadata.name,
            uid=metadata.uid,
            attempt=context.attempt,
            world_size=context.world_size,
            base_digest=base.digest,
            versions=versions(),
        )
        return Checkpoints(
            self.store,
            f"{self.output.root}/checkpoints",
            identity,
            keep=lambda: self.spec.checkpoint.keep,
            on_commit=self._committed,
        )

    def _committed(self, checkpoint: CheckpointRef) -> None:
        self.context.reporter.update(checkpoint=checkpoint)

    def _trainer(
        self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prepared: Prepared
    ) -> LanguageModelTrainer:
        context = self.context
        context.stop.check()
        arguments = training_arguments(self.spec, prepared, self.compute, context.scratch)
        callbacks = [ProgressCallback(context.reporter), StopCallback(context.stop), StopwatchCallback()]
        task = task_of(self.spec.task.type)
        return task.trainer(model, prepared, tokenizer, arguments, callbacks)

    def _baseline(self, trainer: LanguageModelTrainer, prepared: Prepared) -> Baseline:
        known = self.output.baseline()
        if known is not None or prepared.validation is None:
            return known or Baseline(uid=self.context.job.metadata.uid)
        metrics, found = self._evaluate(trainer, prepared, "the model before training")
        baseline = Baseline(uid=self.context.job.metadata.uid, metrics=metrics, answers=found)
        self.output.keep_baseline(baseline)
        return baseline

    def _evaluate(
        self, trainer: LanguageModelTrainer, prepared: Prepared, what: str
    ) -> tuple[dict[str, float], list[str]]:
        context = self.context
        context.reporter.stage(Stage.EVALUATING, what)
        measured = trainer.evaluate()
        context.stop.check()
        metrics = {name: measured[name] for name in ("eval_loss", "eval_perplexity")}
        context.reporter.update(metrics=metrics)
        with trainer.accelerator.autocast():
            found = answers(
                trainer.model,
                trainer.processing_class,
                prepared.samples,
                eos_token_ids=prepared.eos_token_ids,
                positions=self.spec.hyperparameters.max_length,
                beat=self._still_running,
            )
        return metrics, found

    def _still_running(self) -> None:
        self.context.stop.check()
        self.context.reporter.beat()

    def _train(self, trainer: LanguageModelTrainer, checkpoints: Checkpoints) -> None:
        context = self.context
        folder = context.scratch / "restored"
        restored = checkpoints.restore(folder, context.reporter.warn)
        # Whether the baseline was measured in this attempt or an earlier one must not move the generators.
        set_seed(self.spec.hyperparameters.seed)
        try:
            self._run(trainer, restored)
        except DivergedError as error:
            # A flaw of the hardware does not come twice; the data's and the settings' do.
            checkpoints.wait()
            restored = checkpoints.restore(folder, context.reporter.warn)
            if restored is None:
                raise
            context.reporter.warn(f"{error.message}; once more from step {restored[0].step}")
            self._run(trainer, restored)
        if context.stop.agreed():
            context.reporter.stage(Stage.SAVING, f"step {trainer.state.global_step}")
            checkpoints.wait()
            raise StoppedError(f"stopped on request after step {trainer.state.global_step}, which is saved")

    def _run(self, trainer: LanguageModelTrainer, restored: tuple[CheckpointRef, Any] | None) -> None:
        if restored is None:
            trainer.train()
            return
        ref, folder = restored
        self.context.reporter.update(checkpoint=ref, step=ref.step)
        trainer.train(resume_from_checkpoint=str(folder))

    def _deliver(
        self,
        base: BaseFiles,
        config: PretrainedConfig,
        trainer: LanguageModelTrainer,
        prepared: Prepared,
        baseline: Baseline,
    ) -> Result:
        metrics: dict[str, float] = {}
        after: list[str] = []
        if prepared.validation is not None:
            metrics, after = self._evaluate(trainer, prepared, "the tuned model")
        context, model = self.context, trainer.model
        trainable, total = parameter_counts(model)
        exporter = Exporter(
            store=self.store,
            spec=self.spec,
            strategy=self.strategy,
            tokenizer=trainer.processing_class,
            base=base.folder,
            config=config,
            compute=self.compute,
            probe=probe_of(prepared.train, trainer.args.device),
            scratch=context.scratch,
            stop=self._still_running,
        )
        result = Result(
            job=context.job.metadata.name,
            uid=context.job.metadata.uid,
            output=OutputRef(uri=exporter.uri, kind=self.strategy.output_kind, report=f"{self.output.root}/report"),
            steps=trainer.state.global_step,
            epochs=trainer.state.epoch,
            metrics=metrics,
            baseline=baseline.metrics,
            checkpoint=context.reporter.snapshot().checkpoint,
            trainable_parameters=trainable,
            total_parameters=total,
            train_seconds=round(trained_seconds(trainer), 3),
            tokens=trainer.state.num_input_tokens_seen,
            samples=samples(prepared.samples, baseline.answers, after) if after else [],
            versions=versions(),
        )
        report = Report(
            result=result,
            spec=self.spec.model_copy(update={"pod_template": None}).to_wire(),
            data=prepared.report,
            history=trainer.state.log_history,
            warnings=context.reporter.snapshot().warnings,
        )
        context.reporter.stage(Stage.EXPORTING, exporter.uri)
        exporter.deliver(model, card(report, self.strategy.output_kind))
        self.output.write("report/report.json", report)
        self.output.write_text("report/index.html", page(report))
        # Last: whoever finds it can rely on everything else.
        self.output.write("result.json", result)
        return result


def ends_of(model: PreTrainedModel, learned: list[int]) -> list[int]:
    """Tokens that end generation: what the training data ends answers with, and what ended them before."""
    known = model.generation_config.eos_token_id
    before = [known] if isinstance(known, int) else list(known or [])
    return list(dict.fromkeys([*learned, *before]))
