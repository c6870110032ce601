"""Steps that leave no trace: everything that they change is put back, to the bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from transformers import Trainer

TALLIES = ("_metrics", "_total_train_tokens")
"""What TRL's trainers count in every forward pass."""


@contextmanager
def unseen(trainer: Trainer) -> Iterator[None]:
    """Put back generators, buffers such as running statistics, the loss scale, and what the trainer has counted."""
    buffers = [(buffer, buffer.clone()) for buffer in trainer.model.buffers()]
    tallies = {name: copy.deepcopy(getattr(trainer, name)) for name in TALLIES if hasattr(trainer, name)}
    scaler = trainer.accelerator.scaler
    scale = scaler.state_dict() if scaler is not None else None
    try:
        with _same_generators(trainer.args.device):
            yield
    finally:
        trainer.model.zero_grad()
        for buffer, before in buffers:
            buffer.copy_(before)
        for name, tally in tallies.items():
            setattr(trainer, name, tally)
        if scaler is not None:
            scaler.load_state_dict(scale)


@contextmanager
def _same_generators(device: torch.device) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def undone(optimizer: Optimizer, parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Put back weights, moments and step counters of what learns; yields the weights as they were."""
    weights = [parameter.detach().clone() for parameter in parameters]
    states = [_copy(optimizer.state.get(parameter, {})) for parameter in parameters]
    groups = [_copy(group) for group in optimizer.param_groups]
    try:
        yield weights
    finally:
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            _put_back(group, before)
        for parameter, weight, state in zip(parameters, weights, states, strict=True):
            parameter.detach().copy_(weight)
            _put_back(optimizer.state.get(parameter, {}), state)


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else copy.copy(value)
        for name, value in state.items()
        if name != "params"
    }


def _put_back(state: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in before.items():
        if isinstance(value, Tensor) and isinstance(state[name], Tensor):
            state[name].copy_(value)
        else:
            state[name] = value
