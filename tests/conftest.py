"""Fixtures that several areas share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.support.s3 import S3Server, running_s3_server


def pytest_configure() -> None:
    """Hear Ctrl-C, and so let child processes hear it: a shell that starts us in the background has it ignored, and
    `finetune run` obeys what is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server for the whole run: endpoint, keys, process."""
    with running_s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[str]:
    """The name of a fresh bucket."""
    with s3_server.fresh_bucket() as name:
        yield name
