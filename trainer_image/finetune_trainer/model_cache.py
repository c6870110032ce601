"""Models that jobs keep for each other, on a volume or on the node: fetched once, whole or not there, verified at use.

An entry is a folder named by the model's content: `<digest>/` with the files and `.finetune-cache.json`, which states
their sizes and checksums. It is filled beside its place and then renamed, by one process at a time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from isal.isal_zlib import crc32
from pydantic import ValidationError

from finetune_api.common import Message
from finetune_api.contract import ENV_MODEL_CACHE, Stage
from finetune_trainer.errors import PermissionRefusedError
from finetune_trainer.runtime import Context
from finetune_trainer.storage.errors import DiskFullError

MANIFEST = ".finetune-cache.json"
BLOCK_BYTES = 4 * 1024 * 1024
WAIT_SECONDS = 0.5
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR),
    *(errno.ENOLCK, errno.EOPNOTSUPP, errno.ESTALE, errno.EIO),
)
"""What a volume may answer that cannot serve; a cache is no reason for a job to fail."""


class CachedFile(Message):
    """A file of an entry: its size in bytes and its CRC32."""

    size: int
    crc32: int


class Entry(Message):
    """What an entry holds, by name; written last, so that an entry without is none."""

    uri: str
    files: dict[str, CachedFile]


class ModelCache:
    """The cache that the pod's environment names."""

    def __init__(self, root: Path, context: Context) -> None:
        self._root, self._context = root, context

    @classmethod
    def of(cls, context: Context) -> ModelCache | None:
        """The job's cache, or None where it has none."""
        root = os.environ.get(ENV_MODEL_CACHE)
        return cls(Path(root), context) if root else None

    def folder(self, name: str, uri: str, fetch: Callable[[Path], None]) -> Path | None:
        """The model's folder in the cache, to be read only; None, with a warning, where it cannot be kept there.

        Args:
            name: the model's content.
            uri: where it comes from, for people who look into the cache.
            fetch: brings all files into a folder.
        """
        entry = self._root / name
        try:
            if not self._is_whole(entry):
                with self._alone(name):
                    if not self._is_whole(entry):
                        self._fill(entry, uri, fetch)
            return entry
        except (DiskFullError, PermissionRefusedError) as error:
            return self._without(error.message)
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            return self._without(f"{error.filename or self._root}: {error.strerror}")

    def _without(self, why: str) -> None:
        self._context.reporter.warn(
            f"model.cache cannot be used ({why}), the model is fetched into the pod; the cache must be writable for "
            "user 65532, have room, and lock files"
        )

    def _is_whole(self, entry: Path) -> bool:
        """Whether all files are there and are what was written; one that is not is named, and the entry filled anew."""
        try:
            files = Entry.model_validate_json((entry / MANIFEST).read_text()).files
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            return False
        for name, wanted in files.items():
            path = entry / name
            if not path.is_file() or path.stat().st_size != wanted.size or not self._is_right(path, wanted):
                self._context.reporter.warn(f"{path} in the model cache is not what was written; it is fetched again")
                return False
        return True

    def _is_right(self, path: Path, wanted: CachedFile) -> bool:
        # The node's first rank has just read it all, and the pages are still in memory for loading.
        return self._context.local_rank > 0 or self._crc32(path) == wanted.crc32

    def _crc32(self, path: Path) -> int:
        self._context.reporter.stage(Stage.DOWNLOADING, f"verifying {path.name} in the model cache")
        crc = 0
        with path.open("rb", buffering=0) as file:
            while data := file.read(BLOCK_BYTES):
                crc = crc32(data, crc)
                self._context.alive()
        return crc

    def _fill(self, entry: Path, uri: str, fetch: Callable[[Path], None]) -> None:
        # Named by the node, so that where locks do not reach over nodes two of them do not write into each other's.
        part = entry.with_name(f".{entry.name}.{BOOT_ID.read_text().strip()}.part")
        part.mkdir(exist_ok=True)
        fetch(part)
        names = [path.name for path in sorted(part.iterdir()) if not path.name.startswith(".")]
        files = {name: CachedFile(size=(part / name).stat().st_size, crc32=self._crc32(part / name)) for name in names}
        manifest = part / MANIFEST
        with manifest.open("w") as file:
            file.write(json.dumps(Entry(uri=uri, files=files).to_wire(), indent=1))
            file.flush()
            os.fsync(file.fileno())
        # Out of the way before it goes: what others have open stays in a folder of NFS until they let go of it.
        with suppress(FileNotFoundError):
            entry.rename(entry.with_name(f".{entry.name}.{secrets.token_hex(4)}.old"))
        part.rename(entry)
        for old in entry.parent.glob(f".{entry.name}.*.old"):
            shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Wait until no other process fills this entry; the lock goes with its owner, however that ends."""
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / f".{name}.lock").open("w") as lock:
            while not _try_lock(lock.fileno()):
                self._context.reporter.stage(Stage.DOWNLOADING, "waiting for another job, which fills the model cache")
                self._context.stop.check()
                time.sleep(WAIT_SECONDS)
            yield


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
