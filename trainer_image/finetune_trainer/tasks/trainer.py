"""The trainers of Hugging Face with what all our runs share."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from finetune_trainer.checkpoints.trainer import CheckpointingMixin
from finetune_trainer.evaluation.held_out import HeldOutMixin
from finetune_trainer.groups import ParameterGroupsMixin
from finetune_trainer.sharding import ShardedMixin
from finetune_trainer.tasks.finite import FiniteStepsMixin
from finetune_trainer.tasks.streaming import StreamingMixin


class JobMixin(
    CheckpointingMixin,
    StreamingMixin,
    HeldOutMixin,
    FiniteStepsMixin,
    ShardedMixin,
    ParameterGroupsMixin,
):
    """Mix in before a Trainer class: our checkpoints, streams, evaluation, groups, shards, and only finite steps."""

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        """The libraries write one beside every checkpoint; ours comes with the export."""


class JobTrainer(JobMixin, Trainer):
    """For every model that computes its own loss from labels."""
