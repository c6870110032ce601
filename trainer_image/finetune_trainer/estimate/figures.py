"""The figures of an estimate, and sums over them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from pydantic import Field, computed_field

from finetune_api.common import Message
from finetune_api.hyperparameters import Optimizer
from finetune_api.run import Sharding
from finetune_trainer.estimate.optimizers import FLOAT, state_bytes

USABLE = 0.9
"""Share of a GPU's memory that an estimate may fill: the rest is for CUDA's context, NCCL's buffers, the kernels'
workspaces, and for what the caching allocator cannot use for being in pieces."""


ROOT = "root"
"""The unit that FSDP gathers beside the blocks: embedding, head, whatever is left."""


@dataclass(frozen=True)
class Held:
    """A parameter as the fullest rank (rank 0) holds it.

    Attributes:
        shape: of its part, padding included.
        whole: elements of the whole parameter.
        itemsize: bytes of an element as it is stored.
        unit: the group in which FSDP gathers it; empty where nothing is sharded.
        extra: further bytes that every rank holds, such as the scales of 4-bit weights.
    """

    name: str
    shape: tuple[int, ...]
    whole: int
    itemsize: int
    learns: bool
    embedding: bool = False
    unit: str = ""
    extra: int = 0

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes on this rank."""
        return self.elements * self.itemsize + self.extra


def needed(size: int) -> int:
    """The memory that a GPU must have for so many bytes."""
    return round(size / USABLE)


class Memory(Message):
    """Bytes on the fullest GPU."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int = Field(description="What the passes hold beside parameters and gradients, at the highest point.")
    temporary: int = Field(description="Buffers of the collectives, blocks that FSDP has gathered, 4-bit unpacked.")

    @computed_field
    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.temporary

    @computed_field
    @property
    def needs(self) -> int:
        """The memory that a GPU must have for it."""
        return needed(self.total)


class Traffic(Message):
    """Bytes that each GPU sends in one optimizer step, over ring collectives; it receives as many."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    @computed_field
    @property
    def total(self) -> int:
        return self.all_reduce + self.all_gather + self.reduce_scatter


class Checkpoint(Message):
    """Bytes of one checkpoint in the bucket: what learns, with its moments; never the frozen base."""

    weights: int
    optimizer: int

    @computed_field
    @property
    def total(self) -> int:
        return self.weights + self.optimizer


class Estimate(Message):
    """What a job takes on a number of ranks."""

    world_size: int
    sharding: Sharding
    memory: Memory
    traffic: Traffic
    checkpoint: Checkpoint
    host: int = Field(0, description="Bytes of host memory for each rank: what is paged out, or offloaded.")
    guessed: bool = Field(False, description="Whether activations are a formula's, since no step could be tried.")


def state(held: list[Held], optimizer: Optimizer) -> tuple[int, int, int, int]:
    """(parameters, gradients, optimizer, host) in bytes of one rank."""
    learning = [item for item in held if item.learns]
    states = [state_bytes(optimizer, item.shape, item.embedding) for item in learning]
    return (
        sum(item.size for item in held),
        sum(item.elements * item.itemsize for item in learning),
        sum(state.device for state in states),
        sum(state.host for state in states),
    )


def traffic(held: list[Held], sharding: Sharding, world_size: int, micro_steps: int, itemsize: int) -> Traffic:
    """Of one optimizer step. A ring sends (N-1)/N of the data for all-gather and reduce-scatter, twice for all-reduce.

    (Rabenseifner, "Optimization of Collective Reduction Operations", 2004; NCCL's own accounting.)

    Args:
        micro_steps: DDP reduces once a step, FSDP gathers for both passes and scatters in every micro-step.
        itemsize: of gathered parameters, bytes.
    """
    share = (world_size - 1) / world_size
    learning = sum(item.whole for item in held if item.learns)
    if sharding is Sharding.DDP:
        return Traffic(all_reduce=round(2 * share * learning * FLOAT))
    gathered = sum(item.whole * min(item.itemsize, itemsize) for item in held)
    return Traffic(
        all_gather=round(2 * share * gathered * micro_steps),
        reduce_scatter=round(share * learning * FLOAT * micro_steps),
    )


def checkpoint(whole: list[Held], optimizer: Optimizer) -> Checkpoint:
    """Size of a checkpoint, the same for every number of ranks.

    Args:
        whole: what one rank alone would hold.
    """
    learning = [item for item in whole if item.learns]
    states = [state_bytes(optimizer, item.shape, item.embedding) for item in learning]
    return Checkpoint(
        weights=sum(item.elements * item.itemsize for item in learning),
        optimizer=sum(state.device + state.host for state in states),
    )
