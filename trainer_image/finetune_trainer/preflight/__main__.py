"""The entry point of a preflight pod."""

from __future__ import annotations

import os
import sys
import traceback

from finetune_api.contract import ExitCode, TerminationMessage
from finetune_trainer.diagnosis import classify
from finetune_trainer.errors import TrainerError
from finetune_trainer.preflight.checks import Preflight
from finetune_trainer.runtime import Pod, load_job
from finetune_trainer.storage import Store
from finetune_trainer.termination import failure_message, write_termination


def main() -> int:
    """Check the job of the environment; returns the exit code, with the termination message written."""
    try:
        message = _found()
    except Exception as error:
        if not isinstance(error, TrainerError):
            traceback.print_exception(error)
        message = failure_message(classify(error), 1, None)
        print(f"exit {message.exit_code}: {message.message}\nadvice: {message.advice}", file=sys.stderr)
    write_termination(message)
    return message.exit_code


def _found() -> TerminationMessage:
    pod = Pod.from_environment()
    pod.scratch.mkdir(parents=True, exist_ok=True)
    with Store.connect(os.environ) as store:
        findings = Preflight(load_job(pod.job_file), store, pod).run()
    return TerminationMessage(exit_code=ExitCode.OK, message="; ".join(findings.told), warnings=findings.warnings)


if __name__ == "__main__":
    sys.exit(main())
