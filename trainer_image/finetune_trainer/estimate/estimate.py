"""The estimate: what a job takes on so many GPUs, from its config.json alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from finetune_api.run import Sharding
from finetune_trainer.estimate.figures import (
    FLOAT,
    Course,
    Estimate,
    Held,
    Memory,
    checkpoint,
    gathered,
    state,
    traffic,
)
from finetune_trainer.estimate.shards import held, unpacked
from finetune_trainer.estimate.sketch import Sketch
from finetune_trainer.estimate.step import course


@dataclass
class Estimator:
    """Estimates for one job; what does not depend on the number of ranks is found out once.

    Args:
        sketch: makes the job's model anew each time.
    """

    sketch: Callable[[], Sketch]
    _courses: dict[bool, Course] = field(default_factory=dict)
    _whole: list[Held] = field(default_factory=list)

    def of(self, world_size: int, sharding: Sharding) -> Estimate:
        """On the fullest of so many ranks, each with a GPU of its own.

        Args:
            sharding: DDP or FSDP.

        Raises:
            UsageError: the spec names what the architecture does not have.
        """
        sharded = sharding is Sharding.FSDP and world_size > 1
        sketch = self.sketch()
        spec, itemsize = sketch.spec, sketch.compute.itemsize
        buffer, optimizer = unpacked(sketch), spec.hyperparameters.optimizer
        if not self._whole:
            self._whole = held(self.sketch(), 1, sharded=False)
        parts = held(sketch, world_size, sharded) if sharded else self._whole
        parameters, gradients, moments, host = state(parts, optimizer)
        steps = spec.hyperparameters.gradient_accumulation_steps
        activations = self._course(sharded).highest(steps > 1, FLOAT / world_size if sharded else FLOAT)
        if sharded:
            buffer += gathered(parts, itemsize, activations)
        elif world_size > 1:
            # DDP's buckets: gradients are copied into them to be reduced (gradient_as_bucket_view is off).
            buffer += sum(part.elements for part in parts if part.learns) * FLOAT
        memory = Memory(
            parameters=parameters,
            gradients=gradients,
            optimizer=moments,
            activations=activations,
            temporary=buffer,
        )
        used = Sharding.FSDP if sharded else Sharding.DDP
        return Estimate(
            world_size=world_size,
            sharding=used,
            memory=memory,
            traffic=traffic(parts, used, world_size, steps, itemsize),
            checkpoint=checkpoint(self._whole, optimizer),
            host=host,
        )

    def _course(self, sharded: bool) -> Course:
        if sharded not in self._courses:
            self._courses[sharded] = course(self.sketch(), sharded)
        return self._courses[sharded]
