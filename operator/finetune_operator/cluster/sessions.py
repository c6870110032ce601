"""HTTP sessions to the API server, after the operator's one configuration."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes.aio.client import Configuration

from finetune_operator.cluster.port import Kind

_FORM = "application/json;as=Partial{};g=meta.k8s.io;v=v1"
METADATA = _FORM.format("ObjectMetadata")
"""Accept: of a watch whose events are the metadata of objects alone."""
METADATA_LIST = _FORM.format("ObjectMetadataList")
"""Accept: of a LIST of the same: a tenth of what pods are."""


def api_session(configuration: Configuration, limit: int, **options: Any) -> aiohttp.ClientSession:
    """A session that reaches the API server; `authorization` is still to be sent.

    Args:
        limit: connections at a time; 0 for no limit.
        options: further ones of ClientSession.
    """
    connector = aiohttp.TCPConnector(limit=limit, ssl=_tls(configuration))
    return aiohttp.ClientSession(connector=connector, proxy=_proxy(configuration), **options)


async def authorization(configuration: Configuration) -> dict[str, str]:
    """The header that says who we are; a service account's token is read anew when it has been replaced."""
    token = await configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
    return {"Authorization": token} if token else {}


async def metadata_session(configuration: Configuration, kinds: Iterable[Kind]) -> aiohttp.ClientSession:
    """A session with credentials that gets the metadata alone of these kinds, and all else (discovery) whole.

    For watches of which only a key and a version are used: a pod is some 40 KiB as Python objects.
    """
    plurals = frozenset(kind.plural for kind in kinds)

    async def narrow(
        request: aiohttp.ClientRequest, send: Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]]
    ) -> aiohttp.ClientResponse:
        if request.url.name in plurals:
            request.headers["Accept"] = METADATA if "watch" in request.url.query else METADATA_LIST
        return await send(request)

    headers = await authorization(configuration)
    return api_session(configuration, 0, headers=headers, middlewares=(narrow,), response_class=_Response)


class _Response(aiohttp.ClientResponse):
    async def json(self, **options: Any) -> Any:
        answer = await super().json(**options)
        # Without objects a list of metadata alone says null instead of an empty list.
        if isinstance(answer, dict) and "items" in answer and answer["items"] is None:
            answer["items"] = []
        return answer


def _tls(configuration: Configuration) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, keyfile=configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if configuration.disable_strict_ssl_verification:
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _proxy(configuration: Configuration) -> str | None:
    """The configured proxy, or the environment's. aiohttp would look for it anew in a thread at each request, which
    takes longer than many a request."""
    if configuration.proxy:
        return str(configuration.proxy)
    url = urlsplit(configuration.host)
    return None if proxy_bypass(url.hostname or "") else getproxies().get(url.scheme)
