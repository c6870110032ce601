"""SIGTERM, SIGKILL, and who is left afterwards."""

from __future__ import annotations

import time

from finetune_api.contract import Cause, ExitCode
from tests.launch.conftest import StartPod, ended


def test_a_worker_that_needs_time_to_save_gets_it(start_pod: StartPod) -> None:
    pod = start_pod("save_when_asked")
    pod.line("training")
    pod.stop()
    assert pod.exit_code() == ExitCode.TEMPFAIL
    assert (pod.folder / "scratch" / "saved").exists()
    assert pod.line("saving") == "saving with 20 s left"
    assert pod.message.cause is Cause.DISRUPTION
    assert pod.message.message == "saved step 8"


def test_a_stop_before_training_loses_nothing_and_is_never_a_success(start_pod: StartPod) -> None:
    pod = start_pod("stop_before_training")
    pod.line("downloading")
    pod.stop()
    assert pod.exit_code() == ExitCode.TEMPFAIL
    assert "outside of training" in pod.message.message


def test_a_stop_while_the_gang_gathers_is_heard_at_once(start_pod: StartPod) -> None:
    pod = start_pod("never_stop", PET_NNODES=2, PET_NODE_RANK=0, PET_MASTER_ADDR="127.0.0.1")
    pod.line("waiting for the other pods")
    asked = time.monotonic()
    pod.stop()
    assert pod.exit_code() == ExitCode.TEMPFAIL
    assert time.monotonic() - asked < 3
    assert pod.message.cause is Cause.DISRUPTION


def test_a_worker_that_ignores_sigterm_is_killed_within_the_grace_period(start_pod: StartPod) -> None:
    pod = start_pod("never_stop", FINETUNE_GRACE_PERIOD_SECONDS=3)
    pod.line("training")
    asked = time.monotonic()
    pod.stop()
    assert pod.exit_code() == ExitCode.TEMPFAIL
    assert 1.5 <= time.monotonic() - asked < 3
    assert "did not stop within the grace period" in pod.message.message
    assert "terminationGracePeriodSeconds" in pod.message.advice


def test_a_second_sigterm_leaves_five_seconds(start_pod: StartPod) -> None:
    pod = start_pod("never_stop", FINETUNE_GRACE_PERIOD_SECONDS=600)
    pod.line("training")
    pod.stop()
    pod.line("asked to stop")
    asked = time.monotonic()
    pod.stop()
    assert pod.exit_code() == ExitCode.TEMPFAIL
    assert time.monotonic() - asked < 7


def test_killing_launch_leaves_no_worker_and_no_helper_behind(start_pod: StartPod) -> None:
    pod = start_pod("keep_helpers")
    pids = [int(word) for word in pod.line("pids").split()[1:]]
    assert len(pids) == 3
    pod.process.kill()
    assert all(ended(pid, 5) for pid in pids)


def test_helpers_of_a_rank_that_was_killed_are_ended(start_pod: StartPod) -> None:
    pod = start_pod("keep_helpers", FINETUNE_GRACE_PERIOD_SECONDS=2)
    pids = [int(word) for word in pod.line("pids").split()[1:]]
    pod.stop()
    assert pod.exit_code() == ExitCode.TEMPFAIL
    assert all(ended(pid, 5) for pid in pids)


def test_a_pool_of_forked_helpers_can_be_terminated(start_pod: StartPod) -> None:
    assert start_pod("terminate_a_pool").exit_code() == ExitCode.OK
