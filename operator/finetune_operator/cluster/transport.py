"""Requests to a Kubernetes API server: credentials, deadlines, patience with a server that is busy, errors in words."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
from kubernetes.aio.client import ApiClient
from kubernetes.aio.client.exceptions import ApiException

from finetune_operator.cluster.port import (
    ClusterError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    Object,
)

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


class Transport:
    """Sends requests.

    Args:
        request_seconds: after so many an answer is no longer waited for.
        may_write: asked before every write; where the answer is no, nothing is sent.
        answered: told of every answer, and of every one that did not come.
    """

    def __init__(
        self,
        client: ApiClient,
        *,
        request_seconds: float,
        may_write: Callable[[], bool],
        answered: Answered,
    ) -> None:
        self._client = client
        self._seconds = request_seconds
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
            except ApiException as error:
                if error.status != BUSY or last:
                    raise _translated(error, f"{method} {path}") from error
                wait = _retry_after(error)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise ClusterError(f"{method} {path}: {type(error).__name__}: {error}".rstrip(": ")) from error
            await asyncio.sleep(wait)
        raise AssertionError("the last try returns or raises")

    async def _send(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], body: Any
    ) -> Object:
        # A service account's token is read anew when it has been replaced.
        headers = dict(headers)
        await self._client.update_params_for_auth(headers, [], ["BearerToken"])
        begin, code = time.monotonic(), None
        try:
            response = await self._client.rest_client.request(
                method,
                self._client.configuration.host + path,
                query_params=list(query.items()),
                headers=headers,
                body=body,
                _request_timeout=self._seconds,
            )
            code = response.status
        except ApiException as error:
            code = error.status
            raise
        finally:
            self._answered(method, code, time.monotonic() - begin)
        answer: Object = json.loads(response.data)
        return answer


def _retry_after(error: ApiException) -> float:
    """What the server asks for, spread upwards by half: those that were put off together should not come together."""
    asked = str((error.headers or {}).get("Retry-After") or "1")
    seconds = float(asked) if asked.isdigit() else 1.0
    return min(seconds, BUSY_SECONDS) * random.uniform(1.0, 1.5)


def _translated(error: ApiException, request: str) -> ClusterError:
    """Kubernetes' status codes in the port's terms, with the server's own sentence."""
    try:
        status = json.loads(error.body or b"{}")
    except ValueError:
        status = {}
    message = str(status.get("message") or error.reason or "no reason given")
    reason, code = status.get("reason"), error.status
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
