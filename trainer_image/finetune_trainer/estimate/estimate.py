"""The estimate: what a job takes on so many GPUs, from its config.json alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property

from finetune_api.run import FsdpOptions, Sharding
from finetune_trainer.estimate.course import Course, Gathering, highest
from finetune_trainer.estimate.figures import FLOAT, Estimate, Held, Memory, checkpoint, needed, state, traffic
from finetune_trainer.estimate.shards import held, unpacked
from finetune_trainer.estimate.sketch import Sketch
from finetune_trainer.estimate.step import course, rule_of_thumb

log = logging.getLogger(__name__)


class Estimator:
    """Estimates for one job; what does not depend on the number of ranks is found out once.

    Args:
        sketch: makes the job's model anew each time.

    Its methods raise UsageError where the spec names what the architecture does not have.
    """

    def __init__(self, sketch: Callable[[], Sketch]) -> None:
        self._sketch = sketch
        self._courses: dict[bool, Course] = {}
        self._guessed = False
        first = sketch()
        self._values, self._itemsize = first.spec.hyperparameters, first.compute.itemsize
        self._fsdp = first.spec.distributed.fsdp or FsdpOptions()
        self._unpacked = unpacked(first)

    def of(self, world_size: int, sharding: Sharding) -> Estimate:
        """On the fullest of so many ranks, each with a GPU of its own.

        Args:
            sharding: DDP or FSDP.
        """
        used = Sharding.FSDP if sharding is Sharding.FSDP and world_size > 1 else Sharding.DDP
        parts = held(self._sketch(), world_size) if used is Sharding.FSDP else self._whole
        steps = self._values.gradient_accumulation_steps
        *shards, paged = state(parts, self._values.optimizer)
        offloaded = sum(shards) if used is Sharding.FSDP and self._fsdp.cpu_offload else 0
        return Estimate(
            world_size=world_size,
            sharding=used,
            memory=self._memory(parts, world_size, sharded=used is Sharding.FSDP),
            traffic=traffic(parts, used, world_size, steps, self._itemsize),
            checkpoint=checkpoint(self._whole, self._values.optimizer),
            host=paged + offloaded,
            guessed=self._guessed,
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
        gathering = Gathering.of(parts, self._itemsize, stays=not self._fsdp.reshard_after_forward)
        top = highest(
            self._course(sharded),
            gathering.at if sharded else lambda point: buckets,
            FLOAT / world_size if sharded else FLOAT,
            accumulates=self._values.gradient_accumulation_steps > 1,
        )
        away = sharded and self._fsdp.cpu_offload
        return Memory(
            parameters=0 if away else parameters,
            gradients=0 if away else gradients,
            optimizer=0 if away else moments,
            activations=top.activations,
            temporary=top.temporary + self._unpacked,
        )

    @cached_property
    def _whole(self) -> list[Held]:
        """What one rank alone would hold."""
        return held(self._sketch(), 1)

    def _course(self, sharded: bool) -> Course:
        if sharded not in self._courses:
            try:
                self._courses[sharded] = course(self._sketch(), sharded)
            # Architectures may do what only numbers allow; there is no list of them.
            except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, AssertionError):
                log.warning("no step of this model can be tried without numbers", exc_info=True)
                self._guessed = True
                self._courses[sharded] = rule_of_thumb(self._sketch())
        return self._courses[sharded]
