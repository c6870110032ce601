"""Green: within a budget of operations, the tensors learn that lower the loss most (GreenTrainer, arXiv 2309.13192)."""

from finetune_trainer.strategies.green.strategy import Green

__all__ = ["Green"]
