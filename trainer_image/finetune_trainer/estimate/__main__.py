"""`python -m finetune_trainer.estimate JOB FOLDER [RANKS...]`: a job on so many GPUs, as a Simulation in JSON.

JOB is a resolved job.json, FOLDER holds config.json (and the code beside it, where that is trusted).
"""

from __future__ import annotations

import sys
from pathlib import Path

from finetune_trainer.answer import answer
from finetune_trainer.estimate.simulation import simulate
from finetune_trainer.runtime import load_job


def main(arguments: list[str] | None = None) -> int:
    """Print the simulation; the exit code is the contract's, 0 for success."""
    job, folder, *sizes = arguments if arguments is not None else sys.argv[1:]
    return answer(lambda: simulate(load_job(Path(job)), Path(folder), [int(size) for size in sizes]))


if __name__ == "__main__":
    sys.exit(main())
