"""What agents tell each other beside their workers' collectives."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from torch.distributed import TCPStore

from finetune_api.contract import ExitCode
from finetune_trainer import pulse
from finetune_trainer.pulse import Pulse
from finetune_trainer.runtime import Pod
from tests.launch.conftest import StartPod, ended
from tests.launch.test_gang import start_gang
from tests.support.processes import wait_for

SILENT = 4.0
"""Seconds; entries.deliver_slowly takes twice as long."""
POD = Pod.from_environment({"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1"})


@pytest.fixture
def pulses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Pulse]]:
    """Those of both pods of a gang."""
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(pulse, "BROKEN_SECONDS", 0.2)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made = [Pulse(replace(POD, node_rank=rank), "127.0.0.1", store.port) for rank in (0, 1)]
    yield made
    for each in made:
        each.end()


def test_pods_that_live_are_not_missed_and_nobody_stops(pulses: list[Pulse]) -> None:
    wait_for(lambda: all(each.beats > 3 for each in pulses), 5)
    assert [each.lost() for each in pulses] == [None, None]
    assert [each.stopped for each in pulses] == [False, False]


def test_a_request_to_one_pod_is_heard_by_all_even_when_it_ends_at_once(pulses: list[Pulse]) -> None:
    pulses[1].tell_stop()
    pulses[1].end()
    wait_for(lambda: pulses[0].stopped, 5)


def fall_silent(one: Pulse, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a node without power: its connection stays open."""
    monkeypatch.setattr(one, "_beat", lambda store: None)


def test_a_pod_that_falls_silent_is_missed_by_all(pulses: list[Pulse], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SILENT_SECONDS", 0.5)
    fall_silent(pulses[1], monkeypatch)
    text = wait_for(pulses[0].lost, 5)
    assert text.startswith("the pod with index 1 was not heard of")


def test_a_pod_whose_ranks_have_ended_well_is_not_missed(pulses: list[Pulse], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SILENT_SECONDS", 0.3)
    pulses[1].tell_done()
    pulses[1].end()
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() - begun > 1, 5)
    assert pulses[0].lost() is None


def test_that_index_0_has_delivered_is_heard_and_that_it_was_heard_too(pulses: list[Pulse]) -> None:
    assert not pulses[1].delivered
    pulses[0].tell_delivered()
    wait_for(lambda: pulses[1].delivered, 5)
    wait_for(lambda: pulses[0].heard == 1, 5)


@pytest.mark.slow
def test_index_0_delivers_for_longer_than_a_pod_may_be_silent(start_pod: StartPod) -> None:
    """The ranks of the other pod have nothing left to do meanwhile, and it ends with OK when index 0 does."""
    first, second = start_gang(start_pod, "deliver_slowly", TEST_SILENT_SECONDS=SILENT)
    assert (first.exit_code(), second.exit_code()) == (ExitCode.OK, ExitCode.OK)


@pytest.mark.slow
def test_a_pod_that_is_done_leaves_when_index_0_dies_before_it_has_delivered(start_pod: StartPod) -> None:
    first, second = start_gang(start_pod, "deliver_slowly", TEST_SILENT_SECONDS=SILENT)
    delivering = int(first.line("delivering").split()[-1])
    done = int(second.line("done").split()[-1])
    assert ended(done, 30)
    begun = time.monotonic()
    for pid in (first.process.pid, delivering):
        os.kill(pid, signal.SIGSTOP)
    second.line("waits for the request to stop")
    assert time.monotonic() - begun < SILENT + 5
    second.stop()
    assert second.exit_code() == ExitCode.UNAVAILABLE
    assert second.message.message.startswith("index 0 ended before it had delivered")


@pytest.mark.slow
def test_a_pod_whose_peers_node_is_dead_leaves_within_half_a_minute(start_pod: StartPod) -> None:
    """Stopped processes keep their connections open, as those of a node without power do."""
    first, second = start_gang(start_pod, "add_up_again")
    first.line("begun"), second.line("begun")
    workers = [int(word) for word in second.line("begun").split()[-1:]]
    begun = time.monotonic()
    for pid in (second.process.pid, *workers):
        os.kill(pid, signal.SIGSTOP)
    first.line("waits for the request to stop")
    assert time.monotonic() - begun < 30
    first.stop()
    assert first.exit_code() == ExitCode.UNAVAILABLE
    assert first.message.message.startswith("the pod with index 1 was not heard of")
