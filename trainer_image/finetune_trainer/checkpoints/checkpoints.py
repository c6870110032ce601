"""Checkpoints as the training process sees them: the newest one to go on from, and a place to hand a step to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from finetune_api.contract import CheckpointRef, ExitCode
from finetune_trainer.checkpoints import catalog
from finetune_trainer.checkpoints.catalog import CorruptCheckpointError
from finetune_trainer.checkpoints.manifest import Manifest
from finetune_trainer.checkpoints.uploader import Answer, Submission
from finetune_trainer.errors import TrainerError, UsageError, error_of
from finetune_trainer.storage import Store


class Checkpoints:
    """All checkpoints of one job.

    Args:
        root: `<output.uri>/checkpoints`.
        identity: job, uid, attempt, world size, base digest and versions, as every manifest of this run states them.
        keep: how many of the newest stay; asked at every commit, since it may change while the job runs.
        on_commit: called from a background thread when a step is complete in the bucket.
    """

    def __init__(
        self,
        store: Store,
        root: str,
        identity: Manifest,
        keep: Callable[[], int],
        on_commit: Callable[[CheckpointRef], None],
    ) -> None:
        self._store = store
        self._root = root
        self._identity = identity
        self._keep = keep
        self._on_commit = on_commit
        self._process: subprocess.Popen[str] | None = None
        self._in_flight: Thread | None = None
        self._failure: TrainerError | None = None

    def restore(self, directory: Path, warn: Callable[[str], None]) -> tuple[CheckpointRef, Path] | None:
        """Fetch the newest complete checkpoint into directory; None when there is none.

        A corrupt one is named and the one before it is taken.

        Raises:
            UsageError: the output holds another job's checkpoints, or the base model is no longer the same.
        """
        for manifest in catalog.complete(self._store, self._root):
            self._refuse_foreign(manifest)
            try:
                folder = catalog.fetch(self._store, self._root, manifest, directory)
            except CorruptCheckpointError as error:
                warn(f"checkpoint of step {manifest.step} is corrupt and passed over: {error.message}")
                continue
            return manifest.ref(self._root), folder
        return None

    def fetch_step(self, step: int, directory: Path) -> Path:
        """Fetch the whole of one complete step into directory; the folder with its files.

        Raises:
            CorruptCheckpointError: it is not there, or not what its manifest says.
        """
        return catalog.fetch(self._store, self._root, self._manifest(step), directory)

    def fetch(self, step: int, name: str, directory: Path) -> Path:
        """Fetch one file of one complete step into directory.

        Raises:
            CorruptCheckpointError: it is not there, or not what its manifest says.
        """
        return catalog.fetch_one(self._store, self._root, self._manifest(step), name, directory)

    def _manifest(self, step: int) -> Manifest:
        manifest = catalog.find(self._store, self._root, step)
        if manifest is None:
            raise CorruptCheckpointError(f"there is no complete checkpoint of step {step} in {self._root}")
        return manifest

    def refuse_foreign_output(self) -> None:
        """Raise UsageError when the output holds another job's checkpoints; cheap, to be asked before training."""
        newest = next(catalog.complete(self._store, self._root), None)
        if newest is not None:
            self._refuse_foreign(newest)

    def _refuse_foreign(self, manifest: Manifest) -> None:
        ours = self._identity
        if manifest.uid != ours.uid:
            raise UsageError(
                f"spec.output.uri: {self._root} holds checkpoints of another job ({manifest.job}, uid {manifest.uid})",
                "name another output.uri, or delete that folder if its content is no longer needed",
            )
        if manifest.base_digest != ours.base_digest:
            raise UsageError(
                f"spec.model.uri: the model is not the one that step {manifest.step} in {self._root} was trained from",
                "put the original model back, or start a new job with another output.uri",
            )

    def submit(self, step: int, folder: Path, best: int | None = None) -> None:
        """Hand a finished local folder over; it belongs to the uploader from now on.

        Returns at once unless the step before is still on its way: one is in flight at most, so that scratch space
        stays bounded.

        Args:
            best: the step that is kept however old it is.

        Raises:
            TrainerError: the upload of an earlier step failed.
        """
        self.wait()
        submission = Submission(
            folder=str(folder),
            root=self._root,
            keep=self._keep(),
            manifest=self._identity.model_copy(update={"step": step, "best": best}),
        )
        # Started by this thread, with which it shall die: the kernel's signal goes by thread, not by process.
        process = self._process or self._start()
        self._in_flight = Thread(target=self._exchange, args=(process, submission), daemon=True)
        self._in_flight.start()

    def wait(self) -> None:
        """Wait until nothing is in flight; raises what the upload failed with."""
        if self._in_flight is not None:
            self._in_flight.join()
            self._in_flight = None
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what an upload failed with, if one did; asked at every step, so that no GPU works for nothing."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Wait for the last upload and end the uploader."""
        try:
            self.wait()
        finally:
            if self._process is not None:
                assert self._process.stdin is not None
                self._process.stdin.close()
                self._process.wait()
                self._process = None

    def _exchange(self, process: subprocess.Popen[str], submission: Submission) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(submission.model_dump_json(by_alias=True) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        self._heard(Answer.model_validate_json(line) if line else self._died(process))

    def _start(self) -> subprocess.Popen[str]:
        # A process, not a thread: hashing and TLS would take the interpreter lock from the training loop.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "finetune_trainer.checkpoints", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self._process

    def _died(self, process: subprocess.Popen[str]) -> Answer:
        self._process = None
        code = process.wait()
        return Answer(exit_code=ExitCode.SOFTWARE, message=f"the process that uploads checkpoints ended with {code}")

    def _heard(self, answer: Answer) -> None:
        if answer.ref is not None:
            self._on_commit(answer.ref)
        else:
            self._failure = error_of(answer.exit_code, answer.message, answer.advice)
