"""The state of an optimizer by the names of parameters, so that it fits however they are numbered and divided.

Tensors go into a safetensors file under `<parameter>:<path>`, such as `lm_head.weight:exp_avg`; all else, settings of
groups and plain numbers, is small and makes up the rest. It names the sharded tensors too: a rank for whose part no row
is left finds none of them in its own file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from finetune_trainer.checkpoints.pieces import IncompleteError, Saved, box_of

SEPARATOR = ":"


def split(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, the rest) of an optimizer's state; nothing is copied."""
    state, order = optimizer.state_dict(), _order(optimizer, names)
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {}
    for index, entries in state["state"].items():
        rest[order[index]] = {}
        for path, value in _leaves(entries):
            if isinstance(value, torch.Tensor):
                tensors[f"{order[index]}{SEPARATOR}{path}"] = value
            else:
                rest[order[index]][path] = value
    groups = [group | {"params": [order[index] for index in group["params"]]} for group in state["param_groups"]]
    sharded = {
        key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items() if isinstance(tensor, DTensor)
    }
    return tensors, {"state": rest, "param_groups": groups, "sharded": sharded}


def join(optimizer: Optimizer, names: Mapping[nn.Parameter, str], saved: Saved, rest: dict[str, Any]) -> dict[str, Any]:
    """The state to load into the optimizer: of sharded tensors this rank's part.

    Raises:
        IncompleteError: what was saved is not the state of these parameters.
    """
    order = _order(optimizer, names)
    if [sorted(group["params"]) for group in rest["param_groups"]] != _grouped(optimizer, names):
        raise IncompleteError("param_groups")
    numbers = {name: index for index, name in enumerate(order)}
    parameters = {name: parameter for parameter, name in names.items()}
    state: dict[int, dict[str, Any]] = {numbers[name]: {} for name in rest["state"]}
    for name, entries in rest["state"].items():
        for path, value in entries.items():
            _put(state[numbers[name]], path, value)
    shapes = {key: shape for key, (_, shape) in rest["sharded"].items()} | saved.shapes
    for key, shape in shapes.items():
        name, path = key.rsplit(SEPARATOR, 1)
        parameter = parameters[name]
        if isinstance(parameter, DTensor) and shape == tuple(parameter.shape):
            value = _part(saved, key, parameter, rest["sharded"])
        else:
            value = saved.read(key, (0,) * len(shape), shape)
        _put(state[numbers[name]], path, value)
    groups = [group | {"params": [numbers[name] for name in group["params"]]} for group in rest["param_groups"]]
    return {"state": state, "param_groups": groups}


def _part(saved: Saved, key: str, parameter: DTensor, sharded: Mapping[str, tuple[torch.dtype, Any]]) -> torch.Tensor:
    """What of a tensor belongs to this rank's part of its parameter, which may be nothing."""
    offset, shape = box_of(parameter)
    if prod(shape):
        values = saved.read(key, offset, shape)
    else:
        values = torch.empty(shape, dtype=sharded[key][0] if key in sharded else saved.dtype(key))
    return DTensor.from_local(
        values.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _order(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> list[str]:
    """The names of its parameters in the order in which the optimizer counts them."""
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _grouped(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> list[list[str]]:
    return [sorted(names[parameter] for parameter in group["params"]) for group in optimizer.param_groups]


def _leaves(entries: Mapping[str, Any], lead: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{lead}{key}/")
        else:
            yield f"{lead}{key}", value


def _put(entries: dict[str, Any], path: str, value: Any) -> None:
    *folders, key = path.split("/")
    for folder in folders:
        entries = entries.setdefault(folder, {})
    entries[key] = value
