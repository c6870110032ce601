"""The worker: from the spec to a verified result in the bucket."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from datasets import disable_progress_bars
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from finetune_api.contract import CheckpointRef, OutputRef, Result, Stage
from finetune_api.run import Sharding
from finetune_trainer import collectives
from finetune_trainer.angle import FILE as ANGLES_FILE
from finetune_trainer.angle import Angle, OtherModelError
from finetune_trainer.angle import measure as measure_angles
from finetune_trainer.angle import to_json as angles_to_json
from finetune_trainer.arguments import global_batch
from finetune_trainer.callbacks import trained_seconds
from finetune_trainer.checkpoints import Checkpoints, Manifest
from finetune_trainer.checkpoints.catalog import CorruptCheckpointError
from finetune_trainer.checkpoints.gang import gang_of
from finetune_trainer.checkpoints.trainer import WEIGHTS
from finetune_trainer.errors import DivergedError, StoppedError
from finetune_trainer.evaluation import Measured
from finetune_trainer.evaluation.course import why_to_stop
from finetune_trainer.export import Expected, Exporter, collect
from finetune_trainer.fabric import locked_memory_warning
from finetune_trainer.report import Report, card, page
from finetune_trainer.result import Output, samples, versions
from finetune_trainer.runtime import load_job
from finetune_trainer.session import Session, Start
from finetune_trainer.storage import Store

if TYPE_CHECKING:
    from finetune_trainer.runtime import Context
    from finetune_trainer.tasks.trainer import JobTrainer

Restored = tuple[CheckpointRef, Path]
SLOW_UPLOAD_SECONDS = 5.0


class Trained(NamedTuple):
    """How training ended.

    Attributes:
        step: whose weights the model has now.
        stopped_early: why it ended before its last step, if it did.
        history: what was logged until then.
    """

    step: int
    stopped_early: str
    history: list[dict[str, float]]


def main(context: Context) -> None:
    """Train the job of the context and deliver the result.

    Raises:
        TrainerError: with the exit code that tells the operator what to do; StoppedError after SIGTERM, when
            everything that matters is saved.
    """
    # The reporter tells how far things are; bars that redraw themselves only fill a pod's log.
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    if warning := locked_memory_warning(context.job.spec):
        context.reporter.warn(warning)
    with Store.connect(os.environ) as store:
        output = Output(store, context.job)
        result = output.finished() or _run(context, store, output)
    if context.is_main and result is not None:
        context.result_file.write_text(result.model_dump_json(by_alias=True))
        context.reporter.stage(Stage.FINISHED, result.output.uri)


def _run(context: Context, store: Store, output: Output) -> Result | None:
    """The result, on rank 0."""
    start = Start.of(context, store, output)
    if context.is_main:
        output.refuse_foreign()
    base = start.fetch()
    with _checkpoints(context, store, output, base.digest) as checkpoints:
        if context.is_main:
            checkpoints.refuse_other_base()
        session = start.open(base)
        session.trainer.checkpoints = checkpoints
        before = _before(context, session, output)
        _train(context, session.trainer, checkpoints, output)
        trained = _trained(context, session.trainer, checkpoints)
    after = _measure(context, session, "the tuned model")
    collected = None
    if session.sharding is Sharding.FSDP:
        context.reporter.stage(Stage.EXPORTING, "gathering the shards")
        collected = collect(context, session, partial(start.rebuild, session))
    if not context.is_main:
        # Done: what is delivered is rank 0's to write, and its node ends with OK only when it has.
        return None
    return _deliver(context, store, session, output, trained, collected=collected, before=before, after=after)


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
        output.checkpoints,
        identity,
        # Asked at every commit: the one setting that may change under a running job.
        keep=lambda: load_job(context.job_file).spec.checkpoint.keep,
        on_commit=lambda checkpoint: context.reporter.update(checkpoint=checkpoint),
        on_wait=partial(_tell_wait, context),
        gang=gang_of(context),
    )


def _tell_wait(context: Context, seconds: float, moved: bool) -> None:
    """Say that the training waits for the upload of a checkpoint, once it is worth a word; what hangs shows no life."""
    if moved:
        context.reporter.beat()
    if seconds >= SLOW_UPLOAD_SECONDS and not context.stop.requested:
        context.reporter.warn(
            "training waits for the upload of checkpoints; a larger checkpoint.everySteps makes it wait less"
        )


def _before(context: Context, session: Session, output: Output) -> Measured:
    """What the tuned model is compared with; an earlier attempt's, where there was one."""
    known = collectives.first_says(output.baseline)
    if known is not None:
        return known
    with session.strategy.absent(session.trainer.model):
        measured = session.task.baseline() or _measure(context, session, "the model before training")
    if context.is_main and measured.metrics:
        output.keep_baseline(measured)
    return measured


def _measure(context: Context, session: Session, what: str) -> Measured:
    """Evaluate the model as it is now; nothing where no rows are held out.

    Args:
        what: which model it is, for people.

    Raises:
        StoppedError: SIGTERM came.
    """

    if session.prepared.validation is None:
        return Measured()
    context.reporter.stage(Stage.EVALUATING, what)
    measured = session.task.measure(session.trainer, context.alive)
    context.reporter.update(metrics=measured.metrics)
    return measured


