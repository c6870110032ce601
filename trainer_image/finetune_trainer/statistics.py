"""Running statistics of batch norms: a frozen norm must not go on learning them."""

from __future__ import annotations

from typing import Any

from torch import nn

from finetune_trainer.structure.modules import is_batch_norm


def hold_frozen_statistics(model: nn.Module) -> None:
    """Keep batch norms in eval mode while none of their parameters learns, whoever puts the model into training mode.

    In training mode they would normalise by the batch and move their statistics, which are as much a part of what was
    declared frozen as the weights are. Asked in every pass, since schedules freeze and unfreeze. Norms without any
    parameters are frozen too: checkpoints hold statistics only beside what learns.
    """
    for module in model.modules():
        if is_batch_norm(module):
            module.register_forward_pre_hook(_hold)


def _hold(norm: nn.Module, inputs: Any) -> None:
    if norm.training and not any(parameter.requires_grad for parameter in norm.parameters()):
        norm.eval()
