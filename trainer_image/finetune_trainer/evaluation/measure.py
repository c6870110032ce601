"""What is measured of a model before and after training, on the same held-out rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finetune_api.contract import Stage
from finetune_trainer.evaluation.answers import answers
from finetune_trainer.evaluation.held_out import METRICS

if TYPE_CHECKING:
    from finetune_trainer.runtime import Context
    from finetune_trainer.session import Session


@dataclass(frozen=True)
class Measured:
    """Metrics by name, and an answer to each of the held-out prompts."""

    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)


def measure(context: Context, session: Session, what: str) -> Measured:
    """Evaluate the model as it is now; nothing where no rows are held out.

    Args:
        what: which model it is, for people.

    Raises:
        StoppedError: SIGTERM came.
    """
    trainer, prepared = session.trainer, session.prepared
    if prepared.validation is None:
        return Measured()
    context.reporter.stage(Stage.EVALUATING, what)
    found = trainer.evaluate()
    context.stop.check()
    metrics = {name: found[name] for name in METRICS}
    context.reporter.update(metrics=metrics)

    def beat() -> None:
        context.stop.check()
        context.reporter.beat()

    with trainer.accelerator.autocast():
        spoken = answers(
            trainer.model,
            session.tokenizer,
            prepared.samples,
            eos_token_ids=prepared.eos_token_ids,
            positions=context.job.spec.hyperparameters.max_length,
            beat=beat,
        )
    return Measured(metrics, spoken)
