"""S3 requests, one try each: every failure comes out as a TransientError or as the TrainerError to stop with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any, cast

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.checksums import Kind, crc_base64, expectation
from finetune_trainer.storage.errors import ChangedError, TransientError
from finetune_trainer.storage.faults import NOBODY_WRITES, translate
from finetune_trainer.storage.settings import S3Settings, TransferSettings, is_loopback
from finetune_trainer.storage.uris import Location

DELETE_BATCH = 1000
"""The most keys that one DeleteObjects takes."""
BODYLESS = {"400", "401", "403", "404"}
"""What the SDK gives as the code of a failed HEAD, whose answer has no body that would say more."""


@dataclass(frozen=True)
class ObjectInfo:
    """An object as listed: `size` in bytes, `etag` without quotes; for local files it is made of size and time."""

    uri: str
    size: int
    etag: str
    crc32: str | None = None
    """Eight hexadecimal digits; only from `stat`, and only where the server keeps it."""


class Body:
    """The answer to a GET: its parsed headers, and its bytes by `read` or `readinto`."""

    def __init__(self, headers: dict[str, Any], s3: S3, where: Location) -> None:
        self.headers = headers
        self._stream = headers["Body"]
        self._s3 = s3
        self._where = where

    def read(self, limit: int) -> bytes:
        """Up to `limit` bytes; none at the end."""
        with self._s3.translated("get_object", self._where):
            return cast(bytes, self._stream.read(limit))

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer as far as bytes come; how many came, 0 at the end.

        From the connection's own response straight into the buffer, which stays in the core's cache. The SDK's stream
        makes a new object of each block and puts it through a queue: that costs twice the processor time of a download
        that is checked by CRC32. Where the SDK no longer has the response below its stream, the stream serves.
        """
        response = direct_response(self._stream)
        with self._s3.translated("get_object", self._where):
            if response is None:
                return cast(int, self._stream.readinto(buffer))
            count = response.readinto(buffer)
            if response.isclosed():  # read to its end: the connection may serve again
                self._stream._raw_stream.release_conn()
            return count

    def close(self) -> None:
        self._stream.close()


def direct_response(stream: Any) -> HTTPResponse | None:
    """The response of the standard library under a stream of the SDK, found by names that the SDK does not promise."""
    response = getattr(getattr(stream, "_raw_stream", None), "_fp", None)
    return response if isinstance(response, HTTPResponse) else None


