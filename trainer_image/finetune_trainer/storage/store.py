"""One interface to stored data, whatever the scheme of its URI."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from finetune_api import contract
from finetune_trainer.errors import UsageError
from finetune_trainer.storage.batch import Batch, Progress
from finetune_trainer.storage.errors import MissingContainerError, MissingError
from finetune_trainer.storage.files import size_of
from finetune_trainer.storage.hub import Hub, HubSettings
from finetune_trainer.storage.local import LocalFiles
from finetune_trainer.storage.remote import Buckets
from finetune_trainer.storage.s3 import S3, ObjectInfo
from finetune_trainer.storage.settings import S3Settings, TransferSettings
from finetune_trainer.storage.upload import Uploaded
from finetune_trainer.storage.uris import Location, glob_regex, parse, relative_name

# Written out here, since inside the class `list` is its method.
Infos = list[ObjectInfo]
Paths = list[Path]
Uploads = list[Uploaded]


class Store:
    """Objects in buckets, on volumes and in folders, and to read those of a hub.

    URIs are s3://bucket/key, pvc://claim/path, file:///path and hf://org/name@revision/file. Where a call takes many
    objects, the URI is the name of one, a folder (with or without `/` at its end) or a glob (`*`, `?`, `[a-z]` within a
    folder, `**` across folders).

    Every call may raise, besides what it says:
        MissingError: the bucket or volume is not there.
        UnavailableError: no answer, tried again for as long as the settings say.
        PermissionRefusedError: the credentials were refused; bucket, key and needed permission are named.
        UsageError: the URI, or a setting of storage.s3, cannot be meant.
    """

    def __init__(self, s3: S3Settings, volumes: Path, transfer: TransferSettings, hub: HubSettings) -> None:
        self._s3_settings, self._transfer, self._hub_settings = s3, transfer, hub
        self._local = LocalFiles(volumes)
        self._pool = ThreadPoolExecutor(transfer.threads, thread_name_prefix="storage")

    @classmethod
    def connect(cls, environ: Mapping[str, str], transfer: TransferSettings | None = None) -> Store:
        """A store by the environment of the contract (endpoint, region, keys, volumes). Nothing is contacted yet."""
        volumes = Path(environ.get(contract.ENV_VOLUMES_DIR) or contract.VOLUMES_DIR)
        s3, hub = S3Settings.from_environ(environ), HubSettings.from_environ(environ)
        return cls(s3, volumes, transfer or TransferSettings(), hub)

    def close(self) -> None:
        """End the threads. Harmless when called twice."""
        self._pool.shutdown()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def list(self, uri: str) -> Infos:
        """The objects that a URI means, sorted by key; none where there are none."""
        return self._resolve(parse(uri))[1]

    def require(self, uri: str) -> Infos:
        """As `list`, where there must be something.

        Raises:
            MissingError: the URI means no object.
        """
        return self._required(parse(uri))[1]

    def stat(self, uri: str) -> ObjectInfo:
        """One object, with its checksum where the server keeps it.

        Raises:
            MissingError: there is none.
        """
        where = parse(uri)
        return self._side(where).stat(where)

    def exists(self, uri: str) -> bool:
        """Whether there is an object of exactly this name, in a bucket that is there."""
        return self._find(parse(uri)) is not None

    def open(self, uri: str, start: int = 0, scattered: bool = False, info: ObjectInfo | None = None) -> BinaryIO:
        """An object as a buffered file from byte `start` on; broken connections are healed while it is read.

        Args:
            scattered: whether it will be read here and there rather than on from `start`; both may seek.
            info: as it was listed, so that another version is refused; absent: as it is now.

        Raises:
            MissingError: there is none.
            ChangedError: while reading, when it was replaced meanwhile.
            CorruptError: at its end, when it was read whole and its checksum is wrong.
        """
        where = parse(uri)
        if where.scheme == "hf":
            return self._hub.open(where, start)
        side = self._writable(where)
        return side.open(info or side.stat(where), where, start, scattered)

    def read_bytes(self, uri: str) -> bytes:
        """A whole object, for small ones. Raises as `open`."""
        with self.open(uri) as file:
            return file.read()

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        """Bytes of an object from `start` on; fewer than `length` only at its end. Raises as `open`."""
        with self.open(uri, start) as file:
            return file.read(length)

    def write_bytes(self, uri: str, data: bytes) -> None:
        """Write a whole object at once: readers see the old one or the new one.

        Raises:
            DiskFullError: the volume has no room.
        """
        where = parse(uri)
        self._writable(where).write(where, data)

    def download(self, uri: str, directory: Path, progress: Progress | None = None) -> Paths:
        """Bring objects into a folder, under their names below the URI's folder; their paths in the order of `list`.

        Bytes are verified; a file has its name only when it is whole and right. What an earlier run finished stays
        as it is. Objects of volumes and folders are not copied: their own paths are given, to be read only.

        Raises:
            MissingError: the URI means no object.
            DiskFullError: the folder has no room, told before the first byte; nothing half-written stays.
            ChangedError: an object was replaced meanwhile.
            CorruptError: an object arrived wrong again and again.
        """
        where = parse(uri)
        base, infos = self._required(where)
        wheres = [parse(info.uri) for info in infos]
        if where.scheme in ("pvc", "file"):
            return self._local.download(infos, wheres, progress)
        names = [relative_name(found.key, base, uri) for found in wheres]
        side = self._hub if where.scheme == "hf" else self._buckets
        return side.download(infos, names, Path(directory), progress)

    def folder(self, uri: str, directory: Path) -> Path:
        """Where the names of a download of `uri` into `directory` are relative to: for models, which are folders."""
        where = parse(uri)
        return Path(directory) if where.scheme in ("s3", "hf") else self._local.path(where.at(self._resolve(where)[0]))

    def pin(self, uri: str) -> str:
        """An address of what is there now and for ever: a hub's branch becomes its commit, all else stays as it is."""
        where = parse(uri)
        return str(self._hub.pin(where)).rstrip("/") if where.scheme == "hf" else uri

    def upload(self, files: Mapping[str, Path], progress: Progress | None = None) -> Uploads:
        """Write files to the objects that are their keys; what was written, in the same order.

        Each object appears whole. When one fails the others may be there already: a manifest that is written last
        tells readers that all are.

        Raises:
            MissingError: a file is not there.
            DiskFullError: the volume has no room.
        """
        wheres = {parse(uri): Path(path) for uri, path in files.items()}
        for where in wheres:
            self._writable(where)
        total = sum(map(size_of, wheres.values()))
        batch = Batch(self._pool, progress, total, len(wheres))
        done: dict[str, Uploaded] = {}
        for is_s3, group in groupby(sorted(wheres, key=_is_s3), key=_is_s3):
            side = self._buckets if is_s3 else self._local
            done |= {item.uri: item for item in side.upload({where: wheres[where] for where in group}, batch)}
        batch.report()
        return [done[str(where)] for where in wheres]

    def upload_folder(self, directory: Path, uri: str, progress: Progress | None = None) -> Uploads:
        """Write all files below a folder to objects of the same names below `uri`, in the order of their names."""
        paths = sorted(path for path in Path(directory).rglob("*") if path.is_file())
        names = {f"{uri.rstrip('/')}/{path.relative_to(directory).as_posix()}": path for path in paths}
        return self.upload(names, progress)

    def delete(self, uris: Iterable[str]) -> None:
        """Delete objects by name; those that are not there count as deleted."""
        wheres = sorted(map(parse, uris), key=_is_s3)
        for where in wheres:
            self._writable(where)
        for is_s3, group in groupby(wheres, key=_is_s3):
            (self._buckets if is_s3 else self._local).delete(list(group))

    def probe_write(self, uri: str) -> None:
        """Prove that objects can be written and deleted below a URI, by doing it once."""
        probe = f"{uri.rstrip('/')}/.finetune-probe-{secrets.token_hex(8)}"
        self.write_bytes(probe, b"probe")
        self.delete([probe])

    @cached_property
    def _buckets(self) -> Buckets:
        """Made when first needed: a job on volumes alone does not wait for the SDK."""
        return Buckets(S3(self._s3_settings, self._transfer), self._transfer, self._pool)

    @cached_property
    def _hub(self) -> Hub:
        return Hub(self._hub_settings, self._transfer, self._pool)

    def _side(self, where: Location) -> Buckets | LocalFiles | Hub:
        return self._hub if where.scheme == "hf" else self._writable(where)

    def _writable(self, where: Location) -> Buckets | LocalFiles:
        if where.scheme == "hf":
            raise UsageError(f"nothing is written to a hub: {where}", "write to s3://, pvc:// or file://")
        return self._buckets if _is_s3(where) else self._local

    def _resolve(self, where: Location) -> tuple[str, Infos]:
        """The folder to which names are relative, and the objects in the order of their keys."""
        if where.is_folder:
            return where.key, self._below(where)
        if where.is_pattern and (matches := self._matching(where)):
            return where.base, matches
        # A key may hold glob characters, and a folder may be named without its slash.
        if info := self._find(where):
            return where.key[: where.key.rfind("/") + 1], [info]
        folder = where.at(where.key + "/")
        return folder.key, self._below(folder)

    def _required(self, where: Location) -> tuple[str, Infos]:
        base, infos = self._resolve(where)
        if not infos:
            raise MissingError(f"there is nothing at {where}", "correct the URI, or upload the data")
        return base, infos

    def _below(self, where: Location) -> Infos:
        infos = self._side(where).below(where)
        return sorted(infos, key=lambda info: parse(info.uri).key.encode())

    def _matching(self, where: Location) -> Infos:
        pattern = glob_regex(where.key)
        return [info for info in self._below(where.at(where.fixed_prefix)) if pattern.fullmatch(parse(info.uri).key)]

    def _find(self, where: Location) -> ObjectInfo | None:
        try:
            return self._side(where).stat(where)
        except MissingContainerError:
            raise
        except MissingError:
            return None


def _is_s3(where: Location) -> bool:
    return where.scheme == "s3"
