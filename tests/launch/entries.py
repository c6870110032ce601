"""What the workers of these tests do instead of training."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from finetune_api.contract import CheckpointRef, OutputRef, Result, Stage
from finetune_trainer import errors
from finetune_trainer.preemption import shield_from_sigterm
from finetune_trainer.runtime import Context


def deliver(context: Context, **fields: object) -> None:
    if context.is_main:
        output = OutputRef(uri="s3://models/out/adapter", kind="adapter")
        result = Result(job=context.job.metadata.name, output=output, steps=12, **fields)
        context.result_file.write_text(result.model_dump_json())


def say(text: str) -> None:
    print(text, flush=True)


def succeed(context: Context) -> None:
    samples = [{"prompt": "p" * 3000, "reference": "r", "before": "b", "after": "a"}]
    deliver(context, metrics={"eval_loss": 1.25}, samples=samples)


def print_environment(context: Context) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    seen = " ".join(f"{name}={os.environ.get(name)}" for name in names)
    say(f"seen {context.rank}/{context.world_size} on node {context.node_rank}: {seen}")
    deliver(context)


def forget_the_result(context: Context) -> None:
    say(f"rank {context.rank} is done")


def fail_with(context: Context) -> None:
    error = getattr(errors, os.environ["TEST_ERROR"])
    context.reporter.update(step=7, checkpoint=CheckpointRef(uri="s3://b/step-00000005", step=5, time="now"))
    raise error("rows.jsonl:3 has no answer", "add an answer, or set dataset.onInvalidRow to Drop")


def crash(context: Context) -> None:
    _divide(context.rank, 0)


def _divide(one: int, other: int) -> float:
    return one / other


def fill_the_disk(context: Context) -> None:
    with open("/dev/full", "w") as file:
        file.write("x" * 100_000)


def exit_by_itself(context: Context) -> None:
    sys.exit(3)


def exit_without_a_word(context: Context) -> None:
    os._exit(41)


def be_killed(context: Context) -> None:
    context.reporter.stage(Stage.TRAINING)
    os.kill(os.getpid(), signal.SIGKILL)


def segfault(context: Context) -> None:
    ctypes.string_at(0)


def save_when_asked(context: Context) -> None:
    """Needs a second and a half to save, as a checkpoint would."""
    say("training")
    while not context.stop.requested:
        time.sleep(0.01)
    say(f"saving with {context.stop.seconds_left():.0f} s left")
    time.sleep(1.5)
    (context.scratch / "saved").touch()
    raise errors.StoppedError("saved step 8")


def leave_at_once_beside_one_that_saves(context: Context) -> None:
    """Rank 1 has not got so far as to hear requests in its own way."""
    if context.is_main:
        save_when_asked(context)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    never_stop(context)


def never_stop(context: Context) -> None:
    say("training")
    while True:
        time.sleep(60)


def stop_before_training(context: Context) -> None:
    say("downloading")
    while True:
        time.sleep(0.01)
        context.stop.check()


def keep_helpers(context: Context) -> None:
    """A forked helper that ignores SIGTERM, one that does not, and a rank that goes on."""
    fork = multiprocessing.get_context("fork")
    helpers = [fork.Process(target=_help, args=(shielded,), daemon=True) for shielded in (True, False)]
    for helper in helpers:
        helper.start()
    say(f"pids {os.getpid()} " + " ".join(str(helper.pid) for helper in helpers))
    never_stop(context)


def _help(shielded: bool) -> None:
    if shielded:
        shield_from_sigterm()
    time.sleep(600)


def terminate_a_pool(context: Context) -> None:
    """Again and again, since a helper may be asked to end while it is still being born."""
    for _ in range(50):
        with multiprocessing.get_context("fork").Pool(4) as pool:
            pool.map(abs, range(2))
    deliver(context)


def lose_rank_one(context: Context) -> None:
    """Rank 1 finds a bad row while rank 0 waits for it in a collective."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    if context.rank == 1:
        raise errors.DataError("rows.jsonl:9 is truncated")
    dist.all_reduce(torch.zeros(1))


def agree_to_stop(context: Context) -> None:
    """Steps in lockstep until any rank was asked to stop; counts the steps, which must be equal."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    say(f"training {context.rank}")
    step = 0
    while not context.stop.agreed():
        step += 1
    say(f"rank {context.rank} stopped after step {step}")
    raise errors.StoppedError(f"saved step {step}")


def add_up(context: Context) -> None:
    """A collective over all ranks of all nodes, then success."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([context.rank + 1.0])
    dist.all_reduce(total)
    say(f"rank {context.rank} of {context.world_size} sees {total.item():.0f}")
    dist.destroy_process_group()
    deliver(context)


def deliver_slowly(context: Context) -> None:
    """Rank 0 has something to do when the others are done."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()
    say(f"{'delivering' if context.is_main else 'done'} in process {os.getpid()}")
    if context.is_main:
        time.sleep(8)
    deliver(context)


def hang_in_c_with_the_interpreters_lock(context: Context) -> None:
    """No thread of this process can run any more."""
    say("training")
    ctypes.PyDLL(None).sleep(600)


def be_stopped(context: Context) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def add_up_again(context: Context) -> None:
    """Collectives without end."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    say(f"begun by process {os.getpid()}")
    while True:
        dist.all_reduce(torch.zeros(1))


def report_and_wait(context: Context) -> None:
    reporter = context.reporter
    reporter.stage(Stage.TRAINING, "epoch 1")
    reporter.update(step=1, total_steps=10, loss=2.5, learning_rate=2e-4, tokens=100)
    reporter.update(step=2, loss=float("nan"), metrics={'eval"loss': 1.5, "bad": float("inf")}, tokens=200)
    say("reported")
    Path(os.environ["TEST_FIFO"]).read_text()
    deliver(context)
