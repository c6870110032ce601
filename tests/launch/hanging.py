"""Gangs of which one rank hangs; torch is imported before the gang is let go, so that it is no part of the time."""

from __future__ import annotations

import ctypes
import threading
import time

import torch
import torch.distributed as dist

from finetune_api.contract import Stage
from finetune_trainer.collectives import assemble
from finetune_trainer.runtime import Context
from tests.launch.entries import deliver, say


def meet(context: Context) -> None:
    """Connect the ranks, with signs of life meanwhile: on a busy machine that may take long."""
    met = threading.Event()

    def beat() -> None:
        while not met.wait(0.05):
            context.reporter.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    dist.init_process_group("gloo")
    dist.barrier()
    met.set()
    thread.join()


def hang_in_a_lock(context: Context) -> None:
    """Rank 1 waits for a lock that nobody gives back, rank 0 for rank 1."""
    meet(context)
    context.reporter.stage(Stage.TRAINING)
    say(f"training {context.rank}")
    if context.rank == 1:
        _take_twice(threading.Lock())
    dist.all_reduce(torch.zeros(1))


def _take_twice(lock: threading.Lock) -> None:
    lock.acquire()
    lock.acquire()


def hang_before_the_ranks_meet(context: Context) -> None:
    """Rank 1 never has prepared what it prepares alone, and rank 0 waits for it."""
    if context.rank == 1:
        _take_twice(threading.Lock())
    assemble(context, cuda=False)


def hang_in_the_backward_pass(context: Context) -> None:
    """Rank 0's reductions run below torch's backward pass, where rank 1 never comes."""
    meet(context)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    if context.rank == 1:
        ctypes.CDLL(None).sleep(600)
    model(torch.ones(1, 2)).sum().backward()


def work_alone_while_the_others_wait(context: Context) -> None:
    """Rank 0 delivers for longer than a standstill may last; rank 1 waits for it in a collective."""
    meet(context)
    if context.is_main:
        for _ in range(45):
            time.sleep(0.1)
            context.alive()
    dist.barrier()
    deliver(context)
