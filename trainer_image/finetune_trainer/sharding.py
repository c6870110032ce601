"""Parameters, gradients and moments in shards, one a rank: fully sharded data parallelism, torch's FSDP2.

The model is sharded by torch itself, before it is measured or trained; the Trainer is told that it owns its placement.
Through accelerate it would be sharded when training begins: after the base has been measured, whole, by every rank. And
its own recomputation of activations draws other dropout masks than the pass did (preserve_rng_state is off there).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from finetune_trainer.structure import Structure
from finetune_trainer.structure.modules import is_batch_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import Trainer as _Base

    from finetune_api.run import FsdpOptions
    from finetune_trainer.hardware import Compute
else:
    _Base = object


def keep_off_device(model: PreTrainedModel) -> None:
    """Have trainers leave a model where it is that will be sharded: it may not fit into a device whole."""
    model.placed_in_shards = True


def shard(model: PreTrainedModel, options: FsdpOptions, compute: Compute, world_size: int) -> None:
    """Shard a model over all ranks, in place: each block is gathered for its own pass, all else for the whole one.

    Args:
        model: the same on all ranks, on the CPU; its shards end up on the devices.
    """
    settings: dict[str, Any] = {
        "mesh": init_device_mesh("cuda" if compute.hardware.cuda else "cpu", (world_size,)),
        "mp_policy": precision(model, compute.dtype),
        "offload_policy": CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy(),
    }
    for block in Structure.of(model).blocks:
        fully_shard(model.get_submodule(block.name), reshard_after_forward=options.reshard_after_forward, **settings)
    # Its own leftovers are needed first and last, so they stay.
    fully_shard(model, reshard_after_forward=False, **settings)


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

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        # As the library does it, which asks a configuration that only its own way of sharding has.
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return _plain(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return _plain(super()._get_grad_norm(model, grad_norm=grad_norm))


def _plain(norm: Any) -> Any:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
