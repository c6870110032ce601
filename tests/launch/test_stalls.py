"""Ranks that make no progress: who notices, what is left of them, and who is blamed."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from finetune_api.contract import Cause, ExitCode
from finetune_trainer import stalls
from finetune_trainer.causes import Kind
from finetune_trainer.heartbeat import Heartbeat, heartbeat_file
from finetune_trainer.progress import Reporter
from finetune_trainer.runtime import Pod
from finetune_trainer.stacks import Frame, main_stack, waits_for_peers
from finetune_trainer.stalls import Shown, StallWatch, describe
from finetune_trainer.supervision import Finding, Supervision
from tests.launch.conftest import StartPod
from tests.launch.test_gang import start_gang
from tests.support.jobs import a_job
from tests.support.processes import wait_for


def kept(folder: Path, rank: int, attempt: int = 1) -> str:
    return (folder / f"out/report/stalls/attempt-{attempt:04d}/rank-{rank:05d}.txt").read_text()


def test_the_rank_in_a_lock_is_blamed_and_not_the_one_that_waits_for_it(start_pod: StartPod, tmp_path: Path) -> None:
    pod = start_pod("hanging:hang_in_a_lock", stall=3, PET_NPROC_PER_NODE=2)
    assert pod.exit_code() == ExitCode.STALLED
    message = pod.message
    assert (message.cause, message.rank) == (Cause.STALLED, 1)
    assert "rank 1 hangs in _take_twice (hanging.py" in message.message
    assert "1 of this pod's ranks wait for others in a collective" in message.message
    assert message.message.endswith(f"all stacks are in file://{tmp_path}/out/report/stalls/attempt-0001")
    assert "runPolicy.stallTimeoutSeconds" in message.advice
    assert "in _take_twice" in kept(tmp_path, 1)
    assert "in all_reduce" in kept(tmp_path, 0)
    assert "in _take_twice" in pod.output


def test_a_rank_whose_interpreter_is_held_in_c_still_shows_its_stacks(start_pod: StartPod, tmp_path: Path) -> None:
    pod = start_pod("hang_in_c_with_the_interpreters_lock", stall=5, FINETUNE_ATTEMPT=3)
    assert pod.exit_code() == ExitCode.STALLED
    assert "rank 0 hangs in hang_in_c_with_the_interpreters_lock (entries.py" in pod.message.message
    assert "(most recent call first)" in kept(tmp_path, 0, attempt=3)


def test_a_process_that_answers_no_signal_is_told_by_its_state(start_pod: StartPod) -> None:
    pod = start_pod("be_stopped", stall=5)
    assert pod.exit_code() == ExitCode.STALLED
    assert "rank 0 left no stacks: its process is stopped by a signal" in pod.message.message


def test_of_two_pods_the_one_with_the_culprit_fails_and_the_other_waits_to_be_stopped(start_pod: StartPod) -> None:
    first, second = start_gang(start_pod, "hanging:hang_in_a_lock", stall=3)
    assert second.exit_code(120) == ExitCode.STALLED
    assert second.message.rank == 1
    first.line("waits for the request to stop")
    first.stop()
    assert first.exit_code() in (ExitCode.UNAVAILABLE, ExitCode.STALLED)
    assert first.message.rank != 1


def test_a_rank_that_hangs_before_the_ranks_have_met_is_missed_by_those_that_wait(start_pod: StartPod) -> None:
    pod = start_pod("hanging:hang_before_the_ranks_meet", stall=5, PET_NPROC_PER_NODE=2)
    assert pod.exit_code() == ExitCode.STALLED
    assert pod.message.rank == 1
    assert "1 of this pod's ranks wait for others" in pod.message.message


@pytest.mark.slow
def test_a_rank_in_the_backward_pass_waits_for_the_one_that_never_came(start_pod: StartPod) -> None:
    pod = start_pod("hanging:hang_in_the_backward_pass", stall=10, PET_NPROC_PER_NODE=2)
    assert pod.exit_code() == ExitCode.STALLED
    assert pod.message.rank == 1


def test_ranks_that_wait_for_one_that_makes_progress_have_not_stalled(start_pod: StartPod) -> None:
    first, second = start_gang(start_pod, "hanging:work_alone_while_the_others_wait", stall=3)
    assert (first.exit_code(120), second.exit_code(120)) == (ExitCode.OK, ExitCode.OK)


# --- without processes -----------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def a_watch(tmp_path: Path, clock: Clock, limits: list[float]) -> tuple[StallWatch, Reporter]:
    reporter = Reporter(heartbeat=Heartbeat(heartbeat_file(tmp_path, 0)))
    return StallWatch(tmp_path, [0], lambda: limits[0], clock=clock), reporter


def walk(watch: StallWatch, clock: Clock, seconds: float) -> float | None:
    """The clock goes on in steps of a second; what the watch says at the end."""
    for _ in range(int(seconds)):
        clock.now += 1
        found = watch.overdue()
    return found


def test_every_beat_starts_the_time_anew(tmp_path: Path) -> None:
    clock = Clock()
    watch, reporter = a_watch(tmp_path, clock, [20.0])
    for _ in range(5):
        assert walk(watch, clock, 15) is None
        reporter.beat()
    assert walk(watch, clock, 19) is None
    assert walk(watch, clock, 3) == pytest.approx(21, abs=1)


def test_time_in_which_the_whole_pod_was_frozen_does_not_count(tmp_path: Path) -> None:
    clock = Clock()
    watch, _ = a_watch(tmp_path, clock, [20.0])
    walk(watch, clock, 10)
    clock.now += 3600
    assert watch.overdue() is None
    assert walk(watch, clock, 5) is None


def test_a_limit_that_was_raised_meanwhile_counts(tmp_path: Path) -> None:
    clock, limits = Clock(), [20.0]
    watch, _ = a_watch(tmp_path, clock, limits)
    walk(watch, clock, 15)
    limits[0] = 60.0
    assert walk(watch, clock, 40) is None
    assert walk(watch, clock, 20) is not None


def test_the_upload_of_a_checkpoint_is_no_beat_of_the_training(tmp_path: Path) -> None:
    clock = Clock()
    watch, reporter = a_watch(tmp_path, clock, [20.0])
    side = threading.Thread(target=reporter.update, kwargs={"checkpoint": None})
    walk(watch, clock, 15)
    side.start()
    side.join()
    assert walk(watch, clock, 10) is not None


def shown(rank: int, file: str, function: str) -> Shown:
    return Shown(rank, "", [Frame(file, 7, function)], "")


def test_a_pod_of_ranks_that_only_wait_is_affected_and_not_the_culprit() -> None:
    waiting = [shown(rank, "/x/torch/distributed/distributed_c10d.py", "all_reduce") for rank in (4, 5)]
    cause = describe(waiting, 60, "the pod's log")
    assert (cause.kind, cause.rank, cause.exit_code) == (Kind.BROKEN, None, ExitCode.STALLED)
    cause = describe([*waiting, shown(6, "/x/queue.py", "get")], 60, "the pod's log")
    assert (cause.kind, cause.rank) == (Kind.OWN, 6)


class WaitingWorkers:
    """Of which none hangs by itself."""

    processes: ClassVar[dict[int, int]] = {}

    def poll(self) -> dict[int, int]:
        return {}


@pytest.mark.parametrize(("nodes", "later"), [(1, 0.0), (2, 1.0)])
def test_a_pod_that_only_waits_leaves_after_the_one_with_the_culprit(
    nodes: int, later: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stalls, "HEARING_SECONDS", later)
    pod = Pod(tmp_path / "job.json", tmp_path, 1, nodes, 1, 0, "127.0.0.1", None, "127.0.0.1", 30)
    job = a_job(tmp_path, runPolicy={"stallTimeoutSeconds": 1})
    pod.job_file.write_text(job.model_dump_json(by_alias=True, exclude_none=True))
    supervision = Supervision(pod, job, WaitingWorkers(), SimpleNamespace(count=0))  # type: ignore[arg-type]
    begun = time.monotonic()
    wait_for(lambda: supervision.look() is Finding.FAILED)
    assert supervision.stalled is not None
    assert supervision.stalled.kind is Kind.BROKEN
    assert time.monotonic() - begun > 1 + later


@pytest.mark.parametrize(
    ("file", "waits"),
    [
        ("/x/torch/distributed/distributed_c10d.py", True),
        ("/x/torch/autograd/graph.py", True),
        ("/x/torch/distributed/checkpoint/filesystem.py", False),
        ("/x/torch/utils/data/dataloader.py", False),
    ],
)
def test_who_waits_for_others_is_seen_by_the_newest_call(file: str, waits: bool) -> None:
    assert waits_for_peers([Frame(file, 1, "f"), Frame("/x/trainer.py", 2, "g")]) is waits


def test_the_main_threads_newest_stack_is_found_among_all() -> None:
    text = """rank 0, main thread 0x00007f0000000001
Thread 0x00007f0000000002 (most recent call first):
  File "/x/socketserver.py", line 5 in serve

Current thread 0x00007f0000000001 (most recent call first):
  File "/x/train.py", line 10 in old

Thread 0x00007f0000000002 (most recent call first):
  File "/x/socketserver.py", line 5 in serve

Current thread 0x00007f0000000001 (most recent call first):
  File "/x/train.py", line 12 in step
  File "<frozen runpy>", line 198 in _run_module_as_main
"""
    assert main_stack(text)[0] == Frame("/x/train.py", 12, "step")
    assert main_stack("rank 0, main thread 0x00007f0000000001\n") == []
