"""What lies in the bucket: finding complete checkpoints, fetching one with its checksums, and retention."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from finetune_trainer.checkpoints.manifest import MANIFEST_FILE, FileEntry, Manifest, step_of, step_uri
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage import MissingError, Store


class CorruptCheckpointError(TrainerError):
    """A complete checkpoint whose content is not what its manifest says."""


def complete(store: Store, root: str) -> Iterator[Manifest]:
    """Manifests under root, newest step first; folders without a readable one are passed over."""
    found = [uri for uri in _objects(store, root) if uri.endswith("/" + MANIFEST_FILE)]
    for uri in sorted(found, key=lambda uri: step_of(uri) or 0, reverse=True):
        manifest = Manifest.parse(store.read_bytes(uri))
        if manifest is not None and manifest.step == step_of(uri):
            yield manifest


def find(store: Store, root: str, step: int) -> Manifest | None:
    """The manifest of a complete step; None where there is none."""
    return next((manifest for manifest in complete(store, root) if manifest.step == step), None)


def fetch(store: Store, root: str, step: int, files: Sequence[FileEntry], directory: Path) -> Path:
    """Download files of a checkpoint into directory and verify them; their folder, which on a volume is its own.

    Raises:
        CorruptCheckpointError: a file is missing, shorter, or its checksum differs; nothing is left behind.
    """
    folder = step_uri(root, step)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        paths = [_fetch_file(store, f"{folder}/{file.name}", directory, file.sha256) for file in files]
    except CorruptCheckpointError:
        shutil.rmtree(directory)
        raise
    return paths[0].parent


def _fetch_file(store: Store, uri: str, directory: Path, sha256: str) -> Path:
    try:
        (path,) = store.download(uri, directory)
    except MissingError as error:
        raise CorruptCheckpointError(f"{uri} is named by its manifest but is not there") from error
    found = file_sha256(path)
    if found != sha256:
        raise CorruptCheckpointError(f"{uri} has checksum {found}, its manifest says {sha256}")
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expired(steps: Iterable[int], keep: int, best: int | None = None) -> list[int]:
    """Which of the complete steps go when the newest `keep` and the best one stay; oldest first."""
    return [step for step in sorted(steps)[:-keep] if step != best]


def remove_step(store: Store, root: str, step: int) -> None:
    """Remove a step, its manifest first: what is half removed must not look complete."""
    folder = step_uri(root, step)
    objects = _objects(store, folder)
    manifests = [uri for uri in objects if uri.endswith("/" + MANIFEST_FILE)]
    store.delete(manifests)
    store.delete([uri for uri in objects if uri not in manifests])


def retain(store: Store, root: str, keep: int, best: int | None = None) -> None:
    """Keep the newest complete steps and the best one.

    The others are removed, and what older attempts left incomplete before the newest.
    """
    objects = _objects(store, root)
    steps = {step for uri in objects if (step := step_of(uri)) is not None}
    whole = {step_of(uri) for uri in objects if uri.endswith("/" + MANIFEST_FILE)}
    newest = max((step for step in whole if step is not None), default=0)
    leftovers = [step for step in steps - whole if step < newest]
    for step in [*leftovers, *expired((step for step in whole if step is not None), keep, best)]:
        remove_step(store, root, step)


def _objects(store: Store, prefix: str) -> list[str]:
    return [info.uri for info in store.list(prefix.rstrip("/") + "/")]
