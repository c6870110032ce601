"""The stop flag."""

from __future__ import annotations

import math
import os
import signal

import pytest

from finetune_trainer.errors import StoppedError
from finetune_trainer.preemption import HURRY_SECONDS, StopFlag, stop_budget


@pytest.fixture
def flag():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    flag = StopFlag(grace_seconds=120)
    flag.install()
    yield flag
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_is_requested_at_first(flag: StopFlag) -> None:
    flag.check()
    assert not flag.requested
    assert not flag.agreed()
    assert flag.seconds_left() == math.inf


def test_sigterm_sets_the_flag_and_leaves_the_agent_ten_seconds(flag: StopFlag) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag.requested
    assert flag.agreed()
    assert 109 < flag.seconds_left() <= 110
    with pytest.raises(StoppedError):
        flag.check()


def test_asking_again_hurries_and_never_gives_more_time(flag: StopFlag) -> None:
    flag.request()
    flag.request()
    assert flag.seconds_left() <= HURRY_SECONDS


@pytest.mark.parametrize(("grace", "budget"), [(120, 110), (30, 20), (12, 6), (1, 0.5)])
def test_a_short_grace_period_is_shared(grace: float, budget: float) -> None:
    assert stop_budget(grace) == budget
