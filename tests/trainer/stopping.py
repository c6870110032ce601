"""A reporter that stops or kills the run it reports on."""

from __future__ import annotations

import os
import signal
from typing import Any

from finetune_api.contract import Stage
from finetune_trainer.preemption import StopFlag
from finetune_trainer.progress import Reporter


class StopsAt(Reporter):
    """Asks for the stop as SIGTERM would, when the run has come to a step or a stage."""

    def __init__(self, stop: StopFlag, step: int | None = None, stage: Stage | None = None) -> None:
        super().__init__()
        self._stop, self._step, self._when = stop, step, stage

    def update(self, **fields: Any) -> None:
        if fields.get("step") == self._step and self._step:
            self._stop.request()
        super().update(**fields)

    def stage(self, stage: Stage, detail: str = "") -> None:
        if stage is self._when:
            self._stop.request()
        super().stage(stage, detail)


class KillsAt(Reporter):
    """Ends this process by SIGKILL after a step, which nothing in it can hear."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def update(self, **fields: Any) -> None:
        if fields.get("step") == self._step and "epoch" in fields:
            os.kill(os.getpid(), signal.SIGKILL)
        super().update(**fields)
