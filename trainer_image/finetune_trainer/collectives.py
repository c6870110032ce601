"""What the ranks of a job tell each other beside gradients; a rank that is alone pays nothing for it.

Every function here is a collective: all ranks call it, in the same order. A rank that fails before it comes breaks the
connection of the others, which the agent tells from an error of their own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_trainer.runtime import Context

TIMEOUT = timedelta(hours=1)
"""Of one collective. Dead peers are noticed by their connection and silent ones by the heartbeat, both much earlier;
what it must outlast is the slowest node's download of a checkpoint."""
POLL_SECONDS = 0.1

T = TypeVar("T")


def assemble(context: Context, *, cuda: bool) -> None:
    """Connect all ranks; called when what each prepares alone is done, since others would wait for it in vain.

    Tensors of GPUs travel by NCCL, everything else by gloo.
    """
    if context.world_size == 1 or dist.is_initialized():
        return
    _await_peers(context)
    if cuda:
        torch.cuda.set_device(context.local_rank)
    dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=TIMEOUT)


def _await_peers(context: Context) -> None:
    """Wait where the request to stop is heard, for those that still prepare; inside of torch it is not.

    Raises:
        StoppedError: it came.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    here = f"assembled-{context.attempt}"
    store.add(here, 1)
    while store.add(here, 0) < context.world_size:
        # No beat: those that are waited for give the signs of life, and must be missed when they hang.
        context.stop.check()
        time.sleep(POLL_SECONDS)


def first_says(say: Callable[[], T]) -> T:
    """What rank 0 says; the others do not call `say`."""
    if not dist.is_initialized():
        return say()
    said: list[T | None] = [say() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(said, src=0)
    return said[0]  # type: ignore[return-value]


def all_say(word: T) -> list[T]:
    """What each rank says, in their order."""
    if not dist.is_initialized():
        return [word]
    said: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, word)
    return said  # type: ignore[return-value]


@contextmanager
def in_turn(context: Context, what: str) -> Iterator[None]:
    """The node's first rank goes first, the others when it is done: they find what it has brought to the node's disk.

    No collective, since it comes before `assemble`; it ends by the request to stop, which raises StoppedError.
    """
    # The moment of launch tells this start of the pod from earlier ones in the same folder.
    done: Path = context.scratch / "turns" / f"{what}-{context.started_at!r}"
    while context.local_rank > 0 and not done.exists():
        # No beat: the rank that is waited for gives the signs of life, and must be missed when it hangs.
        context.stop.check()
        time.sleep(POLL_SECONDS)
    yield
    if context.local_rank == 0:
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()
