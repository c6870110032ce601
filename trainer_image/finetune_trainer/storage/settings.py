"""How to reach S3, from the environment that the operator writes, and how hard to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from finetune_api import contract
from finetune_trainer.errors import UsageError

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """Sizes, numbers and times of transfers."""

    threads: int = 8
    """Requests in flight. One Python process moves about 1 GB/s; more threads than this only fight for its lock."""
    range_bytes: int = 16 * MIB
    """Bytes of one ranged GET. Large enough that signing and parsing (1 ms) vanish, small enough to retry."""
    read_bytes: int = 128 * 1024
    """Bytes taken from a socket at a time; with `threads` it is all the memory that a download holds. Measured: smaller
    reads lose time to the interpreter lock, larger ones to the core's cache, which they leave between two uses."""
    part_bytes: int = 8 * MIB
    """Bytes of one part of a multipart PUT, at least; larger where a file would need more than 10,000 parts."""
    upload_memory_bytes: int = 64 * MIB
    """Bytes of parts held in memory at a time by all uploads together; a single larger part still goes, alone."""
    patience_seconds: float = 120.0
    """How long one request may fail without a byte of progress before the store counts as unavailable."""
    first_backoff_seconds: float = 0.2
    """Pause after a first failure; it doubles with each further one."""
    max_backoff_seconds: float = 5.0
    """The longest pause, so that a store that is back is noticed soon."""
    connect_timeout_seconds: float = 10.0
    read_timeout_seconds: float = 30.0
    """A connection that is silent for so long is given up and tried anew."""


@dataclass(frozen=True, kw_only=True)
class S3Settings:
    """Where the S3 server is and who we are there; absent keys mean the SDK's own chain (a cloud role)."""

    endpoint: str | None
    region: str
    path_style: bool
    ca_bundle: str | None
    access_key: str | None
    secret_key: str | None
    session_token: str | None

    def __repr__(self) -> str:
        return f"S3Settings(endpoint={host_of(self.endpoint or '')!r}, region={self.region!r})"  # no keys into a log

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> S3Settings:
        """Read the variables of the contract.

        Raises:
            UsageError: a value that cannot be meant, or a CA bundle that is not there.
        """
        endpoint = environ.get(contract.ENV_S3_ENDPOINT) or None
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise UsageError(
                f"{contract.ENV_S3_ENDPOINT} is not a URL of http or https",
                "set storage.s3.endpoint to http://host:port or https://host:port",
            )
        return cls(
            endpoint=endpoint,
            region=environ.get(contract.ENV_S3_REGION) or "us-east-1",
            path_style=_path_style(environ.get(contract.ENV_S3_PATH_STYLE), endpoint),
            ca_bundle=_ca_bundle(environ.get(contract.ENV_S3_CA_BUNDLE)),
            access_key=environ.get(contract.ENV_S3_ACCESS_KEY_ID) or None,
            secret_key=environ.get(contract.ENV_S3_SECRET_ACCESS_KEY) or None,
            session_token=environ.get(contract.ENV_S3_SESSION_TOKEN) or None,
        )


def host_of(endpoint: str) -> str:
    """Host and port alone, for messages: a URL could carry a password."""
    parts = urlsplit(endpoint)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def is_loopback(endpoint: str | None) -> bool:
    host = urlsplit(endpoint or "").hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _path_style(value: str | None, endpoint: str | None) -> bool:
    """On by default where an endpoint is given: names like `bucket.10.0.0.5` do not resolve."""
    if not value:
        return endpoint is not None
    if value.lower() not in ("true", "false"):
        raise UsageError(f"{contract.ENV_S3_PATH_STYLE} is `{value}`", "set storage.s3.pathStyle to true or false")
    return value.lower() == "true"


def _ca_bundle(value: str | None) -> str | None:
    if not value:
        return None
    if not Path(value).is_file():
        raise UsageError(
            f"the CA bundle {value} is not there",
            "check that the ConfigMap named by storage.s3.caBundleConfigMap has the key `ca.crt`",
        )
    return value
