"""The operator's own HTTP endpoints: /metrics for Prometheus, /healthz and /readyz for the kubelet."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from finetune_operator.health import Health
from finetune_operator.metrics import Metrics


@asynccontextmanager
async def serving(port: int, metrics: Metrics, health: Health) -> AsyncIterator[None]:
    """Serve while the block runs; port 0 serves nothing. Raises OSError when the port is taken."""
    if port == 0:
        yield
        return
    runner = web.AppRunner(application(metrics, health), access_log=None)
    await runner.setup()
    try:
        # All addresses, IPv6 included: kubelet and Prometheus come from outside of the pod.
        await web.TCPSite(runner, None, port).start()
        yield
    finally:
        await runner.cleanup()


def application(metrics: Metrics, health: Health) -> web.Application:
    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), content_type="text/plain", charset="utf-8")

    async def healthy(_: web.Request) -> web.Response:
        return _answer(health.ailing())

    async def is_ready(_: web.Request) -> web.Response:
        return _answer(health.unready())

    app = web.Application()
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", healthy)
    app.router.add_get("/readyz", is_ready)
    return app


def _answer(trouble: str) -> web.Response:
    return web.Response(status=503, text=f"{trouble}\n") if trouble else web.Response(text="ok\n")
