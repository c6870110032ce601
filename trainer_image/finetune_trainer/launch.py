"""The entry point of a trainer pod: `python -m finetune_trainer.launch`.

Reads the pod's environment and the job, runs the workers under torch's elastic agent, finds the root cause of their
end, writes the termination message and exits with the code that tells the operator what to do.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from finetune_api import contract
from finetune_api.contract import ExitCode, Progress, Result, TerminationMessage
from finetune_api.job import FineTuneJob
from finetune_trainer.causes import CauseRecord, Kind, cause_file, root_cause
from finetune_trainer.diagnosis import classify
from finetune_trainer.errors import TrainerError, UsageError
from finetune_trainer.heartbeat import heartbeat_file
from finetune_trainer.memory import oom_kills
from finetune_trainer.progress import read_progress
from finetune_trainer.runtime import Pod, load_job, progress_file, result_file
from finetune_trainer.stacks import stacks_file
from finetune_trainer.stop_signals import StopRequested, StopSignals
from finetune_trainer.supervision import run_alone
from finetune_trainer.termination import failure_message, success_message, write_termination
from finetune_trainer.workers import Workers

ENTRYPOINT = "finetune_trainer.train:main"
RENDEZVOUS_SECONDS = 900.0
"""How long pods wait for each other: images are pulled and nodes are added in between."""
LOST_PEER_SECONDS = 30.0
"""A pod whose peer failed waits so long for the operator's SIGTERM, so that only the culprit counts as failed."""


def launch(entrypoint: str = ENTRYPOINT, rendezvous_seconds: float = RENDEZVOUS_SECONDS) -> int:
    """Run this pod's share of the job; returns the exit code, with the termination message written.

    Args:
        entrypoint: `module:function` that every worker calls with its Context.
        rendezvous_seconds: how long to wait for the other pods.
    """
    started_at = time.time()
    stop = StopSignals()
    attempt = 1
    try:
        pod = Pod.from_environment()
        attempt = pod.attempt
        outcome = _run(pod, entrypoint, rendezvous_seconds, started_at, stop)
    except BaseException as error:
        stop.defer()
        outcome = _explain(error)
    message = _last_word(outcome, attempt)
    write_termination(message)
    return message.exit_code


def _run(
    pod: Pod, entrypoint: str, rendezvous_seconds: float, started_at: float, stop: StopSignals
) -> Result | CauseRecord | None:
    """The result (on the pod with index 0), or the cause of the failure."""
    _prepare_scratch(pod)
    job = load_job(pod.job_file)
    killed_before = oom_kills()
    workers = Workers(entrypoint, pod, started_at)
    try:
        stumbled, asked = _supervise(pod, job, workers, stop, rendezvous_seconds)
    finally:
        stop.defer()
        workers.kill()
    killed = (oom_kills() or 0) - killed_before if killed_before is not None else None
    stopping = stop.count > 0 or asked
    cause = root_cause(
        workers.ends(), stumbled, world_size=pod.world_size, stopping=stopping, oom_kills=killed
    ) or _missing_result(pod)
    if cause is None:
        return _read_result(pod)
    if pod.nodes > 1 and cause.kind in (Kind.BROKEN, Kind.STOPPED) and not stop.count:
        print(f"{cause.message}; waits for the request to stop", file=sys.stderr, flush=True)
        stop.wait(LOST_PEER_SECONDS)
    return cause


def _supervise(
    pod: Pod, job: FineTuneJob, workers: Workers, stop: StopSignals, rendezvous_seconds: float
) -> tuple[CauseRecord | None, bool]:
    """Run the agent to the end of all workers.

    Returns:
        What it stumbled over itself, a standstill included, and whether another pod was asked to stop.
    """
    if pod.world_size == 1:
        return _alone(pod, job, workers, stop), False
    # Imports torch, while the workers import theirs.
    from finetune_trainer.agent import GangAgent

    agent = GangAgent(pod, job, workers, stop, rendezvous_seconds)
    try:
        agent.run()
    except Exception as error:
        return _explain(error), agent.stops_with_peers
    return agent.stalled, agent.stops_with_peers


def _alone(pod: Pod, job: FineTuneJob, workers: Workers, stop: StopSignals) -> CauseRecord | None:
    try:
        return run_alone(pod, job, workers, stop)
    except Exception as error:
        return _explain(error)


def _explain(error: BaseException) -> CauseRecord:
    """What ended launch itself."""
    if isinstance(error, StopRequested):
        message = "stopped on request before training began; nothing was lost"
        return CauseRecord(kind=Kind.STOPPED, exit_code=ExitCode.TEMPFAIL, message=message)
    if not isinstance(error, TrainerError):
        traceback.print_exception(error)
    return classify(error)


def _last_word(outcome: Result | CauseRecord | None, attempt: int) -> TerminationMessage:
    if isinstance(outcome, CauseRecord):
        print(f"exit {outcome.exit_code}: {outcome.message}", file=sys.stderr)
        if outcome.advice:
            print(f"advice: {outcome.advice}", file=sys.stderr)
        return failure_message(outcome, attempt, _reached())
    return success_message(outcome, attempt, _reached())


def _reached() -> Progress | None:
    scratch = os.environ.get(contract.ENV_SCRATCH_DIR, contract.SCRATCH_DIR)
    return read_progress(progress_file(Path(scratch)))


def _prepare_scratch(pod: Pod) -> None:
    """Nothing of an earlier run in the same folder may speak for this one."""
    try:
        pod.scratch.mkdir(parents=True, exist_ok=True)
        for file in (cause_file, heartbeat_file, stacks_file):
            shutil.rmtree(file(pod.scratch, 0).parent, ignore_errors=True)
        for file in (result_file(pod.scratch), progress_file(pod.scratch)):
            file.unlink(missing_ok=True)
    except PermissionError as error:
        advice = f"mount a writable volume there, or set {contract.ENV_SCRATCH_DIR}"
        raise UsageError(f"the scratch folder {pod.scratch} cannot be written: {error.strerror}", advice) from error


def _missing_result(pod: Pod) -> CauseRecord | None:
    """Success is only what can be shown."""
    if pod.node_rank > 0 or result_file(pod.scratch).exists():
        return None
    message = "all ranks ended without an error, but rank 0 left no result"
    return CauseRecord(kind=Kind.OWN, exit_code=ExitCode.SOFTWARE, message=message, rank=0)


def _read_result(pod: Pod) -> Result | None:
    """What rank 0 delivered; raises ValidationError where it is no `Result`."""
    if pod.node_rank > 0:
        return None
    return Result.model_validate_json(result_file(pod.scratch).read_text())


def main() -> NoReturn:
    code = launch()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of the interpreter's end: the destructors of stores and thread pools can only cost time now.
    os._exit(code)


if __name__ == "__main__":
    main()
