"""Liveness and readiness: what the watches delivered against what is listed, and whether anybody answers."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from aiohttp.test_utils import TestClient, TestServer

from finetune_operator.cluster.port import FINE_TUNE_JOB, POD, ClusterError, Object
from finetune_operator.endpoints import application
from finetune_operator.health import Health
from finetune_operator.metrics import Metrics
from finetune_operator.watches import LATE_SECONDS, QUIET_SECONDS, Watches


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def meta(uid: str, version: int) -> Object:
    return {"uid": uid, "resourceVersion": str(version)}


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def watches(time: Time) -> Watches:
    return Watches(time)


def lists(watches: Watches, *metadata: Object) -> None:
    watches.compare(FINE_TUNE_JOB, watches.known(FINE_TUNE_JOB), metadata)


def test_a_silent_watch_with_nothing_to_tell_is_alive(time: Time, watches: Watches) -> None:
    watches.delivered(FINE_TUNE_JOB, meta("a", 5), deleted=False)
    time.now += 100_000
    lists(watches, meta("a", 5))
    assert watches.dead() == []


def test_a_watch_that_misses_a_new_object_is_dead_after_thirty_seconds(time: Time, watches: Watches) -> None:
    time.now += 60
    lists(watches, meta("a", 5))
    time.now += QUIET_SECONDS
    assert watches.dead() == []
    time.now += 1
    assert watches.dead() == ["FineTuneJob"]


def test_a_watch_that_misses_a_change_is_dead_and_lives_again_when_it_comes(time: Time, watches: Watches) -> None:
    watches.delivered(FINE_TUNE_JOB, meta("a", 9), deleted=False)
    time.now += 60
    lists(watches, meta("a", 10))
    time.now += QUIET_SECONDS + 1
    assert watches.lag(FINE_TUNE_JOB) == QUIET_SECONDS + 1
    assert watches.dead() == ["FineTuneJob"]
    watches.delivered(FINE_TUNE_JOB, meta("a", 11), deleted=False)
    assert watches.lag(FINE_TUNE_JOB) == 0
    assert watches.dead() == []


def test_a_watch_that_is_ahead_of_the_list_misses_nothing(time: Time, watches: Watches) -> None:
    watches.delivered(FINE_TUNE_JOB, meta("a", 12), deleted=False)
    lists(watches, meta("a", 10))
    assert watches.lag(FINE_TUNE_JOB) == 0


def test_a_watch_that_works_through_a_heap_of_news_is_given_time(time: Time, watches: Watches) -> None:
    lists(watches, *(meta(f"job-{number}", number) for number in range(100)))
    for number in range(99):
        time.now += 1
        watches.delivered(FINE_TUNE_JOB, meta(f"job-{number}", number), deleted=False)
    assert watches.dead() == []


def test_one_lost_change_is_found_however_lively_the_watch_is(time: Time, watches: Watches) -> None:
    lists(watches, meta("lost", 1))
    for number in range(int(LATE_SECONDS) + 2):
        time.now += 1
        watches.delivered(FINE_TUNE_JOB, meta("other", number), deleted=False)
    assert watches.dead() == ["FineTuneJob"]


def test_a_deletion_that_was_missed_in_a_gap_is_no_reason_to_start_anew(time: Time, watches: Watches) -> None:
    watches.delivered(FINE_TUNE_JOB, meta("a", 5), deleted=False)
    lists(watches, meta("b", 6))
    watches.delivered(FINE_TUNE_JOB, meta("b", 6), deleted=False)
    time.now += 10_000
    assert watches.dead() == []
    assert watches.known(FINE_TUNE_JOB) == {"b"}


def test_an_object_that_is_deleted_before_the_watch_told_of_it_is_not_missed(time: Time, watches: Watches) -> None:
    lists(watches, meta("a", 5))
    lists(watches)
    time.now += 10_000
    assert watches.dead() == []


@pytest.mark.parametrize("known", [True, False], ids=["told of before", "new"])
def test_an_object_that_is_deleted_while_the_list_is_on_its_way_is_not_missed(
    time: Time, watches: Watches, known: bool
) -> None:
    if known:
        watches.delivered(FINE_TUNE_JOB, meta("a", 5), deleted=False)
    before = watches.known(FINE_TUNE_JOB)
    watches.delivered(FINE_TUNE_JOB, meta("a", 6), deleted=False)
    watches.delivered(FINE_TUNE_JOB, meta("a", 7), deleted=True)
    watches.compare(FINE_TUNE_JOB, before, [meta("a", 6), meta("b", 4)])
    watches.delivered(FINE_TUNE_JOB, meta("b", 4), deleted=False)
    time.now += 10_000
    assert watches.dead() == []
    lists(watches, meta("b", 4))
    assert watches.known(FINE_TUNE_JOB) == {"b"}


def test_an_object_that_comes_while_the_list_is_on_its_way_is_kept(watches: Watches) -> None:
    before = watches.known(FINE_TUNE_JOB)
    watches.delivered(FINE_TUNE_JOB, meta("new", 7), deleted=False)
    watches.compare(FINE_TUNE_JOB, before, [])
    assert watches.known(FINE_TUNE_JOB) == {"new"}


def test_kinds_are_told_apart(time: Time, watches: Watches) -> None:
    time.now += 60
    watches.compare(POD, frozenset(), [meta("p", 1)])
    watches.delivered(FINE_TUNE_JOB, meta("p", 1), deleted=False)
    time.now += QUIET_SECONDS + 1
    assert watches.dead() == ["Pod"]


async def test_it_is_ready_when_all_is_listed_and_somebody_answers_and_never_while_it_stops(watches: Watches) -> None:
    health = Health(watches)
    assert "listed" in health.unready()
    health.listed.set()
    assert "answer" in health.unready()
    health.reachable = True
    assert health.unready() == ""
    health.stopping = True
    assert "stopping" in health.unready()


async def test_an_api_server_that_does_not_answer_makes_it_unready_and_one_that_does_ready_again(
    watches: Watches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_operator.health.KNOCK_SECONDS", 0.01)
    health, answers, seen = Health(watches), [True], asyncio.Queue[bool]()
    health.listed.set()

    async def knock() -> None:
        seen.put_nowait(health.unready() == "")
        if not answers[0]:
            raise ClusterError("connection refused")

    async def until(ready: bool) -> None:
        while await seen.get() != ready:
            pass

    task = asyncio.create_task(health.knock_for_ever(knock))
    async with asyncio.timeout(30):
        await until(True)
        answers[0] = False
        await until(False)
        answers[0] = True
        await until(True)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_the_endpoints_say_what_is_wrong(time: Time, watches: Watches) -> None:
    health = Health(watches)
    async with TestClient(TestServer(application(Metrics(), health))) as client:
        assert (await client.get("/healthz")).status == 200
        answer = await client.get("/readyz")
        assert (answer.status, await answer.text()) == (503, "the jobs have not been listed yet\n")
        health.listed.set()
        health.reachable = True
        assert (await client.get("/readyz")).status == 200
        time.now += 60
        lists(watches, meta("a", 1))
        time.now += 60
        answer = await client.get("/healthz")
        assert answer.status == 503
        assert "FineTuneJob" in await answer.text()
