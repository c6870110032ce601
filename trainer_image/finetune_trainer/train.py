"""The worker: from the spec to a verified result in the bucket."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import disable_progress_bars
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from finetune_api.contract import CheckpointRef, OutputRef, Result, Stage
from finetune_trainer.callbacks import trained_seconds
from finetune_trainer.checkpoints import Checkpoints, Manifest
from finetune_trainer.errors import DivergedError, StoppedError
from finetune_trainer.evaluation.measure import Measured, measure
from finetune_trainer.export import Exporter, probe_of
from finetune_trainer.inputs import fetch_model
from finetune_trainer.report import Report, card, page
from finetune_trainer.result import Baseline, Output, samples, versions
from finetune_trainer.runtime import load_job
from finetune_trainer.session import Session, open_session
from finetune_trainer.storage import Store

if TYPE_CHECKING:
    from finetune_trainer.runtime import Context
    from finetune_trainer.tasks.language_model import LanguageModelTrainer

Restored = tuple[CheckpointRef, Path]


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
        result = output.finished() or _run(context, store, output)
    context.result_file.write_text(result.model_dump_json(by_alias=True))
    context.reporter.stage(Stage.FINISHED, result.output.uri)


def _run(context: Context, store: Store, output: Output) -> Result:
    base = fetch_model(context, store)
    checkpoints = _checkpoints(context, store, output, base.digest)
    try:
        checkpoints.refuse_foreign_output()
        session = open_session(context, store, base)
        session.trainer.checkpoints = checkpoints
        before = _before(context, session, output)
        _train(context, session.trainer, checkpoints)
    finally:
        checkpoints.close()
    after = measure(context, session, "the tuned model")
    return _deliver(context, store, session, output, before=before, after=after)


def _checkpoints(context: Context, store: Store, output: Output, base_digest: str) -> Checkpoints:
    identity = Manifest(
        step=0,
        job=context.job.metadata.name,
        uid=context.job.metadata.uid,
        attempt=context.attempt,
        world_size=context.world_size,
        base_digest=base_digest,
        versions=versions(),
    )
    return Checkpoints(
        store,
        f"{output.root}/checkpoints",
        identity,
        # Asked at every commit: the one setting that may change under a running job.
        keep=lambda: load_job(context.job_file).spec.checkpoint.keep,
        on_commit=lambda checkpoint: context.reporter.update(checkpoint=checkpoint),
    )


def _before(context: Context, session: Session, output: Output) -> Measured:
    """The base model's measures; an earlier attempt's, where there was one."""
    known = output.baseline()
    if known is not None:
        return Measured(known.metrics, known.answers)
    measured = measure(context, session, "the model before training")
    if measured.metrics:
        uid = context.job.metadata.uid
        output.keep_baseline(Baseline(uid=uid, metrics=measured.metrics, answers=measured.answers))
    return measured


def _train(context: Context, trainer: LanguageModelTrainer, checkpoints: Checkpoints) -> None:
    """Train to the last step, from the newest complete checkpoint where there is one.

    Raises:
        StoppedError: SIGTERM ended it; the last step is saved.
        DivergedError: loss or gradient were not finite, the second time from the same checkpoint.
    """
    folder = context.scratch / "restored"
    restored = checkpoints.restore(folder, context.reporter.warn)
    # Whether the base was measured in this attempt or in an earlier one must not move the generators.
    set_seed(context.job.spec.hyperparameters.seed)
    try:
        _steps(context, trainer, restored)
    except DivergedError as error:
        checkpoints.wait()
        restored = checkpoints.restore(folder, context.reporter.warn)
        if restored is None:
            raise
        # A flaw of the hardware does not come twice; one of the data or the settings does.
        context.reporter.warn(f"{error.message}; once more from step {restored[0].step}")
        _steps(context, trainer, restored)
    if context.stop.agreed():
        context.reporter.stage(Stage.SAVING, f"step {trainer.state.global_step}")
        checkpoints.wait()
        raise StoppedError(f"stopped on request after step {trainer.state.global_step}, which is saved")


def _steps(context: Context, trainer: LanguageModelTrainer, restored: Restored | None) -> None:
    if restored is None:
        trainer.train()
        return
    checkpoint, folder = restored
    context.reporter.update(checkpoint=checkpoint, step=checkpoint.step)
    trainer.train(resume_from_checkpoint=str(folder))


def _deliver(
    context: Context, store: Store, session: Session, output: Output, *, before: Measured, after: Measured
) -> Result:
    kind = session.strategy.output_kind
    uri = f"{output.root}/{kind}"
    result = _result(context, session, OutputRef(uri=uri, kind=kind, report=f"{output.root}/report"), before, after)
    report = Report(
        result=result,
        # Pod additions may hold what somebody wanted nobody to read.
        spec=context.job.spec.model_copy(update={"pod_template": None}).to_wire(),
        data=session.prepared.report,
        history=session.trainer.state.log_history,
        warnings=context.reporter.snapshot().warnings,
    )
    context.reporter.stage(Stage.EXPORTING, uri)
    exporter = Exporter(
        store=store,
        spec=context.job.spec,
        strategy=session.strategy,
        tokenizer=session.tokenizer,
        base=session.base.folder,
        config=session.config,
        compute=session.compute,
        probe=probe_of(session.prepared.train, session.trainer.args.device),
        scratch=context.scratch,
        stop=context.stop.check,
    )
    exporter.deliver(session.trainer.model, lambda kind: card(report, kind))
    output.write("report/report.json", report)
    output.write_text("report/index.html", page(report))
    # Last: whoever finds it can rely on everything else.
    output.write("result.json", result)
    return result


def _result(context: Context, session: Session, output: OutputRef, before: Measured, after: Measured) -> Result:
    state = session.trainer.state
    trainable, total = session.parameters
    return Result(
        job=context.job.metadata.name,
        uid=context.job.metadata.uid,
        output=output,
        steps=state.global_step,
        epochs=state.epoch,
        metrics=after.metrics,
        baseline=before.metrics,
        checkpoint=context.reporter.snapshot().checkpoint,
        trainable_parameters=trainable,
        total_parameters=total,
        train_seconds=round(trained_seconds(session.trainer), 3),
        tokens=state.num_input_tokens_seen,
        samples=samples(session.prepared.samples, before.answers, after.answers),
        versions=versions(),
    )
