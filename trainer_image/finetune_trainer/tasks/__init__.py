"""Tasks: what is learned. One file each; none knows a strategy."""

from __future__ import annotations

from finetune_api.job import FineTuneJobSpec, TaskType
from finetune_trainer.tasks.base import Inputs, Task
from finetune_trainer.tasks.image_classification import ImageClassificationTask
from finetune_trainer.tasks.labeled_text import LabeledTextTask
from finetune_trainer.tasks.language_model import LanguageModelTask

__all__ = ["Inputs", "Task", "task_of"]

TASKS: dict[TaskType, type[Task]] = {
    TaskType.INSTRUCTION: LanguageModelTask,
    TaskType.CAUSAL_LM: LanguageModelTask,
    TaskType.IMAGE_CLASSIFICATION: ImageClassificationTask,
    TaskType.SEQUENCE_CLASSIFICATION: LabeledTextTask,
    TaskType.REGRESSION: LabeledTextTask,
}


def task_of(spec: FineTuneJobSpec) -> Task:
    """The task of a resolved spec."""
    return TASKS[spec.task.type](spec)
