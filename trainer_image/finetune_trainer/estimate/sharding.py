"""What `distributed.sharding: Auto` means: replicas where one fits, else shards. Pure."""

from __future__ import annotations

from collections.abc import Callable

from finetune_api.hyperparameters import Optimizer
from finetune_api.job import FineTuneJobSpec
from finetune_api.run import Sharding


def choose_sharding(
    spec: FineTuneJobSpec, world_size: int, available: int | None, fits_replicated: Callable[[int], bool]
) -> Sharding:
    """DDP or FSDP.

    DDP sends less (gradients once a step, not the parameters in every pass), so it is taken where a whole replica fits
    with the margin that `figures.USABLE` leaves.

    Args:
        available: bytes of memory that each rank has to itself on its device; None: not known.
        fits_replicated: whether a replica fits into so much; asked only where that decides.
    """
    asked = spec.distributed.sharding
    if asked is not Sharding.AUTO:
        return asked
    if world_size == 1 or available is None or not can_shard(spec) or fits_replicated(available):
        return Sharding.DDP
    return Sharding.FSDP


def can_shard(spec: FineTuneJobSpec) -> bool:
    """Whether the job asks for nothing that the API refuses together with FSDP."""
    values, select = spec.hyperparameters, spec.strategy.select
    whole = values.optimizer in (Optimizer.ADAMW_8BIT, Optimizer.PAGED_ADAMW_8BIT, Optimizer.ADAFACTOR)
    return not (whole or values.torch_compile) and (select is None or select.fisher is None)
