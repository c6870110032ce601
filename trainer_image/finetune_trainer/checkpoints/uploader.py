"""The background process that takes a step from the scratch folder to the bucket.

It reads one submission a line on its standard input and answers each with one line, so that it shares nothing with the
training process but files: no interpreter lock, no memory, and a lower priority for the processor.
"""

from __future__ import annotations

import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from finetune_api.common import Message
from finetune_api.contract import CheckpointRef, ExitCode
from finetune_trainer.checkpoints import catalog
from finetune_trainer.checkpoints.manifest import MANIFEST_FILE, FileEntry, Manifest, step_uri
from finetune_trainer.errors import TrainerError
from finetune_trainer.preemption import die_with_parent, shield_from_sigterm
from finetune_trainer.storage import Store

NICENESS = 10
"""The optimizer step needs every core more than the upload does."""


class Submission(Message):
    """A step that lies ready in a local folder."""

    folder: str
    root: str
    keep: int
    manifest: Manifest = Field(description="Complete but for its files and time.")


class Answer(Message):
    """What became of a submission."""

    ref: CheckpointRef | None = None
    exit_code: int = ExitCode.OK
    message: str = ""
    advice: str = ""


def commit(store: Store, submission: Submission) -> CheckpointRef:
    """Upload the files, then the manifest; remove what is no longer kept and the local folder.

    Raises:
        TrainerError: a newer attempt has already written to this job's checkpoints, or storage refused.
    """
    root, manifest, folder = submission.root, submission.manifest, Path(submission.folder)
    _refuse_when_fenced(store, root, manifest)
    # A manifest of an earlier attempt at this step would vouch for files that are being replaced.
    catalog.remove_step(store, root, manifest.step)
    target = step_uri(root, manifest.step)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    entries = [FileEntry(name=path.name, size=path.stat().st_size, sha256=catalog.file_sha256(path)) for path in files]
    store.upload({f"{target}/{path.name}": path for path in files})
    manifest = manifest.model_copy(
        update={"files": entries, "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    )
    store.write_bytes(f"{target}/{MANIFEST_FILE}", manifest.model_dump_json(by_alias=True, indent=1).encode())
    # Not before now: until this step was complete, another one may have been the best.
    catalog.retain(store, root, submission.keep, manifest.best)
    shutil.rmtree(folder)
    return manifest.ref(root)


def _refuse_when_fenced(store: Store, root: str, manifest: Manifest) -> None:
    newest = next(catalog.complete(store, root), None)
    if newest is not None and newest.uid == manifest.uid and newest.attempt > manifest.attempt:
        raise TrainerError(
            f"attempt {newest.attempt} of this job already writes to {root}; attempt {manifest.attempt} must end",
            "this pod was taken for lost and replaced; nothing needs to be done",
        )


def answer(store: Store, line: str) -> Answer:
    """Handle one submission; a failure is an answer, not an end, since the next step may get through."""
    try:
        return Answer(ref=commit(store, Submission.model_validate_json(line)))
    except TrainerError as error:
        return Answer(exit_code=error.exit_code, message=error.message, advice=error.advice)
    except Exception as error:  # the border of the process: whatever it is, the trainer must hear of it
        return Answer(exit_code=ExitCode.SOFTWARE, message=f"checkpoint upload: {type(error).__name__}: {error}")


def main() -> None:
    """Serve submissions until the training process, whose id is the argument, closes the pipe or dies."""
    shield_from_sigterm()
    # Without its rank it would go on with a step that the next attempt is already replacing.
    die_with_parent(int(sys.argv[1]))
    os.nice(NICENESS)
    store = Store.connect(os.environ)
    for line in sys.stdin:
        print(answer(store, line).model_dump_json(by_alias=True), flush=True)
