"""Repositories of a Hugging Face hub, read only: hf://org/name@revision/file.

By the hub's two calls, `GET /api/models/<repo>/revision/<rev>?blobs=true` and `GET /<repo>/resolve/<commit>/<file>`,
and not by the hub's own client: that one tells its progress to a terminal, cannot be stopped between blocks, and does
not compare what arrived with its checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote, urlsplit

from finetune_api import contract
from finetune_trainer.errors import PermissionRefusedError, UsageError
from finetune_trainer.storage.batch import Batch, Progress
from finetune_trainer.storage.errors import CorruptError, MissingContainerError, MissingError, TransientError
from finetune_trainer.storage.files import alone_in, file_errors, require_room
from finetune_trainer.storage.retry import CancelledError, Patience, patiently
from finetune_trainer.storage.s3 import ObjectInfo
from finetune_trainer.storage.settings import TransferSettings
from finetune_trainer.storage.uris import Location, parse

ENDPOINT = "https://huggingface.co"
BLOCK_BYTES = 1024 * 1024
ATTEMPTS = 3
REFUSED = (401, 403)
BUSY = (408, 425, 429)
TOKEN_ADVICE = (
    "accept the model's terms on the hub, and put a token that may read it under HF_TOKEN into the Secret that "
    "model.hub.secretName names"
)

NO_USER_ADVICE = (
    "take it out of model.hub.endpoint, and put a token under HF_TOKEN into the Secret that model.hub.secretName names"
)


@dataclass(frozen=True, kw_only=True)
class HubSettings:
    """Which hub, and who we are there."""

    endpoint: str = ENDPOINT
    token: str | None = field(default=None, repr=False)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> HubSettings:
        """Read the variables of the contract; raises UsageError for an endpoint that cannot be meant."""
        endpoint = (environ.get(contract.ENV_HUB_ENDPOINT) or ENDPOINT).rstrip("/")
        if not endpoint.startswith(("http://", "https://")):
            raise UsageError(f"{contract.ENV_HUB_ENDPOINT} is no URL", "set model.hub.endpoint to https://host")
        if "@" in urlsplit(endpoint).netloc:
            # Not shown: messages go into the status and into logs.
            raise UsageError(f"{contract.ENV_HUB_ENDPOINT} has a user or a password in it", NO_USER_ADVICE)
        return cls(endpoint=endpoint, token=environ.get(contract.ENV_HUB_TOKEN) or None)


@dataclass(frozen=True)
class Repository:
    """What a revision holds: one commit, and the files in it by name."""

    commit: str
    files: dict[str, ObjectInfo]


class Hub:
    """All repositories of one hub. What a revision means is asked once, so that all files are of one commit."""

    def __init__(self, hub: HubSettings, settings: TransferSettings, pool: Executor) -> None:
        self._hub, self._settings, self._pool = hub, settings, pool
        self._known: dict[str, Repository] = {}
        self._never = threading.Event()
        self._opener = urllib.request.build_opener(CarefulRedirects)

    def pin(self, where: Location) -> Location:
        """The same with the commit in place of a branch or tag."""
        return Location(where.scheme, f"{where.bucket.partition('@')[0]}@{self._repository(where).commit}", where.key)

    def below(self, where: Location) -> list[ObjectInfo]:
        """All files whose name starts with `where.key`."""
        return [info for name, info in self._repository(where).files.items() if name.startswith(where.key)]

    def stat(self, where: Location) -> ObjectInfo:
        found = self._repository(where).files.get(where.key)
        if found is None:
            raise MissingError(f"there is no {where}", "correct the URI, or the revision after @")
        return found

    def open(self, where: Location, start: int) -> BinaryIO:
        """A file from byte `start` on; not healed when the connection breaks: for small files."""
        return cast(BinaryIO, patiently(partial(self._get, where, start), self._settings, self._never))

    def download(
        self, infos: Sequence[ObjectInfo], names: Sequence[str], directory: Path, progress: Progress | None
    ) -> list[Path]:
        """The files under names in a folder; each has its name only when it is whole and its checksum right."""
        total = sum(info.size for info in infos)
        with file_errors(directory, total):
            directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / name for name in names]
        with alone_in(directory):
            pairs = list(zip(infos, paths, strict=True))
            missing = [it for it in pairs if not (it[1].is_file() and it[1].stat().st_size == it[0].size)]
            missing_bytes = sum(info.size for info, _ in missing)
            require_room(directory, missing_bytes)
            batch = Batch(self._pool, progress, total, len(infos))
            batch.count(total - missing_bytes, len(infos) - len(missing))
            batch.run(partial(self._bring, batch, info, path) for info, path in missing)
        batch.report()
        return paths

    def _repository(self, where: Location) -> Repository:
        if where.bucket not in self._known:
            self._known[where.bucket] = patiently(partial(self._ask, where), self._settings, self._never)
        return self._known[where.bucket]

    def _ask(self, where: Location) -> Repository:
        repo, revision = _split(where)
        url = f"{self._hub.endpoint}/api/models/{quote(repo)}/revision/{quote(revision, safe='')}?blobs=true"
        with closing(self._request(url, {}, where)) as answer:
            try:
                raw = json.load(answer)
                return _repository(raw, where)
            except (ValueError, KeyError, TypeError) as error:
                host = urlsplit(self._hub.endpoint).hostname
                raise UsageError(f"{host} does not answer as a hub", "correct model.hub.endpoint") from error

    def _bring(self, batch: Batch, info: ObjectInfo, path: Path) -> None:
        part = path.with_name(f".{path.name}.part")
        with file_errors(path, info.size):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._fill(batch, info, parse(info.uri), part)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        batch.count(new_files=1)

    def _fill(self, batch: Batch, info: ObjectInfo, where: Location, part: Path) -> None:
        for _ in range(ATTEMPTS):
            hasher = _hasher(info)
            with part.open("wb") as file:
                self._copy(batch, info, where, file, hasher)
                file.flush()
                os.fsync(file.fileno())
            if hasher.hexdigest() == info.etag:
                return
            batch.count(-info.size)
        raise CorruptError(
            f"{where} arrived {ATTEMPTS} times with a checksum other than the hub's", "look for a faulty proxy or disk"
        )

    def _copy(self, batch: Batch, info: ObjectInfo, where: Location, file: BinaryIO, hasher: Any) -> None:
        """All bytes; after a failure on from where it happened."""
        patience, position = Patience(self._settings, batch.stop), 0
        while position < info.size:
            try:
                with closing(self._get(where, position)) as answer:
                    while position < info.size:
                        data = _read(answer, min(BLOCK_BYTES, info.size - position), where)
                        if batch.stop.is_set():
                            raise CancelledError
                        file.write(data)
                        hasher.update(data)
                        position += len(data)
                        batch.count(new_bytes=len(data))
                        patience.progress()
            except TransientError as error:
                patience.pause(error)

    def _get(self, where: Location, start: int) -> Any:
        repo, _ = _split(where)
        commit = self._repository(where).commit
        url = f"{self._hub.endpoint}/{quote(repo)}/resolve/{commit}/{quote(where.key)}"
        answer = self._request(url, {"Range": f"bytes={start}-"} if start else {}, where)
        if start and answer.status != 206:
            answer.close()
            raise TransientError(f"{where} cannot be gone on with from byte {start}")
        return answer

    def _request(self, url: str, headers: Mapping[str, str], where: Location) -> Any:
        """An open answer; raises what its status means."""
        own = {"User-Agent": "finetune-trainer", "Accept-Encoding": "identity", **headers}
        if self._hub.token:
            own["Authorization"] = f"Bearer {self._hub.token}"
        request = urllib.request.Request(url, headers=own)
        host = urlsplit(self._hub.endpoint).netloc
        try:
            return self._opener.open(request, timeout=self._settings.read_timeout_seconds)
        except urllib.error.HTTPError as error:
            with error:
                raise self._meaning(error, where, host) from error
        except (OSError, HTTPException) as error:
            raise TransientError(f"the hub {host} cannot be reached: {getattr(error, 'reason', error)}") from error

    def _meaning(self, error: urllib.error.HTTPError, where: Location, host: str) -> Exception:
        repo, revision = _split(where)
        code = error.headers.get("X-Error-Code") or ""
        if error.code in REFUSED:
            why = "the token may not read it" if self._hub.token else "it is private or gated, or there is no such one"
            return PermissionRefusedError(f"the hub {host} refuses {repo} ({error.code}): {why}", TOKEN_ADVICE)
        if error.code == 404 and code != "EntryNotFound":
            what = f"revision {revision} of {repo}" if code == "RevisionNotFound" else f"repository {repo}"
            return MissingContainerError(f"the hub {host} has no {what}", "correct hf://org/name@revision")
        if error.code == 404:
            return MissingError(f"there is no {where}", "correct the URI, or the revision after @")
        if error.code in BUSY or error.code >= 500:
            return TransientError(f"the hub {host} answered {error.code} for {where}")
        return UsageError(f"the hub {host} answered {error.code} for {where}", "correct model.hub.endpoint")


class CarefulRedirects(urllib.request.HTTPRedirectHandler):
    """Large files lie with somebody else, who must not see the token; nor must who listens on an open line."""

    def redirect_request(self, *call: Any) -> Any:
        request, new = call[0], super().redirect_request(*call)
        if new is not None and urlsplit(new.full_url)[:2] != urlsplit(request.full_url)[:2]:
            new.remove_header("Authorization")
        return new


def _read(answer: Any, size: int, where: Location) -> bytes:
    try:
        data: bytes = answer.read(size)
    except (OSError, HTTPException) as error:
        raise TransientError(f"the connection broke within {where}: {error}") from error
    if not data:
        raise TransientError(f"{where} ended early")
    return data


def _split(where: Location) -> tuple[str, str]:
    """Repository and revision; `main` where none is named."""
    repo, _, revision = where.bucket.partition("@")
    return repo, revision or "main"


def _repository(raw: Mapping[str, Any], where: Location) -> Repository:
    root = Location(where.scheme, where.bucket, "")
    infos = {}
    for item in raw["siblings"]:
        # Large files have their SHA-256, the others the number that git gives them: SHA-1 over a header and the bytes.
        large = item.get("lfs")
        etag = str(large["sha256"] if large else item["blobId"])
        infos[str(item["rfilename"])] = ObjectInfo(str(root.at(item["rfilename"])), int(item["size"]), etag)
    return Repository(str(raw["sha"]), infos)


def _hasher(info: ObjectInfo) -> Any:
    if len(info.etag) == hashlib.sha256().digest_size * 2:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {info.size}\0".encode(), usedforsecurity=False)
