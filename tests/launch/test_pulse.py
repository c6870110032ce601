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
from tests.launch.conftest import StartPod
from tests.launch.test_gang import start_gang
from tests.support.processes import wait_for

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


def test_a_pod_that_falls_silent_is_missed_by_all(pulses: list[Pulse], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SILENT_SECONDS", 0.5)
    pulses[1].end()
    text = wait_for(pulses[0].lost, 5)
    assert text.startswith("the pod with index 1 was not heard of")


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
