"""The estimate: what a job takes on so many GPUs, from its config.json alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from finetune_api.run import Sharding
from finetune_trainer.estimate.course import Course, Gathering, highest
from finetune_trainer.estimate.figures import FLOAT, Estimate, Held, Memory, checkpoint, needed, state, traffic
from finetune_trainer.estimate.shards import held, unpacked
from finetune_trainer.estimate.sketch import Sketch
from finetune_trainer.estimate.step import course


class Estimator:
    """Estimates for one job; what does not depend on the number of ranks is found out once.

    Args:
        sketch: makes the job's model anew each time.

    Its methods raise UsageError where the spec names what the architecture does not have.
    """

    def __init__(self, sketch: Callable[[], Sketch]) -> None:
        self._sketch = sketch
        self._courses: dict[bool, Course] = {}
        first = sketch()
        self._values, self._itemsize = first.spec.hyperparameters, first.compute.itemsize
        self._unpacked = unpacked(first)

    def of(self, world_size: int, sharding: Sharding) -> Estimate:
        """On the fullest of so many ranks, each with a GPU of its own.

        Args:
            sharding: DDP or FSDP.
        """
        used = Sharding.FSDP if sharding is Sharding.FSDP and world_size > 1 else Sharding.DDP
        parts = held(self._sketch(), world_size) if used is Sharding.FSDP else self._whole
        steps = self._values.gradient_accumulation_steps
        *_, host = state(parts, self._values.optimizer)
        return Estimate(
            world_size=world_size,
            sharding=used,
            memory=self._memory(parts, world_size, sharded=used is Sharding.FSDP),
            traffic=traffic(parts, used, world_size, steps, self._itemsize),
            checkpoint=checkpoint(self._whole, self._values.optimizer),
            host=host,
        )

    def fits_replicated(self, world_size: int, available: int) -> bool:
        """Whether each of so many ranks can hold the whole model in so many bytes, by DDP."""
        # Often parameters and moments alone are too much, and that is known at once.
        if needed(sum(state(self._whole, self._values.optimizer)[:3])) > available:
            return False
        return self.of(world_size, Sharding.DDP).memory.needs <= available

    def _memory(self, parts: list[Held], world_size: int, *, sharded: bool) -> Memory:
        parameters, gradients, moments, _ = state(parts, self._values.optimizer)
        # DDP's buckets: gradients are copied into them to be reduced (gradient_as_bucket_view is off).
        buckets = sum(part.elements for part in parts if part.learns) * FLOAT if world_size > 1 else 0
        gathering = Gathering.of(parts, self._itemsize)
        top = highest(
            self._course(sharded),
            gathering.at if sharded else lambda point: buckets,
            FLOAT / world_size if sharded else FLOAT,
            accumulates=self._values.gradient_accumulation_steps > 1,
        )
        return Memory(
            parameters=parameters,
            gradients=gradients,
            optimizer=moments,
            activations=top.activations,
            temporary=top.temporary + self._unpacked,
        )

    @cached_property
    def _whole(self) -> list[Held]:
        """What one rank alone would hold."""
        return held(self._sketch(), 1)

    def _course(self, sharded: bool) -> Course:
        if sharded not in self._courses:
            self._courses[sharded] = course(self._sketch(), sharded)
        return self._courses[sharded]