def _train(context: Context, trainer: JobTrainer, checkpoints: Checkpoints, output: Output) -> None:
    """Train to the last step, from the newest complete checkpoint where there is one.

    A step that is not finite is tried once more, with the same rows: a flaw of the hardware does not come twice, one of
    the data or the settings does. All ranks decide alike.

    Raises:
        StoppedError: SIGTERM ended it; the last step is saved.
        DivergedError: loss or gradient were not finite, the second time from the same checkpoint.
    """
    folder = context.scratch / "restored"
    restored = checkpoints.restore(folder, context.reporter.warn)
    # Whether the base was measured in this attempt or in an earlier one must not move the generators.
    set_seed(context.job.spec.hyperparameters.seed)
    tried = collectives.first_says(output.diverged_from)
    while True:
        try:
            _steps(context, trainer, restored)
            break
        except DivergedError as error:
            checkpoints.wait()
            restored = checkpoints.restore(folder, context.reporter.warn)
            if restored is None:
                raise
            step = restored[0].step
            if step == tried:
                message = f"{error.message}, the second time after the checkpoint of step {step}"
                raise DivergedError(message, error.advice) from error
            tried = step
            if context.is_main:
                output.keep_divergence(step)
            context.reporter.warn(f"{error.message}; once more from step {step}")
    if context.stop.agreed():
        context.reporter.stage(Stage.SAVING, f"step {trainer.state.global_step}")
        checkpoints.wait()
        raise StoppedError(f"stopped on request after step {trainer.state.global_step}, which is saved")


def _steps(context: Context, trainer: JobTrainer, restored: Restored | None) -> None:
    if restored is None:
        trainer.train()
        return
    checkpoint, folder = restored
    context.reporter.update(checkpoint=checkpoint, step=checkpoint.step)
    trainer.train(resume_from_checkpoint=str(folder))


def _trained(context: Context, trainer: JobTrainer, checkpoints: Checkpoints) -> Trained:
    state, early = trainer.state, context.job.spec.evaluation.early_stopping
    history = list(state.log_history)
    why = why_to_stop(history, early) if early and state.global_step < state.max_steps else ""
    return Trained(_take_best(context, trainer, checkpoints), why, history)


def _take_best(context: Context, trainer: JobTrainer, checkpoints: Checkpoints) -> int:
    """Put the weights of the best step into the model where they are to be delivered; the step whose weights it has."""
    last, best = trainer.state.global_step, trainer.best_step
    if best is None or best == last:
        return last
    checkpoints.wait()
    context.reporter.stage(Stage.EVALUATING, f"fetching step {best}, the best one")
    try:
        trainer.take_weights(checkpoints.fetch(best, WEIGHTS, context.scratch / "best"))
    except CorruptCheckpointError as error:
        context.reporter.warn(f"step {best} was the best, but step {last} is delivered: {error.message}")
        return last
    return best


def _deliver(
    context: Context,
    store: Store,
    session: Session,
    output: Output,
    trained: Trained,
    *,
    collected: Expected | None,
    before: Measured,
    after: Measured,
) -> Result:
    kind = session.strategy.output_kind
    uri = f"{output.root}/{kind}"
    target = OutputRef(uri=uri, kind=kind, report=f"{output.root}/report")
    data = session.trainer.counted(session.prepared.report)
    for warning in data["warnings"]:
        context.reporter.warn(warning)
    result = _result(context, session, target, trained, before=before, after=after)
    report = Report(
        result=result,
        # Pod additions may hold what somebody wanted nobody to read.
        spec=context.job.spec.model_copy(update={"pod_template": None}).to_wire(),
        data=data,
        baseline=before.what,
        evaluation=after.details,
        history=trained.history,
        warnings=context.reporter.snapshot().warnings,
    )
    context.reporter.stage(Stage.EXPORTING, uri)
    exporter = Exporter(store, context.job.spec, session, context.scratch, context.alive, collected)
    delivered = exporter.deliver(lambda kind: card(report, kind, session.strategy, session.task))
    report.angles = _angles(context, session, delivered)
    if report.angles:
        output.write_text(f"report/{ANGLES_FILE}", angles_to_json(report.angles))
    output.write("report/report.json", report)
    output.write_text("report/index.html", page(report))
    # Last: whoever finds it can rely on everything else.
    output.write("result.json", result)
    return result


def _angles(context: Context, session: Session, delivered: Path) -> list[Angle]:
    """How far training has turned each block; nothing for adapters, and where blocks were added."""
    if session.strategy.output_kind != "model":
        return []
    try:
        return measure_angles(session.trainer.model, session.base.folder, delivered, context.alive)
    except OtherModelError:
        return []


def _result(
    context: Context, session: Session, output: OutputRef, trained: Trained, *, before: Measured, after: Measured
) -> Result:
    state, values, told = session.trainer.state, context.job.spec.hyperparameters, context.reporter.snapshot()
    trainable, total = session.parameters
    return Result(
        job=context.job.metadata.name,
        uid=context.job.metadata.uid,
        output=output,
        steps=state.global_step,
        epochs=state.epoch,
        exported_step=trained.step,
        stopped_early=trained.stopped_early,
        loss=told.loss,
        metrics=after.metrics,
        baseline=before.metrics,
        checkpoint=told.checkpoint,
        trainable_parameters=trainable,
        total_parameters=total,
        world_size=context.world_size,
        global_batch_size=global_batch(context.job.spec, context.world_size),
        learning_rate=values.learning_rate,
        train_seconds=round(trained_seconds(session.trainer), 3),
        tokens=state.num_input_tokens_seen,
        samples=samples(session.task.samples, before.answers, after.answers),
        versions=versions(),
    )
