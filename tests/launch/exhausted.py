"""Ranks whose memory is exhausted."""

from __future__ import annotations

import signal
import time

import torch
import torch.distributed as dist

from finetune_trainer.runtime import Context


def exhaust_every_accelerator(context: Context) -> None:
    """All ranks at once, inside the backward pass, as their batches have the same size."""
    dist.init_process_group("gloo")
    weight = torch.ones(2, requires_grad=True)

    def refuse(_gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    dist.barrier()
    (weight.register_hook(refuse), weight.sum().backward())


def exhaust_the_hosts_memory_of_one(context: Context) -> None:
    """Rank 1 really asks for 256 TiB, more than there are addresses, while rank 0 waits for it in a collective."""
    dist.init_process_group("gloo")
    dist.barrier()
    if context.rank == 1:
        torch.empty(2**48, dtype=torch.uint8)
    dist.all_reduce(torch.zeros(1))


def exhaust_one_accelerator_beside_a_rank_that_hangs(context: Context) -> None:
    """Rank 0 hears neither of rank 1's end nor of SIGTERM, as in a kernel that waits for its peer on the GPU."""
    dist.init_process_group("gloo")
    dist.barrier()
    if context.rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    while True:
        time.sleep(60)
