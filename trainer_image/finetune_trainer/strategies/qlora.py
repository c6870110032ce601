"""QLoRA: LoRA over a base that is held in 4 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finetune_trainer.strategies.lora import Lora

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


class QLora(Lora):
    """The base's linear layers in 4 bits (Dettmers et al., 2023), everything else as in LoRA."""

    def quantization(self, compute: torch.dtype) -> BitsAndBytesConfig | None:
        from transformers import BitsAndBytesConfig

        options = self.spec.quantization
        assert options is not None, "a resolved job has its options"
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.type.value,
            bnb_4bit_use_double_quant=options.double_quant,
            bnb_4bit_compute_dtype=compute,
        )

    def prepare(self, model: PreTrainedModel) -> torch.nn.Module:
        from peft import prepare_model_for_kbit_training

        # Norms and the head compute in float32; recomputation is switched on by the trainer, as for all strategies.
        return super().prepare(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