class S3:
    """A thin client. Safe to use from many threads."""

    def __init__(self, settings: S3Settings, transfer: TransferSettings) -> None:
        self._client = _client(settings, transfer)
        self._endpoint = str(self._client.meta.endpoint_url)

    def request(self, operation: str, where: Location, **parameters: Any) -> dict[str, Any]:
        """One request of the SDK on the bucket of `where`; the key is a parameter where one is needed."""
        with self.translated(operation, where):
            return cast(dict[str, Any], getattr(self._client, operation)(Bucket=where.bucket, **parameters))

    @contextmanager
    def translated(self, operation: str, where: Location) -> Iterator[None]:
        try:
            yield
        except (TrainerError, TransientError):
            raise
        except Exception as error:
            meaning = translate(error, operation, where, self._endpoint)
            if meaning is error:
                raise
            raise meaning from error

    def pages(self, where: Location, token: str | None) -> tuple[list[ObjectInfo], str | None]:
        """One page of the objects whose keys start with `where.key`, and the token of the next."""
        more = {"ContinuationToken": token} if token else {}
        answer = self.request("list_objects_v2", where, Prefix=where.key, **more)
        infos = [
            ObjectInfo(str(where.at(item["Key"])), item["Size"], item["ETag"].strip('"'))
            for item in answer.get("Contents", ())
        ]
        return infos, answer.get("NextContinuationToken") if answer.get("IsTruncated") else None

    def head(self, where: Location, **parameters: Any) -> dict[str, Any]:
        """HEAD; a refusal, which has no body there, is asked again by GET, so that its reason is known."""
        try:
            return self.request("head_object", where, Key=where.key, ChecksumMode="ENABLED", **parameters)
        except TrainerError as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and cause.response["Error"]["Code"] in BODYLESS:
                self.request("get_object", where, Key=where.key, Range="bytes=0-0")["Body"].close()
            raise

    def stat(self, where: Location) -> ObjectInfo:
        answer = self.head(where)
        found = expectation(answer)
        crc32 = found.value.hex() if found.kind is Kind.CRC32 else None
        return ObjectInfo(str(where), answer["ContentLength"], answer["ETag"].strip('"'), crc32)

    def open(self, where: Location, etag: str, start: int, end: int | None) -> Body:
        """Bytes [start, end) of the object, if it still has this ETag; to its end when `end` is None.

        Raises:
            ChangedError: it has another ETag by now.
        """
        parameters: dict[str, Any] = {"IfMatch": f'"{etag}"', "ChecksumMode": "ENABLED"}
        ranged = start > 0 or end is not None
        if ranged:
            parameters["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        answer = self.request("get_object", where, Key=where.key, **parameters)
        body = Body(answer, self, where)
        if answer["ETag"].strip('"') != etag:  # a server that does not know If-Match
            body.close()
            raise ChangedError(f"{where} was replaced while it was read", NOBODY_WRITES)
        if ranged and not str(answer.get("ContentRange", "")).startswith(f"bytes {start}-"):
            body.close()
            raise TrainerError(f"the server does not know ranged GETs ({where})", "use an S3-compatible endpoint")
        return body

    def put(self, where: Location, data: bytes | bytearray, crc: int) -> dict[str, Any]:
        """PUT a whole object; the server compares the checksum."""
        return self.request("put_object", where, Key=where.key, Body=data, ChecksumCRC32=crc_base64(crc))

    def delete(self, wheres: Sequence[Location]) -> None:
        """Delete objects of one bucket; those that are not there count as deleted."""
        for first in range(0, len(wheres), DELETE_BATCH):
            batch = wheres[first : first + DELETE_BATCH]
            keys = [{"Key": where.key} for where in batch]
            answer = self.request("delete_objects", batch[0], Delete={"Objects": keys, "Quiet": True})
            for failed in answer.get("Errors", ()):
                where = batch[0].at(failed["Key"])
                error = ClientError({"Error": failed, "ResponseMetadata": _status(failed["Code"])}, "DeleteObjects")
                raise translate(error, "delete_objects", where, self._endpoint) from error


def _status(code: str) -> Any:
    """The HTTP status that a code of a single failed key would have had."""
    return {"HTTPStatusCode": 403 if code == "AccessDenied" else 500}


def _client(settings: S3Settings, transfer: TransferSettings) -> Any:
    session = boto3.session.Session(
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key,
        aws_session_token=settings.session_token,
        region_name=settings.region,
    )
    config = Config(
        max_pool_connections=transfer.threads + 2,
        connect_timeout=transfer.connect_timeout_seconds,
        read_timeout=transfer.read_timeout_seconds,
        # Retries are ours alone: they must go on where the bytes stopped, which the SDK's cannot.
        retries={"total_max_attempts": 1, "mode": "standard"},
        # A loopback address means this machine, never that of a proxy; None leaves it to the environment.
        proxies={} if is_loopback(settings.endpoint) else None,
        # We verify: the SDK can check neither ranges nor parts, and would hash small objects a second time.
        response_checksum_validation="when_required",
        s3={
            "addressing_style": "path" if settings.path_style else "auto",
            # The signed CRC32 header already ties the body to the signature; SHA-256 of each body costs three times
            # as much as the CRC and the server checks it no better.
            "payload_signing_enabled": False,
        },
    )
    return session.client("s3", endpoint_url=settings.endpoint, verify=settings.ca_bundle, config=config)
