"""What is measured on held-out rows, and what follows from it."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field

from finetune_api.common import UNIQUE, Message, cel, only, ruled, rules
from finetune_api.task import CLASSIFICATION, LANGUAGE, TaskType


class Metric(str, Enum):
    PERPLEXITY = "perplexity"
    ACCURACY = "accuracy"
    PRECISION = "precision"
    RECALL = "recall"
    F1 = "f1"
    MSE = "mse"
    MAE = "mae"
    R2 = "r2"
    ROUGE = "rouge"
    BLEU = "bleu"


METRICS: dict[TaskType, tuple[Metric, ...]] = {
    **dict.fromkeys(LANGUAGE, (Metric.PERPLEXITY,)),
    **dict.fromkeys(CLASSIFICATION, (Metric.ACCURACY, Metric.PRECISION, Metric.RECALL, Metric.F1)),
    TaskType.REGRESSION: (Metric.MSE, Metric.MAE, Metric.R2),
}
"""What can be measured of a task; the default is all of it."""
GROWING = (Metric.ACCURACY, Metric.PRECISION, Metric.RECALL, Metric.F1, Metric.R2)
"""Metrics of which more is better."""
MEASURED = tuple(dict.fromkeys(metric for metrics in METRICS.values() for metric in metrics))
WATCHED = ("eval_loss", *(f"eval_{metric.value}" for metric in MEASURED))
"""What a run can be stopped and judged by."""


class EarlyStopping(Message):
    """Stop when a metric no longer gets better; what is delivered is the best step, unless output.weights says Last."""

    metric: str = Field(
        "eval_loss",
        max_length=64,
        description="eval_loss, or a metric of the task with eval_ before it, such as eval_f1.",
        json_schema_extra=rules(
            cel(
                f"self in [{', '.join(repr(name) for name in WATCHED)}]",
                f"must be one of {', '.join(WATCHED)}",
            )
        ),
    )
    patience: int = Field(3, ge=1, le=1000, description="Evaluations without improvement before the run stops.")
    min_delta: float = Field(0.0, ge=0, le=1_000_000, description="A smaller improvement is none.")


class EvaluationSpec(Message):
    """Evaluation on dataset.validation."""

    model_config = ruled(
        cel(
            "!has(self.earlyStopping) || has(self.everySteps)",
            "evaluation.earlyStopping needs evaluations while training; set evaluation.everySteps",
            at=".earlyStopping",
        ),
        cel(
            "!has(self.earlyStopping) || !has(self.metrics) || self.earlyStopping.metric == 'eval_loss' || "
            "self.metrics.exists(metric, self.earlyStopping.metric == 'eval_' + metric)",
            "earlyStopping.metric is not among evaluation.metrics, so that it would not be measured; add it there, or "
            "remove evaluation.metrics",
            at=".earlyStopping.metric",
        ),
    )

    every_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="Evaluate every so many steps; absent: only before and after training."
    )
    metrics: (
        list[Annotated[Metric, Field(json_schema_extra=only([metric.value for metric in MEASURED], "metric"))]] | None
    ) = Field(
        None,
        min_length=1,
        max_length=16,
        description="What is measured on the held-out rows, before and after training. Absent: all that the task has: "
        "perplexity; accuracy, precision, recall and f1 (the means over the classes); mse, mae and r2.",
        json_schema_extra=UNIQUE,
    )
    samples: int = Field(
        3, ge=0, le=32, description="Held-out prompts that are answered before and after training (language tasks)."
    )
    early_stopping: EarlyStopping | None = Field(None, description="Stop when a metric no longer gets better.")
