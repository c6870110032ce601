"""What `distributed.sharding: Auto` means: replicas where one fits, else shards. Pure."""

from __future__ import annotations

from collections.abc import Callable

from finetune_api.run import Sharding


def choose_sharding(
    asked: Sharding, world_size: int, available: int | None, fits_replicated: Callable[[int], bool]
) -> Sharding:
    """DDP or FSDP.

    DDP sends less (gradients once a step, not the parameters in every pass), so it is taken where a whole replica fits
    with the margin that `figures.USABLE` leaves.

    Args:
        asked: distributed.sharding.
        available: bytes of each GPU's memory; None: not known, or there is no GPU.
        fits_replicated: whether a replica fits into so much; asked only where that decides.
    """
    if asked is not Sharding.AUTO:
        return asked
    if world_size == 1 or available is None or fits_replicated(available):
        return Sharding.DDP
    return Sharding.FSDP
