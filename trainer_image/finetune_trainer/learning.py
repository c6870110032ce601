"""Which parameters learn at the moment, for strategies and schedules that change it while training.

Everything that ever learns is in the optimizer from the start, with its moments: then it can be saved and restored at
any time, sharded or not, and what has not begun is left alone since it has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

COMPILED_PREFIX = "_orig_mod."
"""What torch.compile puts before the names of a model's parameters."""


def learn(model: nn.Module, names: Collection[str]) -> None:
    """Let exactly these parameters learn; the others get no gradient, so no optimizer touches them, nor decays them."""
    let_go(model)
    for name, parameter in plainly_named(model):
        parameter.requires_grad_(name in names)
        if name not in names:
            parameter.grad = None


def plain(name: str) -> str:
    """The name that a module or parameter had before recomputation or compilation put modules in between."""
    return name.replace(_CHECKPOINT_PREFIX, "").replace(COMPILED_PREFIX, "")


def let_go(model: nn.Module) -> None:
    """Have the model's parameters be the shards that the optimizer holds, not what the last pass has gathered.

    What lies outside of the blocks stays gathered after a pass without gradients.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def plainly_named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters by their plain names."""
    return ((plain(name), parameter) for name, parameter in model.named_parameters())


class LeanRecomputationCallback(TrainerCallback):
    """Lets the gradient end at the lowest parameter that learns, with recomputation as without.

    The library has the embedding's output ask for a gradient, which only the reentrant kind of recomputation needs; all
    frozen blocks below what learns would be gone through backwards for nothing.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        if hasattr(model, "disable_input_require_grads"):
            model.disable_input_require_grads()


def allow_pauses(trainer: Trainer) -> None:
    """Let ranks not wait for gradients of what does not learn; called before the trainer wraps its model."""
    if trainer.accelerator.ddp_handler is not None:
        trainer.accelerator.ddp_handler.find_unused_parameters = True


def await_what_learns(trainer: Trainer, probe: Callable[[Any], Mapping[str, torch.Tensor]]) -> None:
    """Let ranks wait for the gradients of all that learns, if the model's answer depends on all of it.

    Args:
        probe: gives inputs of a few rows, without labels.
    """
    if trainer.accelerator.ddp_handler is None:
        return
    model = trainer.model
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with trainer.accelerator.autocast():
        if not learning <= _parameters_behind(model, probe(model)):
            allow_pauses(trainer)


def _parameters_behind(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> set[int]:
    """Ids of the parameters that the logits depend on, by the graph that autograd makes of a forward pass."""
    training = model.training
    # In eval mode: running statistics stay, and no block is left out at random.
    model.eval()
    with torch.enable_grad():
        left = [model(**inputs).logits.grad_fn]
    model.train(training)
    seen: set[Any] = {None}
    found: set[int] = set()
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        left += [following for following, _ in node.next_functions]
    return found


def begin(model: nn.Module, optimizer: Optimizer, names: Collection[str]) -> None:
    """Make ready that any of these parameters may begin to learn at any step; leaves all of them learning."""
    learn(model, names)
    if isinstance(model, FSDPModule):
        # It looks for the precision of gradients once, among those that learn at that time.
        model._get_fsdp_state()._lazy_init()
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
    state = optimizer.state.get(parameter, {})
    if "step" in state:
        state["step"] = torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0
