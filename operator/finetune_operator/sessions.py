"""The HTTP session of kopf's watches: it asks for the metadata of objects alone, since nothing else of them is used.

What a watch tells is a key and a version; all else is read by the pass. A pod is some 40 KiB as Python objects, its
metadata a tenth of that, and kopf keeps the last event of every object for a moment.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import aiohttp
import kopf

from finetune_operator.cluster.port import Kind

_FORM = "application/json;as=Partial{};g=meta.k8s.io;v=v1"
ONE = _FORM.format("ObjectMetadata")
"""Accept: of a watch, whose events are objects."""
MANY = _FORM.format("ObjectMetadataList")
"""Accept: of a LIST."""


class _Response(aiohttp.ClientResponse):
    async def json(self, **options: Any) -> Any:
        answer = await super().json(**options)
        # Without objects a list of metadata alone says null, over which kopf would stumble.
        if isinstance(answer, dict) and "items" in answer and answer["items"] is None:
            answer["items"] = []
        return answer


def metadata_session(info: kopf.ConnectionInfo, kinds: Iterable[Kind]) -> aiohttp.ClientSession:
    """A session with these credentials that gets metadata alone of these kinds, and all else (discovery) whole."""
    plurals = frozenset(kind.plural for kind in kinds)

    async def narrow(
        request: aiohttp.ClientRequest, send: Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]]
    ) -> aiohttp.ClientResponse:
        if request.url.name in plurals:
            request.headers["Accept"] = ONE if "watch" in request.url.query else MANY
        return await send(request)

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
        headers=info.as_http_headers(),
        proxy=info.proxy_url,
        trust_env=info.trust_env,
        middlewares=(narrow,),
        response_class=_Response,
    )
