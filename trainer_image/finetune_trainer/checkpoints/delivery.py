"""How a staged step gets into the bucket: by a process of each rank that holds some of it, phase by phase."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from finetune_api.contract import CheckpointRef, ExitCode
from finetune_trainer.checkpoints.gang import Gang
from finetune_trainer.checkpoints.uploader import Answer, Phase, Request
from finetune_trainer.errors import error_of

BEAT_SECONDS = 1.0

Ask = Callable[[Request], Answer]
OnWait = Callable[[float, bool], None]
"""Told of waiting for an upload: the seconds so far, and whether this rank's has moved since it was told last."""


class Courier:
    """The uploader's process, started when there is something to upload for the first time.

    Attributes:
        moves: how often it has said anything, which a hung upload does not.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.moves = 0

    def start(self, files: list[int]) -> None:
        """Start the process unless it runs; call it from the thread that lives as long as the rank.

        The process dies with that thread: the kernel's signal goes by thread, not by process.

        Args:
            files: descriptors that it shall share.
        """
        if self._process is not None:
            return
        # A process, not a thread: hashing and TLS would take the interpreter lock from the training loop.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "finetune_trainer.checkpoints", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=files,
            text=True,
        )

    def ask(self, request: Request) -> Answer:
        """Wait for what becomes of a request."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request.model_dump_json(by_alias=True) + "\n")
            process.stdin.flush()
            while line := process.stdout.readline():
                self.moves += 1
                answer = Answer.model_validate_json(line)
                if not answer.moving:
                    return answer
        except OSError:
            return self._died(process)
        return self._died(process)

    def _died(self, process: subprocess.Popen[str]) -> Answer:
        self._process = None
        code = process.wait()
        return Answer(exit_code=ExitCode.SOFTWARE, message=f"the process that uploads checkpoints ended with {code}")

    def close(self) -> None:
        """End the process, when it has answered."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None


def deliver(gang: Gang, ask: Ask, request: Request, number: int) -> Answer:
    """Take a step through all phases; what became of it, the same on every rank.

    Args:
        ask: has this rank's process do something; called only where this rank holds a file, and by the main rank.
        number: of this step in the run, the same on all ranks.
    """
    begun = _by_main(gang, f"{number}/begun", lambda: ask(request))
    if begun.failed:
        return begun
    upload = request.model_copy(update={"phase": Phase.UPLOAD})
    mine = ask(upload) if request.held else Answer()
    if gang.rank != 0:
        gang.tell(f"{number}/{gang.rank}", mine.model_dump_json())
    return _by_main(gang, f"{number}/ended", lambda: _commit(gang, ask, request, number, mine))


def _by_main(gang: Gang, key: str, act: Callable[[], Answer]) -> Answer:
    """What the main rank's act came to, on all ranks."""
    if gang.rank != 0:
        return Answer.model_validate_json(gang.hear(key))
    answer = act()
    gang.tell(key, answer.model_dump_json())
    return answer


def _commit(gang: Gang, ask: Ask, request: Request, number: int, mine: Answer) -> Answer:
    """Wait until all is uploaded, and make the step exist."""
    keys = [f"{number}/{rank}" for rank in range(1, gang.size)]
    answers = [mine, *(Answer.model_validate_json(gang.hear(key)) for key in keys)]
    # All have heard of the step before, or they would not have come here.
    for key in [*keys, f"{number - 1}/begun", f"{number - 1}/ended"]:
        gang.forget(key)
    if failed := next((answer for answer in answers if answer.failed), None):
        return failed
    files = [file for answer in answers for file in answer.files]
    manifest = request.manifest.model_copy(update={"files": files})
    return ask(request.model_copy(update={"phase": Phase.COMMIT, "manifest": manifest, "held": []}))


class Delivery:
    """At most one step on its way, in a thread beside the training.

    Args:
        on_commit: called from that thread when the step is complete in the bucket.
    """

    def __init__(self, gang: Gang, on_commit: Callable[[CheckpointRef], None]) -> None:
        self.courier = Courier()
        self._gang, self._on_commit = gang, on_commit
        self._thread: Thread | None = None
        self._failure: Exception | None = None
        self._number = 0

    def send(self, request: Request, folder: Path) -> None:
        """Begin with a step, after the one before; the folder is removed when its files are no longer needed."""
        self._number += 1
        self._thread = Thread(target=self._run, args=(request, self._number, folder), daemon=True)
        self._thread.start()

    def _run(self, request: Request, number: int, folder: Path) -> None:
        try:
            answer = deliver(self._gang, self.courier.ask, request, number)
        except Exception as error:  # the border of the thread: a peer that is gone shows in the training thread
            self._failure = error
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if answer.ref is not None:
            self._on_commit(answer.ref)
        else:
            self._failure = error_of(answer.exit_code, answer.message, answer.advice)

    def settle(self, seconds: float) -> bool:
        """Wait at most so long until nothing is on its way; whether nothing is."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(None if math.isinf(seconds) else seconds)
        return thread is None or not thread.is_alive()

    def wait(self, on_wait: OnWait) -> float:
        """Wait until nothing is on its way; the seconds that it took.

        Args:
            on_wait: called about every second.

        Raises:
            TrainerError: what the upload failed with.
        """
        began, thread, moves = time.monotonic(), self._thread, self.courier.moves
        while thread is not None and thread.is_alive():
            thread.join(BEAT_SECONDS)
            if thread.is_alive():
                known, moves = moves, self.courier.moves
                on_wait(time.monotonic() - began, moves != known)
        self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return time.monotonic() - began
