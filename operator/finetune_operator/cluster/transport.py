"""Requests to a Kubernetes API server: credentials, deadlines, patience with a server that is busy, errors in words."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
from kubernetes.aio.client import Configuration

from finetune_operator.cluster.port import (
    ClusterError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    Object,
)
from finetune_operator.cluster.sessions import authorization

AGENT = "finetune-operator"
BUSY = 429
BUSY_TRIES = 4
"""Tries of a request that a busy server puts off; after that the whole pass backs off."""
BUSY_SECONDS = 10.0
"""Most seconds that one `Retry-After` is obeyed: a worker that waits longer is better used for another job."""
Answered = Callable[[str, int | None, float], None]
"""(method, HTTP status or None where no answer came, seconds)"""


class AbsentError(ClusterError):
    """404."""


class _RefusedError(Exception):
    """An answer that is no success."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        super().__init__(response.status)
        self.code = response.status
        self.reason = response.reason
        self.retry_after = response.headers.get("Retry-After", "")
        self.body = body


class Transport:
    """Sends requests.

    Args:
        session: by `api_session`.
        request_seconds: after so many an answer is no longer waited for.
        may_write: asked before every write; where the answer is no, nothing is sent.
        answered: told of every answer, and of every one that did not come.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        configuration: Configuration,
        *,
        request_seconds: float,
        may_write: Callable[[], bool],
        answered: Answered,
    ) -> None:
        self._session = session
        self._configuration = configuration
        self._timeout = aiohttp.ClientTimeout(total=request_seconds)
        self._may_write = may_write
        self._answered = answered

    async def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        *,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Object:
        """The answer's JSON. Raises ClusterError."""
        headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": AGENT}
        for last in (False,) * (BUSY_TRIES - 1) + (True,):
            if method != "GET" and not self._may_write():
                raise ClusterError(f"{method} {path}: not sent, since this replica does not lead")
            try:
                return await self._send(method, path, query or {}, headers, body)
            except _RefusedError as error:
                if error.code != BUSY or last:
                    raise _translated(error, f"{method} {path}") from error
                wait = _retry_after(error)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise ClusterError(f"{method} {path}: {type(error).__name__}: {error}".rstrip(": ")) from error
            await asyncio.sleep(wait)
        raise AssertionError("the last try returns or raises")

    async def _send(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], body: Any
    ) -> Object:
        begin, code = time.monotonic(), None
        try:
            async with self._session.request(
                method,
                self._configuration.host + path,
                params=query,
                headers={**headers, **await authorization(self._configuration)},
                data=None if body is None else json.dumps(body),
                timeout=self._timeout,
                server_hostname=self._configuration.tls_server_name,
            ) as response:
                code = response.status
                text = await response.read()
        finally:
            self._answered(method, code, time.monotonic() - begin)
        if not response.ok:
            raise _RefusedError(response, text)
        answer: Object = json.loads(text)
        return answer


def _retry_after(error: _RefusedError) -> float:
    """What the server asks for, spread upwards by half: those that were put off together should not come together."""
    seconds = float(error.retry_after) if error.retry_after.isdigit() else 1.0
    return min(seconds, BUSY_SECONDS) * random.uniform(1.0, 1.5)


def _translated(error: _RefusedError, request: str) -> ClusterError:
    """Kubernetes' status codes in the port's terms, with the server's own sentence."""
    try:
        status = json.loads(error.body or b"{}")
    except ValueError:
        status = {}
    message = str(status.get("message") or error.reason or "no reason given")
    reason, code = status.get("reason"), error.code
    if code == 404:
        return AbsentError(f"{request}: {message}")
    # A 409 on POST may also be a race for a quota, which says nothing about the name.
    if code == 409 and (not request.startswith("POST") or reason == "AlreadyExists"):
        return ConflictError(message)
    # A JSON Patch that does not fit the object, a failed test included, gets this without any details.
    if code == 422 and request.startswith("PATCH") and not status.get("details"):
        return ConflictError(f"{request}: the object has moved on")
    if code in (400, 422):
        return InvalidError(message)
    if code == 403:
        return ForbiddenError(message)
    return ClusterError(f"{request}: {code} {message}")
