"""What ranks do in place of the trainer's own entry in tests of faults: the same, disturbed."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from finetune_api.contract import Stage
from finetune_trainer import train
from finetune_trainer.checkpoints import Checkpoints
from finetune_trainer.progress import Reporter
from finetune_trainer.runtime import Context
from tests.support.processes import wait_for


class Counting(Reporter):
    """Does something after so many steps of this attempt."""

    def __init__(self, attempt: int, rank: int, steps: int) -> None:
        super().__init__(attempt, rank)
        self._left = steps

    def act(self) -> None:
        """Called once."""

    def update(self, **fields: Any) -> None:
        super().update(**fields)
        if "epoch" in fields:
            self._left -= 1
            if self._left == 0:
                self.act()


class Killed(Counting):
    """SIGKILL a moment later, wherever the rank is then: in a step, in a collective, in a save."""

    def act(self) -> None:
        delay = float(os.environ["TEST_DELAY"])
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


class StopsPod(Reporter):
    """SIGTERM for the pod, as the kubelet sends it, when the rank has come to a stage; that lasts until it hears it."""

    def __init__(self, context: Context) -> None:
        super().__init__(context.attempt, context.rank)
        self._stop, self._stage = context.stop, os.environ["TEST_STAGE"]

    def stage(self, stage: Stage, detail: str = "") -> None:
        super().stage(stage, detail)
        if stage.value == self._stage:
            self.stop_pod()

    def stop_pod(self) -> None:
        """Once; a second request would be a hurry."""
        if not self._stop.requested:
            os.kill(os.getppid(), signal.SIGTERM)
            wait_for(lambda: self._stop.requested)


def _stop_at_uploads(reporter: StopsPod) -> None:
    """Ask for the stop when a checkpoint has just been handed over for its upload."""
    submit = Checkpoints.submit

    def submit_and_stop(*arguments: Any, **named: Any) -> Any:
        answer = submit(*arguments, **named)
        reporter.stop_pod()
        return answer

    Checkpoints.submit = submit_and_stop  # type: ignore[method-assign]


class Slow(Reporter):
    """Takes its time after every step."""

    def update(self, **fields: Any) -> None:
        super().update(**fields)
        if "epoch" in fields:
            time.sleep(0.2)


def _disturbed(context: Context, reporter: Reporter) -> None:
    """Train, with another reporter on the rank that TEST_RANK names."""
    if context.rank == int(os.environ["TEST_RANK"]):
        object.__setattr__(context, "reporter", reporter)
    train.main(context)


def be_killed(context: Context) -> None:
    _disturbed(context, Killed(context.attempt, context.rank, int(os.environ["TEST_STEPS"])))


def stop_in_stage(context: Context) -> None:
    reporter = StopsPod(context)
    if os.environ["TEST_STAGE"] == "Uploading" and context.is_main:
        _stop_at_uploads(reporter)
    _disturbed(context, reporter)


def be_slow(context: Context) -> None:
    _disturbed(context, Slow(context.attempt, context.rank))
