"""Tasks: what is learned. A task builds the trainer; it knows nothing of strategies."""

from __future__ import annotations

from finetune_api.job import TaskType
from finetune_trainer.tasks.language_model import LanguageModelTask

__all__ = ["LanguageModelTask", "task_of"]

TASKS = {TaskType.INSTRUCTION: LanguageModelTask, TaskType.CAUSAL_LM: LanguageModelTask}
"""Both learn the next token; that an instruction's words are not learned is in the labels of the data."""


def task_of(kind: TaskType) -> LanguageModelTask:
    """The task of a spec."""
    return TASKS[kind]()
