"""The next token: instruction tuning and plain text, on TRL's SFTTrainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback
from trl import SFTTrainer

from finetune_trainer.checkpoints.trainer import CheckpointingMixin
from finetune_trainer.data.packing import collator, verify_isolation
from finetune_trainer.evaluation.held_out import HeldOutLossMixin
from finetune_trainer.tasks.finite import FiniteStepsMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig

    from finetune_trainer.data.preparation import Prepared


class LanguageModelTrainer(CheckpointingMixin, HeldOutLossMixin, FiniteStepsMixin, SFTTrainer):
    """TRL's trainer with our checkpoints, our evaluation, and no step that is not finite."""

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        """TRL writes one beside every checkpoint; ours comes with the export."""


class LanguageModelTask:
    """Builds the trainer for tokenised rows with labels."""

    def check(self, model: Any, prepared: Prepared) -> None:
        """Raise UsageError when the architecture cannot keep the documents of a pack apart."""
        if prepared.packed:
            verify_isolation(model)

    def trainer(
        self,
        model: PreTrainedModel,
        prepared: Prepared,
        tokenizer: PreTrainedTokenizerBase,
        arguments: SFTConfig,
        callbacks: list[TrainerCallback],
    ) -> LanguageModelTrainer:
        """A trainer that is ready to evaluate and train; the model's parameters learn as they are marked."""
        learning = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        trainer = LanguageModelTrainer(
            model=model,
            args=arguments,
            train_dataset=prepared.train,
            eval_dataset=prepared.validation,
            processing_class=tokenizer,
            data_collator=collator(prepared.packed, model.config.get_text_config()._attn_implementation, tokenizer),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        put_back(learning)
        return trainer


def put_back(learning: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    """Undo TRL's rounding of what learns in a quantised model to bfloat16, where small updates would be lost."""
    for parameter, data in learning:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)
