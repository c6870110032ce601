"""The strategy: everything may learn, and a callback decides what does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_trainer.learning import allow_pauses
from finetune_trainer.strategies.full import Full
from finetune_trainer.strategies.green.callback import Choosing, GreenSelection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

    from finetune_trainer.loaded import Loaded


class Green(Full):
    """As Full, but of the parameters only those learn that a probe finds worth their gradients' cost."""

    _fresh: frozenset[str]

    def prepare(self, base: Loaded) -> PreTrainedModel:
        model = super().prepare(base)
        self._fresh = frozenset(name for name, _ in model.named_parameters() if base.is_fresh(name))
        return model

    def attach(self, trainer: Trainer) -> None:
        assert self.spec.green is not None, "a resolved job has its options"
        choosing = Choosing(trainer, self.spec.green, self._fresh)
        choosing.watch()
        trainer.add_callback(GreenSelection())
        trainer.add_callback(choosing)
        allow_pauses(trainer)
