"""Progress reads over real connections, from pods that answer well, badly, for ever, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from finetune_api.contract import PROGRESS_PORT, Progress
from finetune_operator.cluster import trainers
from finetune_operator.cluster.port import Object

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
GOOD = b'{"stage": "Training", "step": 7}'


@contextlib.asynccontextmanager
async def pod(handler: Handler) -> AsyncIterator[Object]:
    """One that serves on a loopback address of its own."""
    address = f"127.{random.randint(2, 250)}.{random.randint(0, 250)}.{random.randint(1, 250)}"
    app = web.Application()
    app.router.add_get("/progress", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, address, PROGRESS_PORT).start()
    try:
        yield {"metadata": {"name": "p"}, "status": {"podIP": address}}
    finally:
        await runner.cleanup()


async def read(found: Object) -> Progress | None:
    async with aiohttp.ClientSession() as http:
        return await trainers.read_progress(http, found)


async def good(_: web.Request) -> web.Response:
    return web.Response(body=GOOD)


async def test_a_good_answer_is_read() -> None:
    async with pod(good) as found:
        progress = await read(found)
    assert progress is not None
    assert progress.step == 7


async def test_an_endless_answer_is_cut_off() -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"x" * 65536)
                sent += 65536
        return response

    async with pod(endless) as found:
        assert await read(found) is None
    # What the sockets hold on the way counts as well.
    assert sent < 16 * 2**20


async def test_a_pod_that_accepts_and_says_nothing_costs_two_seconds() -> None:
    async def mute(_: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async with pod(mute) as found:
        begin = time.monotonic()
        assert await read(found) is None
        assert time.monotonic() - begin < trainers.SECONDS + 3


async def test_a_redirect_is_not_followed() -> None:
    async with pod(good) as elsewhere:

        async def away(_: web.Request) -> web.Response:
            raise web.HTTPFound(f"http://{elsewhere['status']['podIP']}:{PROGRESS_PORT}/progress")

        async with pod(away) as found:
            assert await read(found) is None


@pytest.mark.parametrize("body", [b"", b"not json", b'{"step": "many"}', b"\xff\xfe"])
async def test_an_answer_that_makes_no_sense_is_no_answer(body: bytes) -> None:
    async def bad(_: web.Request) -> web.Response:
        return web.Response(body=body)

    async with pod(bad) as found:
        assert await read(found) is None


async def test_a_pod_that_does_not_listen_or_has_no_address_is_no_error() -> None:
    assert await read({"metadata": {"name": "p"}, "status": {"podIP": "127.250.250.250"}}) is None
    assert await read({"metadata": {"name": "p"}}) is None
