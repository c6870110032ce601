"""The background process that takes what a rank holds of a step from its memory to the bucket.

It reads one request a line on its standard input and answers each with one line, so that it shares nothing with the
training process but files: no interpreter lock, and a lower priority for the processor. What is staged it reads where
it lies, in files of memory that it was given; its own memory is bounded by that of transfers.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from finetune_api.common import Message
from finetune_api.contract import CheckpointRef, ExitCode
from finetune_trainer.checkpoints import catalog
from finetune_trainer.checkpoints.manifest import MANIFEST_FILE, FileEntry, Manifest, step_uri
from finetune_trainer.errors import TrainerError
from finetune_trainer.preemption import die_with_parent, shield_from_sigterm
from finetune_trainer.storage import DiskFullError, Store

NICENESS = 10
"""The optimizer step needs every core more than the upload does."""
MOVE_SECONDS = 1.0
"""How often it is told that bytes move, if they do."""


class Phase(StrEnum):
    """What is to be done with a step, in this order; all ranks do one before any does the next."""

    BEGIN = "begin"
    """By the main rank: make sure that the step is ours to write, and remove what lies there."""
    UPLOAD = "upload"
    """By every rank that holds something."""
    COMMIT = "commit"
    """By the main rank: write the manifest, and remove the steps that are no longer kept."""


class Held(Message):
    """A file to upload: its name in the checkpoint, where it lies, and whose part it is."""

    name: str
    path: str
    rank: int | None = None


class Request(Message):
    """What to do; the manifest is complete but for its time, and before the commit for its files."""

    phase: Phase
    root: str
    manifest: Manifest
    keep: int = 1
    held: list[Held] = []


class Answer(Message):
    """What became of a request.

    Attributes:
        moving: it goes on, with some success, and this is not yet the answer.
    """

    moving: bool = False
    files: list[FileEntry] = []
    ref: CheckpointRef | None = None
    exit_code: int = ExitCode.OK
    message: str = ""
    advice: str = ""

    @property
    def failed(self) -> bool:
        return self.exit_code != ExitCode.OK


def begin(store: Store, request: Request) -> Answer:
    """Make room for a step.

    Raises:
        TrainerError: a newer attempt has already written to this job's checkpoints, or storage refused.
    """
    _refuse_when_fenced(store, request)
    # A manifest of an earlier attempt at this step would vouch for files that are being replaced.
    catalog.remove_step(store, request.root, request.manifest.step)
    return Answer()


def upload(store: Store, request: Request, moved: Callable[[], None]) -> Answer:
    """Upload what this rank holds; what was uploaded.

    Args:
        moved: called about every second, as long as bytes move.

    Raises:
        DiskFullError: the volume is full; of this step nothing of this rank is left on it.
        TrainerError: storage refused.
    """
    folder = step_uri(request.root, request.manifest.step)
    moves = Moves(moved)
    entries = [_entry(held) for held in request.held]
    files = {f"{folder}/{held.name}": Path(held.path) for held in request.held}
    try:
        store.upload(files, moves.report)
    except DiskFullError as error:
        store.delete(files)
        raise DiskFullError(
            f"checkpoint of step {request.manifest.step}: {error.message}",
            "give the volume of spec.output.uri more room, or keep fewer checkpoints by checkpoint.keep",
        ) from error
    return Answer(files=entries)


class Moves:
    """Tells standstill from progress in what a transfer reports, which it does at a standstill too."""

    def __init__(self, moved: Callable[[], None]) -> None:
        self._moved = moved
        self._known, self._told = 0, time.monotonic()

    def report(self, done: int, *_: int) -> None:
        """A `Progress` of storage."""
        now = time.monotonic()
        if done != self._known and now - self._told >= MOVE_SECONDS:
            self._known, self._told = done, now
            self._moved()


def _entry(held: Held) -> FileEntry:
    path = Path(held.path)
    size, sha256 = path.stat().st_size, catalog.file_sha256(path)
    return FileEntry(name=held.name, size=size, sha256=sha256, rank=held.rank)


def commit(store: Store, request: Request) -> Answer:
    """Make a step exist.

    Raises:
        TrainerError: a newer attempt has begun to write meanwhile, or storage refused.
    """
    _refuse_when_fenced(store, request)
    root = request.root
    manifest = request.manifest.model_copy(update={"created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")})
    data = manifest.model_dump_json(by_alias=True, exclude_none=True, indent=1).encode()
    store.write_bytes(f"{step_uri(root, manifest.step)}/{MANIFEST_FILE}", data)
    # Not before now: until this step was complete, another one may have been the best.
    catalog.retain(store, root, request.keep, manifest.best)
    return Answer(ref=manifest.ref(root))


def _refuse_when_fenced(store: Store, request: Request) -> None:
    newest, ours = next(catalog.complete(store, request.root), None), request.manifest
    if newest is not None and newest.uid == ours.uid and newest.attempt > ours.attempt:
        raise TrainerError(
            f"attempt {newest.attempt} of this job already writes to {request.root}; attempt {ours.attempt} must end",
            "this pod was taken for lost and replaced; nothing needs to be done",
        )


def answer(store: Store, line: str) -> Answer:
    """Handle one request; a failure is an answer, not an end: all that failed is told to the training process."""
    try:
        request = Request.model_validate_json(line)
        match request.phase:
            case Phase.BEGIN:
                return begin(store, request)
            case Phase.UPLOAD:
                return upload(store, request, lambda: _tell(Answer(moving=True)))
            case Phase.COMMIT:
                return commit(store, request)
    except TrainerError as error:
        return Answer(exit_code=error.exit_code, message=error.message, advice=error.advice)
    except Exception as error:  # the border of the process: whatever it is, the trainer must hear of it
        return Answer(exit_code=ExitCode.SOFTWARE, message=f"checkpoint upload: {type(error).__name__}: {error}")


def main() -> None:
    """Serve requests until the training process, whose id is the argument, closes the pipe or dies."""
    shield_from_sigterm()
    # Without its rank it would go on with a step that the next attempt is already replacing.
    die_with_parent(int(sys.argv[1]))
    os.nice(NICENESS)
    store = Store.connect(os.environ)
    for line in sys.stdin:
        _tell(answer(store, line))


def _tell(answer: Answer) -> None:
    print(answer.model_dump_json(by_alias=True), flush=True)
