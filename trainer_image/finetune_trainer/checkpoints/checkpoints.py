"""Checkpoints as the training process sees them: the newest one to go on from, and a place to hand a step to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.contract import CheckpointRef
from finetune_trainer.checkpoints import catalog
from finetune_trainer.checkpoints.catalog import CorruptCheckpointError
from finetune_trainer.checkpoints.delivery import Delivery, OnWait
from finetune_trainer.checkpoints.gang import Alone, Gang
from finetune_trainer.checkpoints.manifest import TENSORS_SUFFIX, FileEntry, Manifest
from finetune_trainer.checkpoints.uploader import Held, Phase, Request
from finetune_trainer.errors import UsageError
from finetune_trainer.storage import Store

if TYPE_CHECKING:
    import torch

PEER_SECONDS = 10.0
"""How long a rank that has failed waits for the others to finish the checkpoint that is on its way."""


class Checkpoints:
    """All checkpoints of one job.

    Args:
        root: `<output.uri>/checkpoints`.
        identity: job, uid, attempt, world size, base digest and versions, as every manifest of this run states them.
        keep: how many of the newest stay; asked by the main rank at every commit, since it may change meanwhile.
        on_commit: called from a background thread when a step is complete in the bucket.
        on_wait: called about every second while the training waits for an upload.
        gang: the ranks that save and restore together.
    """

    def __init__(
        self,
        store: Store,
        root: str,
        identity: Manifest,
        *,
        keep: Callable[[], int],
        on_commit: Callable[[CheckpointRef], None],
        on_wait: OnWait = lambda seconds, moved: None,
        gang: Gang | None = None,
    ) -> None:
        # The uploader's process imports this package too, and has no use for torch.
        from finetune_trainer.checkpoints.staging import Staging

        self.gang = gang or Alone()
        self._store = store
        self._root = root
        self._identity = identity
        self._keep = keep
        self._on_wait = on_wait
        self._staging = Staging(self.gang.rank, self.gang.size, len(self.gang.neighbours))
        self._delivery = Delivery(self.gang, on_commit)
        self.waited_seconds = 0.0
        """How long training has waited for uploads."""

    def restore(self, directory: Path, warn: Callable[[str], None]) -> tuple[CheckpointRef, Path] | None:
        """Fetch the newest complete checkpoint into directory; None when there is none.

        A corrupt one is named and the one before it is taken, by all ranks.

        Raises:
            UsageError: the output holds another job's checkpoints, or the base model is no longer the same.
        """
        found = list(catalog.complete(self._store, self._root)) if self.gang.rank == 0 else []
        for manifest in self.gang.gather(found)[0]:
            self._refuse_other(manifest)
            try:
                folder = self._bring(manifest, manifest.files, directory)
            except CorruptCheckpointError as error:
                warn(f"checkpoint of step {manifest.step} is corrupt and passed over: {error.message}")
                continue
            return manifest.ref(self._root), folder
        return None

    def fetch(self, step: int, name: str, directory: Path) -> list[Path]:
        """Fetch one part of the state of one complete step, in as many files as it has, into directory.

        Args:
            name: of the files, without what follows it.

        Raises:
            CorruptCheckpointError: it is not there, or not what its manifest says; on all ranks.
        """
        manifest = self.gang.gather(catalog.find(self._store, self._root, step) if self.gang.rank == 0 else None)[0]
        if manifest is None:
            raise CorruptCheckpointError(f"there is no complete checkpoint of step {step} in {self._root}")
        files = [file for file in manifest.files if file.name.startswith(name) and file.name.endswith(TENSORS_SUFFIX)]
        if not files:
            raise CorruptCheckpointError(f"the checkpoint of step {step} has no {name}")
        folder = self._bring(manifest, files, directory)
        return sorted(path for file in files if (path := folder / file.name).is_file())

    def _bring(self, manifest: Manifest, files: Sequence[FileEntry], directory: Path) -> Path:
        """Those of the files that each machine needs; its first rank fetches them for its neighbours.

        Raises:
            CorruptCheckpointError: a machine has found a flaw; on all ranks.
        """
        tried = self.gang.gather(self._try_to_bring(manifest, files, directory))
        if flaw := next((flaw for _, flaw in tried if flaw), None):
            raise CorruptCheckpointError(flaw)
        folder: Path = tried[self.gang.neighbours[0]][0]
        return folder

    def _try_to_bring(self, manifest: Manifest, files: Sequence[FileEntry], directory: Path) -> tuple[Path, str]:
        """The folder, which on a volume is its own, and what is wrong with it."""
        if self.gang.rank != self.gang.neighbours[0]:
            return directory, ""
        needed = manifest.needed(files, self.gang.neighbours, self.gang.size)
        try:
            return catalog.fetch(self._store, self._root, manifest.step, needed, directory), ""
        except CorruptCheckpointError as error:
            return directory, error.message

    def refuse_other_base(self) -> None:
        """Raise UsageError when the checkpoints are not of this job and base; cheap, to be asked before training."""
        newest = next(catalog.complete(self._store, self._root), None)
        if newest is not None:
            self._refuse_other(newest)

    def _refuse_other(self, manifest: Manifest) -> None:
        manifest.refuse_foreign(self._identity.uid, self._root)
        if manifest.base_digest != self._identity.base_digest:
            raise UsageError(
                f"spec.model.uri: the model is not the one that step {manifest.step} in {self._root} was trained from",
                "put the original model back, or start a new job with another output.uri",
            )

    def submit(
        self, step: int, folder: Path, state: Mapping[str, Mapping[str, torch.Tensor]], best: int | None = None
    ) -> None:
        """Stage a step in memory and let it be uploaded; all ranks must call it for the same step.

        Returns when the tensors are copied, unless the step before is still on its way: one is in flight at most, so
        that memory stays bounded, and the training waits for it.

        Args:
            folder: small files, of the main rank; it belongs to the upload from now on.
            state: tensors by their names, by the name of their file without its ending.
            best: the step that is kept however old it is.

        Raises:
            TrainerError: the upload of an earlier step failed, or there is no memory to stage this one in.
        """
        self.wait()
        files = self._staging.stage(state)
        if self.gang.rank == 0:
            files += [Held(name=path.name, path=str(path)) for path in sorted(folder.iterdir())]
        if files:
            self._delivery.courier.start(self._staging.descriptors)
        request = Request(
            phase=Phase.BEGIN,
            root=self._root,
            # The main rank's word: it alone removes what is no longer kept.
            keep=self._keep() if self.gang.rank == 0 else 1,
            manifest=self._identity.model_copy(update={"step": step, "best": best}),
            held=files,
        )
        self._delivery.send(request, folder)

    def wait(self) -> None:
        """Wait until nothing is in flight; raises what the upload failed with."""
        self.waited_seconds += self._delivery.wait(self._on_wait)

    def close(self) -> None:
        """Wait for the last upload, end the uploader and give its memory back."""
        try:
            self.wait()
        finally:
            self._delivery.courier.close()
            self._staging.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        # What has ended the run is told, not what becomes of its last checkpoint; a peer that is gone never answers.
        if self._delivery.settle(math.inf if self.gang.size == 1 else PEER_SECONDS):
            self._delivery.courier.close()
            self._staging.close()
