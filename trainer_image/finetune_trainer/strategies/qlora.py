"""QLoRA: LoRA over a base that is held in 4 bits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from finetune_trainer.strategies.lora import Lora

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from finetune_trainer.loaded import Loaded


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

    def prepare(self, base: Loaded) -> PreTrainedModel:
        from peft import prepare_model_for_kbit_training

        keep_differentiable(base.model)
        # Norms and the head compute in float32; recomputation is switched on by the trainer, as for all strategies.
        model = prepare_model_for_kbit_training(base.model, use_gradient_checkpointing=False)
        return super().prepare(replace(base, model=model))


def keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking weights on CPUs with AVX512-BF16.

    It does so at the first forward pass in eval mode, for a faster kernel that has no derivative; a later training step
    then goes through that kernel and silently gets no gradient from it. An evaluation before training, which every job
    with held-out rows has, would so spoil the whole training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
