"""Which parameters learn at the moment, with everything else left as it is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer


def learn(model: nn.Module, names: Collection[str]) -> None:
    """Let exactly these parameters learn; the others get no gradient, so no optimizer touches them, nor decays them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Otherwise what was gathered for the last forward pass is marked, and not what the optimizer holds.
            module.reshard()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name not in names:
            parameter.grad = None


def hold_statistics(model: nn.Module) -> None:
    """Let batch norms whose weight and bias don't learn keep their running statistics, whatever mode is set."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(_hold)


def _hold(module: nn.Module, _: Any) -> None:
    own = list(module.parameters(recurse=False))
    if module.training and own and not any(parameter.requires_grad for parameter in own):
        module.eval()


def begin(model: nn.Module, optimizer: Optimizer) -> None:
    """Make ready that any parameter may begin to learn at any step; leaves all of them learning."""
    learn(model, {name for name, _ in model.named_parameters()})
    if isinstance(model, FSDPModule):
        # It looks for the precision of gradients once, among those that learn at that time.
        model._get_fsdp_state()._lazy_init()
    if hasattr(model, "disable_input_require_grads"):
        # Set for the reentrant kind of recomputation, this would let the gradient flow down to the embedding always.
        model.disable_input_require_grads()
    create_moments(optimizer)


@torch.no_grad()
def create_moments(optimizer: Optimizer) -> None:
    """Give every parameter without state that which it would have at its first step: zeros, and no steps counted.

    Sharded optimizers can only be saved and restored whole.
    """
    for group in optimizer.param_groups:
        rate, group["lr"] = group["lr"], 0.0
        for parameter in group["params"]:
            if not optimizer.state.get(parameter):
                _create(optimizer, parameter)
        group["lr"] = rate


def _create(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    # No optimizer of torch offers it; all of them do it in the first step.
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parameter.grad = None
    parameter.copy_(before)
    state = optimizer.state[parameter]
    if "step" in state:
        state["step"] = torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0
