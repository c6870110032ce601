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
    host: int = Field(0, description="Bytes of host memory for each rank: moments that are paged out.")


@dataclass(frozen=True)
class Course:
    """How memory goes up and down within forward and backward pass.

    Attributes:
        points: (most bytes of activations since the last point, elements of gradients that were there), one for each
            gradient that is made.
    """

    points: tuple[tuple[int, int], ...]

    def highest(self, accumulates: bool, bytes_per_element: float) -> int:
        """Activations at the step's highest point, less the gradients that are counted apart anyway.

        Args:
            accumulates: whether gradients of an earlier micro-step lie there from the start.
            bytes_per_element: of a gradient on this rank: 4, over the ranks where they are sharded.
        """
        if accumulates:
            return max(activations for activations, _ in self.points)
        most = max(activations + made * bytes_per_element for activations, made in self.points)
        return max(0, round(most - max(made for _, made in self.points) * bytes_per_element))


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


def gathered(held: list[Held], itemsize: int, activations: int) -> int:
    """Most bytes of what FSDP2 gathers and reduces at a time, on every rank.

    What lies outside of the blocks (embedding, head) stays gathered for the whole step, with its gradients, which are
    reduced at the end, when there are no activations any more. Of the blocks one is in use, the next one is being
    prefetched, and its flat buffer is copied from; or one is in use while its gradients are put together and reduced
    in float32.

    Args:
        itemsize: of what is gathered, bytes.
        activations: the most bytes of them.
    """
    whole: dict[str, int] = {}
    learning: dict[str, int] = {}
    for item in held:
        whole[item.unit] = whole.get(item.unit, 0) + item.whole
        learning[item.unit] = learning.get(item.unit, 0) + (item.whole if item.learns else 0)
    kept = (whole.get(ROOT, 0) + learning.get(ROOT, 0)) * itemsize
    blocks = [3 * size * itemsize + learning[unit] * (itemsize + FLOAT) for unit, size in whole.items() if unit != ROOT]
    return kept + max([*blocks, learning.get(ROOT, 0) * FLOAT - activations])
