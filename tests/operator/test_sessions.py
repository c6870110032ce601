"""What is asked of the API server, and how: metadata where it is enough, proxies, and events that tell nothing new."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio.client import Configuration

from finetune_operator.cluster.echoes import Echoes
from finetune_operator.cluster.port import FINE_TUNE_JOB, JOB, POD, ConflictError, Key, Object
from finetune_operator.cluster.sessions import METADATA, METADATA_LIST, api_session, metadata_session
from finetune_operator.watches import WATCHED


@pytest.fixture
async def server() -> AsyncIterator[TestServer]:
    async def answer(request: web.Request) -> web.Response:
        seen = {
            "accept": request.headers["Accept"],
            "who": request.headers.get("Authorization"),
            "url": request.path_qs,
        }
        return web.json_response({"seen": seen, "items": None})

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    async with TestServer(app) as running:
        yield running


def configured(server: TestServer) -> Configuration:
    configuration = Configuration()
    configuration.host = str(server.make_url("")).rstrip("/")
    configuration.api_key["BearerToken"] = "Bearer secret"
    return configuration


async def test_watches_and_their_lists_get_metadata_alone_and_discovery_gets_all(server: TestServer) -> None:
    configuration, accepted = configured(server), []
    async with await metadata_session(configuration, WATCHED) as session:
        for path in ("/api/v1/pods?watch=true", "/apis/batch/v1/namespaces/ml/jobs?limit=5", "/apis/batch/v1"):
            async with session.get(configuration.host + path) as response:
                answer = await response.json()
                accepted.append(answer["seen"]["accept"])
                # A list of metadata says null where there is none, over which kopf would stumble.
                assert answer["items"] == []
                assert answer["seen"]["who"] == "Bearer secret"
    assert accepted == [METADATA, METADATA_LIST, "*/*"]


async def test_a_proxy_of_the_environment_is_used_but_for_hosts_that_need_none(
    server: TestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", configured(server).host)
    monkeypatch.setenv("no_proxy", "near.example")
    away, near = Configuration(), Configuration()
    away.host, near.host = "http://api.example", "http://near.example"
    async with api_session(away, 1) as session, session.get("http://api.example/version") as response:
        assert (await response.json())["seen"]["url"] == "/version"
    async with api_session(near, 1) as session:
        assert session._default_proxy is None


def metadata(version: str) -> Object:
    return {"uid": "1", "namespace": "ml", "name": "tune", "resourceVersion": version}


async def test_an_event_of_what_we_have_written_is_no_news_and_any_other_one_is() -> None:
    echoes = Echoes()
    echoes.wrote(FINE_TUNE_JOB, {"metadata": metadata("5")})
    assert await echoes.is_news(FINE_TUNE_JOB, metadata("4"), deleted=False)
    assert not await echoes.is_news(FINE_TUNE_JOB, metadata("5"), deleted=False)
    # The same again comes after a broken watch, which may have missed something.
    assert await echoes.is_news(FINE_TUNE_JOB, metadata("5"), deleted=False)
    echoes.wrote(JOB, {"metadata": metadata("7")})
    assert await echoes.is_news(JOB, metadata("7"), deleted=True)
    # What pods are told belongs to no status that would have been written in the same pass.
    echoes.wrote(POD, {"metadata": metadata("9")})
    assert await echoes.is_news(POD, metadata("9"), deleted=False)


async def test_an_event_that_comes_before_the_answer_to_the_write_is_no_news_either() -> None:
    echoes, key = Echoes(), Key("ml", "tune")
    with echoes.writing(FINE_TUNE_JOB, key):
        early = asyncio.create_task(echoes.is_news(FINE_TUNE_JOB, metadata("5"), deleted=False))
        other = asyncio.create_task(echoes.is_news(FINE_TUNE_JOB, metadata("6"), deleted=False))
        await asyncio.sleep(0)
        echoes.wrote(FINE_TUNE_JOB, {"metadata": metadata("5")})
    assert (await early, await other) == (False, True)
    # A write that fails holds nothing up.
    with pytest.raises(ConflictError), echoes.writing(FINE_TUNE_JOB, key):
        raise ConflictError
    assert await echoes.is_news(FINE_TUNE_JOB, metadata("8"), deleted=False)
