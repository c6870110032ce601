"""Tensors between their shards and their whole: for checkpoints and the export. Nothing here is needed where nothing is
sharded, and everything does nothing then."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from finetune_trainer.learning import let_go, plainly_named


def is_sharded(model: nn.Module) -> bool:
    """Whether the model is held in shards, be some of it gathered at the moment or not."""
    return isinstance(model, FSDPModule)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; of a sharded one from all ranks, which all must ask for it in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a whole tensor, which every rank has, into one that may be sharded; no rank waits for another."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            target.to_local().copy_(_share(source, target).to_local())
        else:
            target.copy_(source)


def _share(source: torch.Tensor, like: DTensor) -> DTensor:
    """A whole tensor, sharded as another one of its shape is."""
    everywhere = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(source, like.device_mesh, everywhere, run_check=False).redistribute(
        like.device_mesh, like.placements
    )


def trainable_state(model: nn.Module, learning: Collection[str]) -> dict[str, torch.Tensor]:
    """Parameters that learn and the persistent buffers beside them, by their name in the model; not copied.

    Buffers count where a module has parameters of its own that learn: running statistics move with them.

    Args:
        learning: names of all parameters that ever learn; at the moment some of them may be frozen.
    """
    let_go(model)
    state = {name: parameter.detach() for name, parameter in plainly_named(model) if name in learning}
    for prefix, module in model.named_modules():
        lead = f"{prefix}." if prefix else ""
        own = {name for name, _ in module.named_parameters(recurse=False)}
        if any(lead + name in learning for name in own):
            persistent = module.state_dict(keep_vars=True)
            buffers = {name: buffer for name, buffer in module.named_buffers(recurse=False) if name in persistent}
            state |= {lead + name: buffer.detach() for name, buffer in buffers.items()}
    return state


def gathered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, whole and on the CPU of rank 0; on the others nothing. One at a time is whole on a device."""
    return dict(_brought(tensors))


def _brought(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    keeps = not dist.is_initialized() or dist.get_rank() == 0
    for name, tensor in tensors.items():
        found = whole(tensor)
        if keeps:
            yield name, found.detach().cpu().contiguous()


def gathered_optimizer(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer with its tensors whole and on the CPU, on rank 0; on the others without tensors."""
    keeps = dist.get_rank() == 0
    moments: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        tensors = {name: value for name, value in values.items() if torch.is_tensor(value)}
        plain = {name: value for name, value in values.items() if name not in tensors}
        moments[number] = plain | gathered(tensors) if keeps else gathered(tensors)
    return {**state, "state": moments}


def spread_optimizer(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """A whole optimizer state, which every rank has, with its tensors sharded as their parameters are.

    Args:
        parameters: of the optimizer, in the order of its groups.
    """

    def spread(value: Any, like: nn.Parameter) -> Any:
        fits = torch.is_tensor(value) and isinstance(like, DTensor) and value.shape == like.shape
        return _share(value, like) if fits else value

    moments = {
        number: {name: spread(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}
