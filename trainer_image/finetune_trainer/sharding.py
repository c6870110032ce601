"""Parameters, gradients and moments in shards, one a rank: fully sharded data parallelism, torch's FSDP2.

The model is sharded by torch itself, before it is measured or trained; the Trainer is told that it owns its placement.
Through accelerate it would be sharded when training begins: after the base has been measured, whole, by every rank. And
its own recomputation of activations draws other dropout masks than the pass did (preserve_rng_state is off there).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from finetune_trainer.collectives import all_say, first_says
from finetune_trainer.gathering import put
from finetune_trainer.learning import let_go
from finetune_trainer.loaded import is_weightless
from finetune_trainer.structure import Structure
from finetune_trainer.structure.modules import is_batch_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import Trainer as _Base

    from finetune_api.run import FsdpOptions
    from finetune_trainer.hardware import Compute
    from finetune_trainer.runtime import Context
else:
    _Base = object


def keep_off_device(model: PreTrainedModel) -> None:
    """Have trainers leave a model where it is that will be sharded: it may not fit into a device whole."""
    model.placed_in_shards = True


@contextmanager
def loading_once_a_node() -> Iterator[None]:
    """While this lasts, only the first rank of a node loads weights; models of the others have shapes alone.

    Else a node would need room for as many whole models as it has ranks.
    """
    # transformers' own switch for it, which it shares with accelerate.
    switches = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    os.environ.update(dict.fromkeys(switches, "true"))
    try:
        yield
    finally:
        for switch in switches:
            del os.environ[switch]


def shard(model: PreTrainedModel, options: FsdpOptions, compute: Compute, context: Context) -> None:
    """Shard a model over all ranks, in place: each block is gathered for its own pass, all else for the whole one.

    Args:
        model: the same on all ranks, on the CPU; its shards end up on the devices. Where it has shapes alone it gets
            the numbers of rank 0.
    """
    lacking = is_weightless(model)
    handed_out = any(all_say(lacking))
    if handed_out:
        _hold_alike(model)
    originals = dict(_held(model)) if handed_out and context.is_main else {}
    _shard(model, options, compute, context.world_size)
    if handed_out:
        device = compute.hardware.device_of(context.local_rank)
        if lacking:
            _make_room(model, "cpu" if options.cpu_offload else device)
        _hand_out(model, originals, device, takes=lacking)


def _shard(model: PreTrainedModel, options: FsdpOptions, compute: Compute, world_size: int) -> None:
    gpu = compute.hardware.cuda
    settings: dict[str, Any] = {
        "mesh": init_device_mesh("cuda" if gpu else "cpu", (world_size,)),
        "mp_policy": precision(model, compute.dtype),
        "offload_policy": CPUOffloadPolicy(pin_memory=gpu) if options.cpu_offload else OffloadPolicy(),
    }
    for block in Structure.of(model).blocks:
        fully_shard(model.get_submodule(block.name), reshard_after_forward=options.reshard_after_forward, **settings)
    # Its own leftovers are needed first and last, so they stay.
    fully_shard(model, reshard_after_forward=False, **settings)


def _hold_alike(model: nn.Module) -> None:
    """In the precisions of rank 0: in which one a frozen weight is held may depend on its numbers."""
    found = first_says(lambda: {name: parameter.dtype for name, parameter in model.named_parameters()})
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(found[name])


def _make_room(model: nn.Module, device: str) -> None:
    """Give memory to what has shapes alone; buffers that are worked out when a model is built keep their numbers."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        if name in kept:
            buffer.copy_(kept[name])


def _hand_out(model: nn.Module, originals: Mapping[str, torch.Tensor], device: str, *, takes: bool) -> None:
    """Send every tensor of rank 0 to all, one at a time; those that need it take their shard of it."""
    for name, tensor in _held(model):
        full = originals[name].detach().to(device) if originals else None
        if full is None:
            full = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        dist.broadcast(full, src=0)
        if takes:
            put(tensor, full)


def _held(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and the buffers that files hold."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def precision(model: nn.Module, compute: torch.dtype) -> MixedPrecisionPolicy:
    """Weights travel in the precision of the pass, gradients are added up in float32; shards stay as they are held."""
    if compute is torch.float32 or any(map(is_batch_norm, model.modules())):
        # Statistics are kept in float32, and so must be the weights beside them.
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)


class ShardedMixin(_Base):
    """Mix in before a Trainer class: trains a model that `shard` has sharded."""

    def adopt_shards(self) -> None:
        """Take the model as it is placed; called once, when it has been sharded."""
        # The Trainer's word for it. Its constructor would refuse checkpoints, since it knows none for such models.
        self.is_distributed_loading_by_transformers = True

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not getattr(model, "placed_in_shards", False):
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        let_go(self.model)
        return super().create_optimizer(model)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        # Put off, every rank would hold the gradients of the whole model, in float32: what sharding is to avoid.
        yield

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return _plain(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return _plain(super()._get_grad_norm(model, grad_norm=grad_norm))


def _plain(norm: Any) -> Any:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
