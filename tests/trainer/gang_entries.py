"""What ranks do in place of the trainer's own entry: several jobs one after the other, some of them with a stop."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune_trainer import train
from finetune_trainer.errors import StoppedError
from finetune_trainer.preemption import StopFlag
from finetune_trainer.runtime import Context, load_job
from tests.support.gangs import JOBS
from tests.trainer.stopping import StopsAt

STOPPED = "stopped"
"""In the name of a job that is to be stopped after its fourth step, and to go on."""


def several(context: Context) -> None:
    """Importing the libraries takes longer than any of these trainings."""
    torch.set_num_threads(1)
    for file in sorted(Path(os.environ[JOBS]).glob("*.json")):
        own = replace(context, job=load_job(file), job_file=file, scratch=context.scratch / file.stem)
        own.scratch.mkdir(exist_ok=True)
        if STOPPED in file.stem:
            _stop_after_step_4(own)
        train.main(own)
    if context.is_main:
        shutil.copy(own.result_file, context.result_file)


def _stop_after_step_4(context: Context) -> None:
    """Of the ranks the last is asked to stop; all must do so together."""
    stop = StopFlag(60, context.world_size)
    stopping = replace(context, stop=stop, attempt=1)
    if context.rank == context.world_size - 1:
        stopping = replace(stopping, reporter=StopsAt(stop, step=4))
    with pytest.raises(StoppedError, match="after step 4, which is saved"):
        train.main(stopping)
