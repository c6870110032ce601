"""Whether a run with several ranks needs to shard its model, from a plain estimate of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune_api.hyperparameters import Optimizer
from finetune_api.run import Sharding
from finetune_api.strategy import StrategyType
from finetune_trainer.memory import memory_limit

if TYPE_CHECKING:
    from finetune_api.job import FineTuneJobSpec
    from finetune_trainer.hardware import Hardware

USABLE = 0.7
"""Share of a device that weights, gradients and moments may take: the rest is for activations and fragments."""
MOMENT_BYTES = {
    Optimizer.ADAMW: 8,
    Optimizer.ADAMW_8BIT: 2,
    Optimizer.PAGED_ADAMW_8BIT: 0,
    Optimizer.ADAFACTOR: 0,
    Optimizer.SGD: 0,
}
"""Per parameter that learns: two numbers of four bytes, or of one; what is paged, factored or absent hardly counts."""


@dataclass(frozen=True)
class Size:
    """What a rank must hold beside activations.

    Attributes:
        total, trainable: parameters.
        held: bytes that a frozen parameter takes.
    """

    total: int
    trainable: int
    held: float

    def state_bytes(self, optimizer: Optimizer) -> int:
        """Weights, gradients and moments; what learns is held in float32 and has gradients of that size."""
        learning = self.trainable * (4 + 4 + MOMENT_BYTES[optimizer])
        return int((self.total - self.trainable) * self.held + learning)


def choose_sharding(spec: FineTuneJobSpec, size: Size, device: int) -> Sharding:
    """DDP or FSDP, for a run of several ranks that leaves the choice to us.

    Args:
        device: bytes of memory that a rank has to itself on its device.
    """
    if not can_shard(spec):
        return Sharding.DDP
    fits = size.state_bytes(spec.hyperparameters.optimizer) <= USABLE * device
    return Sharding.DDP if fits else Sharding.FSDP


def can_shard(spec: FineTuneJobSpec) -> bool:
    """Whether the job asks for nothing that the API refuses together with FSDP."""
    values, select = spec.hyperparameters, spec.strategy.select
    whole = values.optimizer in (Optimizer.ADAMW_8BIT, Optimizer.PAGED_ADAMW_8BIT) or values.torch_compile
    return not whole and (select is None or select.fisher is None)


def held_bytes(strategy: StrategyType, weights: torch.dtype) -> float:
    """Bytes of a frozen parameter: half a byte in 4 bits, and what the constants of each block of 64 add."""
    return 0.57 if strategy is StrategyType.QLORA else weights.itemsize


def device_bytes(hardware: Hardware, processes: int) -> int:
    """Memory that this rank has to itself: its GPU's, or its share of the pod's."""
    if hardware.cuda:
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return memory_limit() // processes
