"""One attempt at a job in a process of its own: `killed.py FOLDER ATTEMPT STEP`; STEP 0 lets it come to its end.

FOLDER holds job.json. Windows are as small as in test_streaming.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from finetune_api.job import FineTuneJob
from finetune_trainer.data import order
from tests.support.jobs import a_context, run
from tests.trainer.stopping import KillsAt


def main(folder: Path, attempt: int, step: int) -> None:
    torch.set_num_threads(1)
    order.WINDOW_ROWS = 5
    job = FineTuneJob.model_validate_json((folder / "job.json").read_text())
    context = a_context(job, folder / f"scratch-{attempt}", attempt)
    if step:
        object.__setattr__(context, "reporter", KillsAt(step))
    run(job, context.scratch, attempt, context)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
