"""PrefixTuning: learned keys and values before those of the text, in every block; delivered as an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_api.strategy import PrefixTuningOptions
from finetune_trainer.strategies.virtual_tokens import VirtualTokensStrategy

if TYPE_CHECKING:
    from peft import PrefixTuningConfig

    from finetune_trainer.loaded import Loaded


class PrefixTuning(VirtualTokensStrategy):
    """Keys and values (Li and Liang, 2021), themselves or through a small network that is not delivered."""

    @property
    def options(self) -> PrefixTuningOptions:
        assert self.spec.prefix_tuning is not None, "a resolved job has its options"
        return self.spec.prefix_tuning

    @property
    def virtual_tokens(self) -> int:
        return self.options.tokens

    def config(self, base: Loaded) -> PrefixTuningConfig:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type=base.peft_task,
            num_virtual_tokens=self.options.tokens,
            prefix_projection=self.options.projection,
            # PEFT's own beginning is drawn with a deviation of 1, a hundred times what keys and values have: training
            # first has to repair the model (loss 11.6 where it was 3.9, with SmolLM2-135M).
            init_weights="zero",
            modules_to_save=list(base.fresh) or None,
        )
