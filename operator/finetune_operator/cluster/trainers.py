"""Asks trainer pods for their progress. What a pod answers is somebody else's word: bounded in time and in size."""

from __future__ import annotations

import logging

import aiohttp
from pydantic import ValidationError

from finetune_api.contract import PROGRESS_PORT, Progress
from finetune_operator.cluster.port import Object

log = logging.getLogger(__name__)
SECONDS = 2.0
BYTES = 64 * 1024


async def read_progress(http: aiohttp.ClientSession, pod: Object) -> Progress | None:
    """GET /progress; None when the pod has no address or gives no answer that can be read."""
    address = (pod.get("status") or {}).get("podIP")
    if not address:
        return None
    host = f"[{address}]" if ":" in address else address
    try:
        # A redirect would send the operator to an address that a job's owner chooses.
        async with http.get(
            f"http://{host}:{PROGRESS_PORT}/progress",
            timeout=aiohttp.ClientTimeout(total=SECONDS),
            allow_redirects=False,
        ) as response:
            body = await _bounded(response) if response.status == 200 else None
        return Progress.model_validate_json(body) if body is not None else None
    except (aiohttp.ClientError, TimeoutError, OSError, ValidationError) as error:
        log.debug("progress of pod %s: %s", pod["metadata"]["name"], error)
        return None


async def _bounded(response: aiohttp.ClientResponse) -> bytes | None:
    """The body, or None when it is longer than BYTES."""
    body = b""
    async for chunk in response.content.iter_chunked(BYTES):
        body += chunk
        if len(body) > BYTES:
            return None
    return body
