"""kopf's handlers. They only put keys: what an event says is stale by the time it is worked on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import kopf
from kubernetes.aio.client import Configuration

from finetune_api.contract import LABEL_JOB
from finetune_operator.cluster.port import FINE_TUNE_JOB, JOB, POD, Key, Kind
from finetune_operator.settings import Settings

Put = Callable[[Key], None]
LIST_CHUNK = 500
"""Objects of one page of kopf's first LIST, which is one unbounded answer otherwise."""


async def watch(put: Put, settings: Settings, configuration: Configuration, ready: asyncio.Event) -> None:
    """Watch until SIGTERM or SIGINT.

    Args:
        ready: set when the watches have been started.
    """
    await kopf.operator(
        registry=_registry(put, configuration),
        settings=_kopf_settings(),
        standalone=True,
        clusterwide=not settings.namespaces,
        namespaces=settings.namespaces,
        ready_flag=ready,
    )


def _kopf_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    # Without this kopf asks for permission to list namespaces and CRDs, and waits a minute where it has none.
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.watching.chunk_size = LIST_CHUNK
    for kind in (JOB, POD):
        # On the server's side: the pods of everybody else never come over the wire.
        settings.watching.label_selectors[_selector(kind)] = LABEL_JOB
    return settings


def _registry(put: Put, configuration: Configuration) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await connection_info(configuration)

    def job_changed(namespace: str, name: str, **_: Any) -> None:
        put(Key(namespace, name))

    def child_changed(namespace: str, labels: Mapping[str, str], **_: Any) -> None:
        put(Key(namespace, labels[LABEL_JOB]))

    kopf.on.login(registry=registry)(login)
    kopf.on.event(*_selector(FINE_TUNE_JOB), registry=registry)(_async(job_changed))
    for kind in (JOB, POD):
        kopf.on.event(*_selector(kind), registry=registry)(_async(child_changed))
    return registry


def _async(handler: Callable[..., None]) -> Callable[..., Any]:
    """As a coroutine function: kopf runs plain functions in threads, and the queue belongs to the loop."""

    async def run(**kwargs: Any) -> None:
        handler(**kwargs)

    return run


def _selector(kind: Kind) -> tuple[str, str, str]:
    """Group, version and plural, as kopf takes them."""
    group, _, version = kind.api_version.rpartition("/")
    return group, version, kind.plural


async def connection_info(configuration: Configuration) -> kopf.ConnectionInfo:
    """The operator's one configuration, in kopf's terms; a service account's token is read anew."""
    token = await configuration.get_api_key_with_prefix("BearerToken")
    scheme, _, secret = (token or "").rpartition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        scheme=scheme or None,
        token=secret or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        proxy_url=configuration.proxy,
        trust_env=True,
    )
