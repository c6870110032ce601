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
    """SIGTERM for the pod, as the kubelet sends it, when the rank has come to a stage."""

    def stage(self, stage: Stage, detail: str = "") -> None:
        super().stage(stage, detail)
        if stage.value == os.environ["TEST_STAGE"]:
            os.environ["TEST_STAGE"] = ""
            os.kill(os.getppid(), signal.SIGTERM)


def _stop_at_uploads() -> None:
    """Ask for the stop when a checkpoint has just been handed over for its upload."""
    submit = Checkpoints.submit

    def submit_and_stop(*arguments: Any, **named: Any) -> Any:
        answer = submit(*arguments, **named)
        os.kill(os.getppid(), signal.SIGTERM)
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
    if os.environ["TEST_STAGE"] == "Uploading" and context.is_main:
        _stop_at_uploads()
    _disturbed(context, StopsPod(context.attempt, context.rank))


def be_slow(context: Context) -> None:
    _disturbed(context, Slow(context.attempt, context.rank))
