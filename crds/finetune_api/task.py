"""What is learned."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field

from finetune_api.common import UNIQUE, Message, cel, only, ruled


class TaskType(str, Enum):
    INSTRUCTION = "Instruction"
    CAUSAL_LM = "CausalLM"
    SEQUENCE_CLASSIFICATION = "SequenceClassification"
    REGRESSION = "Regression"
    IMAGE_CLASSIFICATION = "ImageClassification"
    REWARD_MODELING = "RewardModeling"
    PREFERENCE_OPTIMIZATION = "PreferenceOptimization"
    POLICY_OPTIMIZATION = "PolicyOptimization"
    EVALUATION = "Evaluation"


LANGUAGE = (TaskType.INSTRUCTION, TaskType.CAUSAL_LM)
"""Tasks that learn the next token."""
CLASSIFICATION = (TaskType.SEQUENCE_CLASSIFICATION, TaskType.IMAGE_CLASSIFICATION)
SUPERVISED = (*LANGUAGE, TaskType.SEQUENCE_CLASSIFICATION, TaskType.REGRESSION, TaskType.IMAGE_CLASSIFICATION)


class TaskSpec(Message):
    """What is learned."""

    model_config = ruled(
        cel(
            "!has(self.labels) || self.type in ['SequenceClassification', 'ImageClassification']",
            "task.labels belongs to the types SequenceClassification and ImageClassification; remove it",
            at=".labels",
        ),
        cel(
            "!self.multiLabel || self.type == 'SequenceClassification'",
            "task.multiLabel belongs to the type SequenceClassification; remove it",
            at=".multiLabel",
        ),
    )

    type: Annotated[TaskType, Field(json_schema_extra=only([kind.value for kind in SUPERVISED], "task type"))] = Field(
        description="Instruction: answers to instructions and conversations, with the loss on the assistant's words "
        "only. CausalLM: the next token of plain text. SequenceClassification: the class of a text, or of two. "
        "Regression: a number for a text. ImageClassification: the class of an image."
    )
    labels: list[Annotated[str, Field(min_length=1, max_length=128)]] | None = Field(
        None,
        min_length=2,
        max_length=4096,
        description="The classes, in the order of the model's outputs; absent: those of the data, sorted, or as the "
        "model has them if they are the same. A model that has exactly these in this order keeps its head, any other "
        "gets a new one. The data may also give their numbers, from 0, if no name is a whole number.",
        json_schema_extra=UNIQUE,
    )
    multi_label: bool = Field(False, description="A text may have several classes, or none: its label is a list.")
