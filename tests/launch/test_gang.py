"""Several ranks and several pods: who is to blame, and who waits for whom."""

from __future__ import annotations

import re

from finetune_api.contract import Cause, ExitCode
from tests.launch.conftest import RunningPod, StartPod
from tests.support.gangs import fresh_address


def start_gang(start_pod: StartPod, entry: str, **extra: object) -> list[RunningPod]:
    """Two pods of one rank each."""
    first = fresh_address()
    return [
        start_pod(entry, address=first, PET_NNODES=2, PET_NODE_RANK=0, PET_MASTER_ADDR=first, **extra),
        start_pod(entry, PET_NNODES=2, PET_NODE_RANK=1, PET_MASTER_ADDR=first, **extra),
    ]


def test_the_rank_that_failed_wins_over_the_rank_that_noticed(start_pod: StartPod) -> None:
    pod = start_pod("lose_rank_one", PET_NPROC_PER_NODE=2)
    assert pod.exit_code() == ExitCode.DATA
    message = pod.message
    assert (message.rank, message.cause) == (1, Cause.DATA)
    assert message.message == "rows.jsonl:9 is truncated"
    noticed = (pod.folder / "scratch" / "causes" / "rank-0.json").read_text()
    assert '"kind":"Broken"' in noticed


def test_lines_of_several_ranks_begin_with_the_rank(start_pod: StartPod) -> None:
    pod = start_pod("add_up", PET_NPROC_PER_NODE=2)
    assert pod.exit_code() == ExitCode.OK
    assert pod.line("rank 1 of 2") == "[rank 1] rank 1 of 2 sees 3"


def test_two_pods_find_each_other_and_end_together(start_pod: StartPod) -> None:
    first, second = start_gang(start_pod, "add_up")
    assert (first.exit_code(), second.exit_code()) == (ExitCode.OK, ExitCode.OK)
    assert second.line("sees") == "[rank 1] rank 1 of 2 sees 3"
    assert first.message.result is not None
    assert second.message.result is None


def test_a_request_to_one_pod_stops_all_at_the_same_step(start_pod: StartPod) -> None:
    first, second = start_gang(start_pod, "agree_to_stop")
    first.line("training"), second.line("training")
    second.stop()
    assert second.exit_code() == ExitCode.TEMPFAIL
    stops = [pod.line("stopped after step") for pod in (first, second)]
    first.stop()
    assert first.exit_code() == ExitCode.TEMPFAIL
    assert len({re.search(r"step (\d+)", line).group(1) for line in stops}) == 1  # type: ignore[union-attr]


def test_a_pod_that_is_stopped_since_another_one_was_asked_to_ends_as_if_it_were_itself(start_pod: StartPod) -> None:
    first, second = start_gang(start_pod, "leave_at_once_beside_one_that_saves")
    first.line("training"), second.line("training")
    first.stop()
    second.line("stopped on request before the worker was ready; nothing was lost; waits for the request to stop")
    second.stop()
    assert (first.exit_code(), second.exit_code()) == (ExitCode.TEMPFAIL, ExitCode.TEMPFAIL)


def test_a_pod_that_lost_its_peer_waits_for_sigterm_before_it_exits(start_pod: StartPod) -> None:
    first, second = start_gang(start_pod, "lose_rank_one")
    assert second.exit_code() == ExitCode.DATA
    first.line("waits for the request to stop")
    assert first.process.poll() is None
    first.stop()
    assert first.exit_code() == ExitCode.UNAVAILABLE
    assert first.message.cause is Cause.INFRASTRUCTURE


def test_a_pod_of_another_attempt_is_not_let_in(start_pod: StartPod) -> None:
    address = fresh_address()
    first = start_pod(
        "add_up", address=address, PET_NNODES=2, PET_NODE_RANK=0, PET_MASTER_ADDR=address, FINETUNE_ATTEMPT=2
    )
    first.line("waiting for the other pods")
    stale = start_pod("add_up", PET_NNODES=2, PET_NODE_RANK=1, PET_MASTER_ADDR=address, FINETUNE_ATTEMPT=1)
    stale.line("waits for the request to stop")
    stale.stop()
    assert stale.exit_code() == ExitCode.UNAVAILABLE
    assert stale.message.message == "this pod belongs to attempt 1, but index 0 to attempt 2"
    first.stop()
    assert first.exit_code() == ExitCode.TEMPFAIL


def test_a_pod_does_not_succeed_when_index_0_delivers_nothing(start_pod: StartPod) -> None:
    first, second = start_gang(start_pod, "forget_the_result")
    assert first.exit_code() == ExitCode.SOFTWARE
    second.line("waits for the request to stop")
    second.stop()
    assert second.exit_code() == ExitCode.UNAVAILABLE
    assert "before it had delivered" in second.message.message
