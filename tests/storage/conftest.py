"""A store before the real server, with small sizes and short times so that faults are seen in a few seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from finetune_trainer.storage import Store, TransferSettings
from tests.support.s3 import Proxy, S3Server

MIB = 1024 * 1024
QUICK = TransferSettings(
    range_bytes=MIB,
    part_bytes=5 * MIB,
    patience_seconds=5.0,
    first_backoff_seconds=0.05,
    max_backoff_seconds=0.2,
    connect_timeout_seconds=1.0,
    read_timeout_seconds=2.0,
)


@pytest.fixture
def connect(s3_server: S3Server) -> Iterator[Callable[..., Store]]:
    """Makes stores, by default with the server's own keys and QUICK settings; they are closed afterwards."""
    with ExitStack() as stack:

        def connect(transfer: TransferSettings = QUICK, **environ: str) -> Store:
            return stack.enter_context(Store.connect(s3_server.environ() | environ, transfer))

        yield connect


@pytest.fixture
def store(connect: Callable[..., Store]) -> Store:
    return connect()


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with Proxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def far_store(connect: Callable[..., Store], proxy: Proxy) -> Store:
    """A store that reaches the server only through the proxy."""
    return connect(AWS_ENDPOINT_URL_S3=proxy.url)


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    """12 MiB and a bit of noise: many ranges, three parts."""
    path = tmp_path / "source" / "big.bin"
    path.parent.mkdir()
    path.write_bytes(os.urandom(12 * MIB + 12345))
    return path
