"""The strategy: everything may learn, and a callback decides what does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_trainer.strategies.full import Full
from finetune_trainer.strategies.green.callback import Choosing, GreenSelection
from finetune_trainer.strategies.green.learning import hold_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

    from finetune_trainer.loaded import Loaded


class Green(Full):
    """As Full, but of the parameters only those learn that a probe finds worth their gradients' cost."""

    _fresh: frozenset[str]

    def prepare(self, base: Loaded) -> PreTrainedModel:
        model = super().prepare(base)
        self._fresh = frozenset(name for name, _ in model.named_parameters() if base.is_fresh(name))
        hold_statistics(model)
        return model

    def attach(self, trainer: Trainer) -> None:
        assert self.spec.green is not None, "a resolved job has its options"
        choosing = Choosing(trainer, self.spec.green, self._fresh)
        choosing.watch()
        trainer.add_callback(GreenSelection())
        trainer.add_callback(choosing)
        if trainer.accelerator.ddp_handler is not None:
            # What does not learn gets no gradient to wait for.
            trainer.accelerator.ddp_handler.find_unused_parameters = True
