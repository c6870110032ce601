"""A real S3 server for tests, and a TCP proxy before it by which real faults happen to it."""

from __future__ import annotations

import asyncio
import math
import random
import re
import secrets
import shutil
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

from finetune_api import contract
from finetune_operator.cluster.seaweed import Identity, Seaweed

HOST = "127.0.0.1"
BLOCK = 64 * 1024
REQUEST_LINE = re.compile(rb"((?:GET|HEAD|PUT|POST|DELETE) \S+) HTTP/1\.1\r\n")


@dataclass(frozen=True)
class S3Server:
    """A running SeaweedFS, reached at `endpoint`; `reader` keys may read and list, but not write."""

    endpoint: str
    access_key: str
    secret_key: str
    reader: Identity
    process: Seaweed

    def environ(self, endpoint: str | None = None) -> dict[str, str]:
        """What the operator would write into a trainer's environment; by another endpoint for a proxy."""
        return {
            contract.ENV_S3_ENDPOINT: endpoint or self.endpoint,
            contract.ENV_S3_ACCESS_KEY_ID: self.access_key,
            contract.ENV_S3_SECRET_ACCESS_KEY: self.secret_key,
        }

    def client(self) -> Any:
        """A plain SDK client, which shares nothing with the code under test."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )

    @contextmanager
    def fresh_bucket(self) -> Iterator[str]:
        """A new, empty bucket, removed afterwards with all that is in it."""
        name = f"test-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        try:
            yield name
        finally:
            empty_bucket(self.client(), name)
            self.client().delete_bucket(Bucket=name)


def empty_bucket(client: Any, name: str) -> None:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        for item in page.get("Contents", ()):
            client.delete_object(Bucket=name, Key=item["Key"])


@contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """A server with its own temporary folder, on free ports of loopback. Missing buckets stay missing."""
    folder = Path(tempfile.mkdtemp(prefix="finetune-s3-"))
    reader = Identity("reader", "READER", secrets.token_hex(8), ("Read", "List"))
    with Seaweed(auto_create_buckets=False, extra_identities=[reader]) as seaweed:
        found = seaweed.start(folder)
        yield S3Server(found.url, found.access_key, found.secret_key, reader, seaweed)
    shutil.rmtree(folder)


class Proxy:
    """A TCP proxy on loopback. Every fault it makes is one of the network: nothing in the client is replaced.

    With a `tls` context it speaks TLS to its clients.

    `down` refuses connections and breaks those that are open, `stall` keeps them open and silent, `up` heals both.
    `after` does something when so many more bytes have passed, `flip` spoils answers, `lose_answer_to` loses one.
    `fail` refuses or breaks a share of all requests, `slow` lets only so much through.
    `requests` holds method and path of each request that came through, `passed_bytes` counts both directions.
    """

    def __init__(self, target: str, host: str = HOST, tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(target)
        self._tls = tls
        self._host = host
        self._target = str(parts.hostname), int(parts.port or 80)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._held = asyncio.Event()
        self._flips = 0
        self._lose: re.Pattern[bytes] | None = None
        self._trigger: tuple[int, Callable[[], object]] | None = None
        self._failing = 0.0
        self._chance = random.Random()
        self._bytes_per_second = math.inf
        self.failed = 0
        self.port = 0
        self.passed_bytes = 0
        self.connections = 0
        self.requests: list[str] = []

    def __enter__(self) -> Proxy:
        self._thread.start()
        self.up()
        return self

    def __exit__(self, *exc: object) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self._host}:{self.port}"

    def up(self) -> None:
        self._run(self._up())

    def down(self) -> None:
        self._run(self._down())

    def stall(self) -> None:
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def flip(self, times: int) -> None:
        """Change a byte in each of the next `times` large blocks on their way to the client."""
        self._flips = times

    def after(self, count: int, action: Callable[[], object]) -> None:
        """Call `action` when `count` more bytes have passed in either direction; nothing passes until it returns."""
        self._trigger = self.passed_bytes + count, action

    def down_for(self, seconds: float) -> None:
        """Down now, up again by itself."""
        self.down()
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, lambda: self._loop.create_task(self._up()))

    def stall_for(self, seconds: float) -> None:
        """Silent now, heals by itself."""
        self.stall()
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self._flowing.set)

    def fail(self, share: float, seed: int) -> None:
        """From now on answer this share of requests with 503 or break their connections, in turns by chance."""
        self._failing, self._chance = share, random.Random(seed)

    def slow(self, bytes_per_second: float) -> None:
        """Let no connection send or receive faster than this."""
        self._bytes_per_second = bytes_per_second

    def lose_answer_to(self, request: bytes) -> None:
        """Break the connection on which the next request that matches this regular expression is answered."""
        self._lose = re.compile(request)

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _up(self) -> None:
        self._flowing.set()
        self._held.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, self._host, self.port, ssl=self._tls)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _down(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        lost = asyncio.Event()
        try:
            # Either side may go away: the other one is told by the abort below.
            with suppress(OSError):
                await asyncio.gather(
                    self._requests(reader, far_writer, writer, lost), self._answers(far_reader, writer, lost)
                )
        finally:
            self._writers -= {writer, far_writer}
            for end in (writer, far_writer):
                end.transport.abort()

    async def _refuse(self, client: asyncio.StreamWriter) -> None:
        self.failed += 1
        if self._chance.random() < 0.5:
            client.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await client.drain()
        raise ConnectionResetError

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        client: asyncio.StreamWriter,
        lost: asyncio.Event,
    ) -> None:
        while data := await reader.read(BLOCK):
            if line := REQUEST_LINE.match(data):
                if self._chance.random() < self._failing:
                    await self._refuse(client)
                self.requests.append(line[1].decode())
            if self._lose and self._lose.search(data):
                self._lose = None
                lost.set()
            await self._pass(data, writer)
        end_of(writer)

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: asyncio.Event) -> None:
        while data := await reader.read(BLOCK):
            if lost.is_set():
                raise ConnectionResetError
            if self._flips and len(data) > 8192:
                self._flips -= 1
                data = data[:-1] + bytes([data[-1] ^ 1])  # the end of a large block is body, not header
            await self._pass(data, writer)
        end_of(writer)

    async def _pass(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        await self._held.wait()
        await asyncio.sleep(len(data) / self._bytes_per_second)
        writer.write(data)
        await writer.drain()
        self.passed_bytes += len(data)
        if self._trigger and self.passed_bytes >= self._trigger[0]:
            action, self._trigger = self._trigger[1], None
            self._held.clear()
            self._loop.run_in_executor(None, self._act, action)

    def _act(self, action: Callable[[], object]) -> None:
        action()
        self._loop.call_soon_threadsafe(self._held.set)


def end_of(writer: asyncio.StreamWriter) -> None:
    """Say that no more comes; TLS can do so only by closing both directions."""
    if writer.can_write_eof():
        writer.write_eof()
    else:
        writer.close()
