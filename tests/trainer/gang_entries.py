"""What ranks do in place of the trainer's own entry: the same, disturbed."""

from __future__ import annotations

from finetune_trainer import train
from finetune_trainer.runtime import Context
from tests.trainer.stopping import StopsAt


def stop_rank_1_at_step_4(context: Context) -> None:
    """One rank alone is asked to stop; all must stop with it."""
    if context.rank == 1:
        object.__setattr__(context, "reporter", StopsAt(context.stop, step=4))
    train.main(context)
