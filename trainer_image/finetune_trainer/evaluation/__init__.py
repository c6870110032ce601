"""How good the model is on rows that it does not learn from, before and after training."""

from finetune_trainer.evaluation.measured import Measured

__all__ = ["Measured"]
