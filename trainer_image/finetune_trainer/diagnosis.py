"""From an exception to its cause: whose fault it was, in words that name the field, file or place, with a way out."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import traceback
from pathlib import Path
from types import TracebackType

from finetune_api.contract import ExitCode
from finetune_api.job import FineTuneJob
from finetune_trainer.causes import HOST_MEMORY_ADVICE, PEER_ADVICE, CauseRecord, Kind
from finetune_trainer.errors import StoppedError, TrainerError, UnavailableError
from finetune_trainer.estimate.advice import less_memory

BROKEN_COLLECTIVE_SIGNS = (
    "gloo", "nccl", "connection closed by peer", "connection reset by peer", "socket timeout", "process group watchdog",
)  # fmt: skip
"""Words in the RuntimeErrors that collectives raise when a peer is gone; torch has no class for all of them."""
OUT_OF_MEMORY_SIGNS = ("cuda error: out of memory", "cublas_status_alloc_failed")
HOST_MEMORY_SIGNS = ("defaultcpuallocator: can't allocate memory", "cannot allocate memory")
DISK_FULL_SIGNS = ("no space left on device", "disk quota exceeded")


class PeersLostError(UnavailableError):
    """Other pods of the gang are gone, or belong to another attempt."""


def classify(error: BaseException, job: FineTuneJob | None = None) -> CauseRecord:
    """Describe an exception that ended a worker (or the agent).

    Args:
        error: what was raised.
        job: for advice with its numbers.
    """
    record = _classify_chain(error, job)
    record.traceback = "".join(traceback.format_exception(error))
    return record


def _classify_chain(error: BaseException, job: FineTuneJob | None) -> CauseRecord:
    """Libraries wrap what we raise inside their callbacks, so the explicit causes count too."""
    link: BaseException | None = error
    while link is not None:
        if known := _known(link, job):
            return known
        link = link.__cause__
    message = f"{_named(error)}{_place(error.__traceback__)}"
    return _own(ExitCode.SOFTWARE, message, "the whole traceback is in the pod's log")


def _known(error: BaseException, job: FineTuneJob | None) -> CauseRecord | None:
    text = str(error).lower()
    kinds = (_of_program, _of_disk, _of_memory, _of_peers, _of_service)
    return next((record for kind in kinds if (record := kind(error, text, job))), None)


def _of_program(error: BaseException, _text: str, _job: FineTuneJob | None) -> CauseRecord | None:
    if isinstance(error, TrainerError):
        return _of_trainer_error(error)
    if isinstance(error, KeyboardInterrupt):
        return CauseRecord(kind=Kind.STOPPED, exit_code=ExitCode.TEMPFAIL, message="interrupted")
    return None


def _of_disk(error: BaseException, text: str, _job: FineTuneJob | None) -> CauseRecord | None:
    # safetensors and torch.save raise classes of their own with the system's words in them.
    numbered = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return _disk_full(error) if numbered or any(sign in text for sign in DISK_FULL_SIGNS) else None


def _of_memory(error: BaseException, text: str, job: FineTuneJob | None) -> CauseRecord | None:
    if _is_torch(error, "OutOfMemoryError") or any(sign in text for sign in OUT_OF_MEMORY_SIGNS):
        message = f"the accelerator's memory is exhausted: {_first_line(error)}{_place(error.__traceback__)}"
        return _own(ExitCode.OUT_OF_MEMORY, message, _accelerator_advice(job))
    if isinstance(error, MemoryError) or any(sign in text for sign in HOST_MEMORY_SIGNS):
        message = f"the pod's memory is exhausted: {_named(error)}{_place(error.__traceback__)}"
        return _own(ExitCode.OUT_OF_MEMORY, message, HOST_MEMORY_ADVICE)
    return None


def _of_peers(error: BaseException, text: str, _job: FineTuneJob | None) -> CauseRecord | None:
    if not _is_broken_collective(error, text):
        return None
    message = f"a collective operation broke because a peer is gone: {_first_line(error)}"
    return CauseRecord(kind=Kind.BROKEN, exit_code=ExitCode.UNAVAILABLE, message=message, advice=PEER_ADVICE)


def _of_service(error: BaseException, _text: str, _job: FineTuneJob | None) -> CauseRecord | None:
    if not isinstance(error, (ConnectionError, TimeoutError)):
        return None
    message = f"a service did not answer: {_named(error)}{_place(error.__traceback__)}"
    return _own(ExitCode.UNAVAILABLE, message, "check that it can be reached from the pod")


def _of_trainer_error(error: TrainerError) -> CauseRecord:
    kind = Kind.OWN
    if isinstance(error, StoppedError):
        kind = Kind.STOPPED
    elif isinstance(error, PeersLostError):
        kind = Kind.BROKEN
    return CauseRecord(kind=kind, exit_code=error.exit_code, message=error.message, advice=error.advice)


def _own(code: ExitCode, message: str, advice: str) -> CauseRecord:
    return CauseRecord(kind=Kind.OWN, exit_code=code, message=message, advice=advice)


def _accelerator_advice(job: FineTuneJob | None) -> str:
    """How to need less accelerator memory, with the job's own numbers."""
    return less_memory(job) if job is not None else "lower hyperparameters.perDeviceBatchSize"


def _disk_full(error: BaseException) -> CauseRecord:
    name = getattr(error, "filename", None)
    where = f" while writing {name}" if name else f"{_place(error.__traceback__)}"
    message = f"the disk is full{where}: {_first_line(error)}{_free_space(name)}"
    advice = (
        "raise resources.scratch above the size of model, dataset and two checkpoints, so that a node with room is used"
    )
    return _own(ExitCode.UNAVAILABLE, message, advice)


def _free_space(name: object) -> str:
    folder = Path(str(name)).parent if name else None
    if folder is None or not folder.exists():
        return ""
    usage = shutil.disk_usage(folder)
    return f" ({usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free there)"


def _is_torch(error: BaseException, name: str) -> bool:
    """By name, since the agent classifies its own errors before torch is imported."""
    cls = getattr(sys.modules.get("torch"), name, None)
    return cls is not None and isinstance(error, cls)


def _is_broken_collective(error: BaseException, text: str) -> bool:
    cls = getattr(sys.modules.get("torch.distributed"), "DistError", None)
    if cls is not None and isinstance(error, cls):
        return True
    return isinstance(error, RuntimeError) and any(sign in text for sign in BROKEN_COLLECTIVE_SIGNS)


def _named(error: BaseException) -> str:
    text = _first_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else ""


def _place(trace: TracebackType | None) -> str:
    """The last frame of our own code, where a reader should start to look; else the last frame.

    The frame that calls the entry point is in every traceback and says nothing.
    """
    frames = traceback.extract_tb(trace)
    if not frames:
        return ""
    ours, caller = f"{os.sep}finetune_trainer{os.sep}", f"{os.sep}worker.py"
    own = [frame for frame in frames if ours in frame.filename and not frame.filename.endswith(caller)]
    frame = (own or frames)[-1]
    return f" (in {frame.name}, {Path(frame.filename).name}:{frame.lineno})"
