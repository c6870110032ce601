"""How to need less accelerator memory, with the job's own numbers. Pure: what a change saves, the caller says."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from finetune_api.hyperparameters import Optimizer
from finetune_api.job import FineTuneJob, FineTuneJobSpec, StrategyType, TaskType
from finetune_api.run import Sharding
from finetune_api.strategy import LoraOptions, QuantizationOptions, StrategySpec
from finetune_trainer.estimate.sharding import can_shard

SHORTEST = 256
"""Tokens below which a shorter maxLength is no advice: rows would be cut to pieces."""
LAST_RESORT = "choose GPUs with more memory (resources.gpuProduct)"
Fits = Callable[[FineTuneJobSpec], bool]


@dataclass(frozen=True)
class Remedy:
    """One change of a job.

    Attributes:
        words: what to set, with what it is now.
        spec: the job's spec with this change and those before it.
    """

    words: str
    spec: FineTuneJobSpec


def less_memory(job: FineTuneJob, *, sharded: bool = False, fits: Fits | None = None) -> str:
    """What to change after the accelerator's memory was exhausted, in a sentence.

    Args:
        job: a resolved one.
        sharded: whether parameters are sharded over the ranks already.
        fits: whether a spec would fit, from the estimate; without it, or where it finds that the job itself fits, so
            that the estimate is proven too low, only the next step is told.
    """
    steps = remedies(job.spec, sharded=sharded)
    if fits is None or fits(job.spec):
        return next((remedy.words for remedy in steps), LAST_RESORT)
    ladder = list(steps)
    if not ladder:
        return LAST_RESORT
    told = [remedy.words for remedy in ladder]
    if not fits(ladder[-1].spec):
        return "; then ".join([*told, LAST_RESORT])
    # Each change needs less than the one before it, and estimates take their time.
    needed = bisect_left(ladder, True, key=lambda remedy: fits(remedy.spec)) + 1
    return "; then ".join(told[:needed])


def remedies(spec: FineTuneJobSpec, *, sharded: bool) -> Iterator[Remedy]:
    """All changes, each on top of those before it: first what changes no result, last what changes the job itself."""
    # 8-bit moments cannot be sharded.
    moments = [_eight_bit] if not sharded and spec.resources.ranks == 1 else []
    for step in (_smaller_batches, _recomputed, _sharded(sharded), *moments, _quantized, _shorter):
        for remedy in step(spec):
            yield remedy
            spec = remedy.spec


def _smaller_batches(spec: FineTuneJobSpec) -> Iterator[Remedy]:
    """The same global batch in smaller parts, down to single rows."""
    values = spec.hyperparameters
    rows, steps = values.per_device_batch_size, values.gradient_accumulation_steps
    while rows > 1:
        # The largest divisor, so that the global batch stays what it is.
        fewer = next(part for part in range(rows // 2, 0, -1) if rows % part == 0)
        more = steps * (rows // fewer)
        try:
            changed = _with(spec, perDeviceBatchSize=fewer, gradientAccumulationSteps=more)
        except ValidationError:
            return  # the API takes no more steps
        yield Remedy(
            f"set hyperparameters.perDeviceBatchSize to {fewer} (now {rows}) and gradientAccumulationSteps to {more} "
            f"(now {steps}): the same global batch in less memory",
            changed,
        )
        rows, steps, spec = fewer, more, changed


def _recomputed(spec: FineTuneJobSpec) -> Iterator[Remedy]:
    # Of the image models only some can recompute; PrefixTuning never can.
    able = spec.task.type is not TaskType.IMAGE_CLASSIFICATION and spec.strategy.type is not StrategyType.PREFIX_TUNING
    if able and not spec.hyperparameters.gradient_checkpointing:
        yield Remedy(
            "set hyperparameters.gradientCheckpointing to true: activations are computed again instead of kept",
            _with(spec, gradientCheckpointing=True),
        )


def _sharded(already: bool) -> Callable[[FineTuneJobSpec], Iterator[Remedy]]:
    def step(spec: FineTuneJobSpec) -> Iterator[Remedy]:
        ranks = spec.resources.ranks
        if ranks > 1 and not already and spec.distributed.sharding is not Sharding.FSDP and can_shard(spec):
            distributed = spec.distributed.model_copy(update={"sharding": Sharding.FSDP})
            yield Remedy(
                f"set distributed.sharding to FSDP: each of the {ranks} ranks holds its part of the model only",
                spec.model_copy(update={"distributed": distributed}),
            )

    return step


def _eight_bit(spec: FineTuneJobSpec) -> Iterator[Remedy]:
    # Of an adapter the moments are next to nothing.
    whole = spec.strategy.type in (StrategyType.FULL, StrategyType.PARTIAL, StrategyType.GREEN)
    if whole and spec.hyperparameters.optimizer is Optimizer.ADAMW:
        yield Remedy(
            "set hyperparameters.optimizer to adamw8bit: a quarter of the moments' memory",
            _with(spec, optimizer=Optimizer.ADAMW_8BIT),
        )


def _quantized(spec: FineTuneJobSpec) -> Iterator[Remedy]:
    if spec.strategy.type is StrategyType.QLORA:
        return
    lora = spec.strategy.lora or LoraOptions()
    strategy = StrategySpec(type=StrategyType.QLORA, lora=lora, quantization=QuantizationOptions())
    yield Remedy(
        "use strategy QLoRA: the base is held in 4 bits, and an adapter learns",
        spec.model_copy(update={"strategy": strategy}),
    )


def _shorter(spec: FineTuneJobSpec) -> Iterator[Remedy]:
    length = spec.hyperparameters.max_length
    while spec.task.type is not TaskType.IMAGE_CLASSIFICATION and length // 2 >= SHORTEST:
        spec = _with(spec, maxLength=length // 2)
        yield Remedy(f"lower hyperparameters.maxLength to {length // 2} (now {length})", spec)
        length //= 2


def _with(spec: FineTuneJobSpec, **values: object) -> FineTuneJobSpec:
    """A copy with other hyper-parameters, by their names in YAML."""
    wire = spec.hyperparameters.to_wire() | values
    return spec.model_copy(update={"hyperparameters": type(spec.hyperparameters).from_wire(wire)})
