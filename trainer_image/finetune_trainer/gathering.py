"""Tensors between their shards and their whole: for checkpoints and the export. Nothing here is needed where nothing is
sharded, and everything does nothing then."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from finetune_trainer.learning import let_go, plain, plainly_named


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
        lead = plain(f"{prefix}." if prefix else "")
        own = {name for name, _ in module.named_parameters(recurse=False)}
        if any(lead + name in learning for name in own):
            persistent = module.state_dict(keep_vars=True)
            buffers = {name: buffer for name, buffer in module.named_buffers(recurse=False) if name in persistent}
            state |= {lead + name: buffer.detach() for name, buffer in buffers.items()}
    return state
