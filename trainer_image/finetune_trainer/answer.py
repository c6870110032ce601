"""What the trainer is asked for on a command line, by `finetune plan`, and how it answers."""

from __future__ import annotations

import sys
from collections.abc import Callable

from finetune_api.common import Message
from finetune_trainer.errors import TrainerError


def answer(find: Callable[[], Message]) -> int:
    """Print what was found as JSON, or on standard error why not; the exit code is the contract's, 0 for success."""
    try:
        found = find()
    except TrainerError as error:
        print(f"{error.message}" + (f"; {error.advice}" if error.advice else ""), file=sys.stderr)
        return int(error.exit_code)
    print(found.model_dump_json(by_alias=True))
    return 0
