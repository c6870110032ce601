"""The operator's own HTTP endpoints: /metrics for Prometheus, /healthz and /readyz for the kubelet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from finetune_operator.metrics import Metrics


@asynccontextmanager
async def serving(port: int, metrics: Metrics, ready: Callable[[], bool]) -> AsyncIterator[None]:
    """Serve while the block runs; port 0 serves nothing. Raises OSError when the port is taken.

    Args:
        ready: whether watches and the first resync are through.
    """
    if port == 0:
        yield
        return
    runner = web.AppRunner(application(metrics, ready), access_log=None)
    await runner.setup()
    try:
        # All addresses, IPv6 included: kubelet and Prometheus come from outside of the pod.
        await web.TCPSite(runner, None, port).start()
        yield
    finally:
        await runner.cleanup()


def application(metrics: Metrics, ready: Callable[[], bool]) -> web.Application:
    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), content_type="text/plain", charset="utf-8")

    async def healthy(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def is_ready(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if ready() else web.Response(status=503, text="starting\n")

    app = web.Application()
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", healthy)
    app.router.add_get("/readyz", is_ready)
    return app
