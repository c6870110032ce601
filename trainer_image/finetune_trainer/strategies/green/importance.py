"""How much each tensor lowers the loss, found by an optimizer step that is undone."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from finetune_trainer.errors import DivergedError
from finetune_trainer.learning import plainly_named
from finetune_trainer.strategies.green.costs import Vector
from finetune_trainer.strategies.green.undo import undone

if TYPE_CHECKING:
    from transformers import Trainer


class Step(NamedTuple):
    """The data of one optimizer step: its micro-batches, and the labels in all of them, over all ranks."""

    batches: list[dict[str, Any]]
    items: Tensor | int | None


def importance(trainer: Trainer, step: Step) -> dict[str, float]:
    """I_k = -sum(g1 * (w1 - w0)), divided by the largest |I| (arXiv 2309.13192, section 3.2).

    w1 is what a real step of the optimizer makes of w0, g1 the gradient of the same data at w1. So it holds what
    moments, rates of groups, weight decay and clipping make of a gradient. Two departures: the step is taken at the
    peak of the learning rate, since a warm-up begins with 0, which would show nothing (a common factor hardly matters);
    and where the step has overshot, so that no tensor has lowered the loss, g0 stands for g1. All micro-batches of the
    step take part. Everything is put back, but for gradients and what `unseen` puts back.

    Args:
        trainer: its model has exactly the candidates learning, without gradients.

    Returns:
        For every candidate, the same on all ranks.
    """
    named = {name: it for name, it in plainly_named(trainer.model) if it.requires_grad}
    parameters, optimizer = list(named.values()), trainer.optimizer.optimizer
    with undone(optimizer, parameters) as before:
        _gradients(trainer, step, parameters)
        torch.nn.utils.clip_grad_norm_(parameters, trainer.args.max_grad_norm or math.inf)
        _step_at_peak(optimizer)
        at_start = _gains(parameters, before)
        _gradients(trainer, step, parameters)
        at_end = _gains(parameters, before)
    values = _first_useful(_agreed(at_end), _agreed(at_start))
    return dict(zip(named, values / np.abs(values).max(), strict=True))


def _gradients(trainer: Trainer, step: Step, parameters: list[nn.Parameter]) -> None:
    """Of the whole step, summed over its micro-batches and averaged over the ranks, without a loss scale."""
    scaler = trainer.accelerator.scaler
    while True:
        trainer.model.zero_grad()
        for number, inputs in enumerate(step.batches, start=1):
            last = number == len(step.batches)
            with nullcontext() if last else trainer.accelerator.no_sync(trainer.model_wrapped):
                _backward(trainer, inputs, step.items)
        if scaler is None or _unscale(parameters, scaler.get_scale()) or scaler.get_scale() <= 1:
            return
        # Infinite gradients are part of the search for the scale; training goes through it by itself.
        scaler.update(scaler.get_scale() / 16)


def _backward(trainer: Trainer, inputs: dict[str, Any], items: Tensor | int | None) -> None:
    try:
        trainer.training_step(trainer.model_wrapped, inputs, items)
    except DivergedError:
        # The gradients are there and show it. At w0 the step that follows raises it again; w1 is never trained from.
        return


def _unscale(parameters: list[nn.Parameter], scale: float) -> bool:
    """Whether the gradients are finite."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        gradient.div_(scale)
    return math.isfinite(_whole(torch.nn.utils.get_total_norm(gradients)))


def _step_at_peak(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", group["lr"])
    optimizer.step()


@torch.no_grad()
def _gains(parameters: list[nn.Parameter], before: list[Tensor]) -> Vector:
    """(K,): how much the loss falls by each tensor's change, judged by the gradients as they are now."""
    return np.array(
        [
            -_whole((it.grad * (it - weight)).sum()) if it.grad is not None else 0.0
            for it, weight in zip(parameters, before, strict=True)
        ]
    )


def _whole(scalar: Tensor) -> float:
    return float(scalar.full_tensor() if isinstance(scalar, DTensor) else scalar)


def _agreed(values: Vector) -> Vector:
    """The mean over all ranks, which must choose the same."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, values)
    return np.mean(everywhere, axis=0)


def _first_useful(*candidates: Vector) -> Vector:
    """The first that is finite and has something to gain; otherwise all tensors are worth the same."""
    useful = (values for values in candidates if np.isfinite(values).all() and values.max() > 0)
    return next(useful, np.ones_like(candidates[0]))
