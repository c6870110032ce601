"""The keyed queue, with a clock that the test moves."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from finetune_operator.cluster.port import Key
from finetune_operator.queue import Backoff, KeyedQueue, Line, run_worker

A, B = Key("ml", "a"), Key("ml", "b")


class Ticks:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def queue(ticks: Ticks) -> KeyedQueue:
    return KeyedQueue(Backoff(1.0, 60.0, random.Random(7)), ticks)


def test_a_key_that_is_put_twice_is_worked_on_once(queue: KeyedQueue) -> None:
    queue.put(A)
    queue.put(A)
    assert (queue.take(), queue.take()) == (A, None)


def test_keys_come_in_the_order_in_which_they_were_put(queue: KeyedQueue) -> None:
    queue.put(B)
    queue.put(A)
    assert (queue.take(), queue.take()) == (B, A)


def test_what_has_changed_comes_before_what_is_new_and_that_before_what_has_time_and_yet_each_has_its_turn(
    queue: KeyedQueue,
) -> None:
    calm, new, changed = ([Key("ml", f"{what}-{number}") for number in range(14)] for what in ("calm", "new", "gone"))
    for line, keys in ((Line.CALM, calm), (Line.NEW, new), (Line.CHANGED, changed)):
        for key in keys:
            queue.put(key, line)
    assert len(queue) == 3 * 14
    taken = [queue.take() for _ in range(16)]
    assert taken == [*changed[:3], new[0], *changed[3:6], new[1], *changed[6:9], new[2], *changed[9:12], calm[0]]
    rest = [queue.take() for _ in range(3 * 14 - 16)]
    assert set(taken + rest) == {*calm, *new, *changed}
    assert queue.take() is None


def test_a_turn_for_new_keys_goes_to_what_has_changed_where_none_is_new(queue: KeyedQueue) -> None:
    queue.put(A, Line.CALM)
    changed = [Key("ml", f"changed-{number}") for number in range(16)]
    for key in changed:
        queue.put(key, Line.CHANGED)
    assert [queue.take() for _ in range(17)] == [*changed[:15], A, changed[15]]


def test_of_two_lines_a_key_waits_in_the_one_that_is_served_first(queue: KeyedQueue) -> None:
    for key in (A, B):
        queue.put(key, Line.CALM)
    queue.put(B, Line.CHANGED)
    queue.put(B, Line.NEW)
    assert (queue.take(), queue.take(), queue.take()) == (B, A, None)
    # The same for a key in work, which waits until it is given back.
    for line in (Line.CALM, Line.CHANGED, Line.NEW):
        queue.put(A, line)
    queue.put(Key("ml", "new"))
    queue.done(A)
    assert queue.take() == A


@pytest.mark.parametrize("line", Line)
def test_a_key_in_work_is_never_given_to_a_second_worker_but_comes_again(queue: KeyedQueue, line: Line) -> None:
    queue.put(A, line)
    assert queue.take() == A
    queue.put(A, line)
    assert queue.take() is None
    queue.done(A)
    assert queue.take() == A


def test_a_delayed_key_is_ready_in_time_and_the_earlier_time_holds(queue: KeyedQueue, ticks: Ticks) -> None:
    queue.put_after(A, 30)
    queue.put_after(A, 10)
    queue.put_after(A, 20)
    assert queue.next_due() == 10
    ticks.now += 9
    assert queue.take() is None
    ticks.now += 1
    assert queue.take() == A
    queue.done(A)
    ticks.now += 100
    assert queue.take() is None


def test_a_key_that_is_put_now_is_not_repeated_later(queue: KeyedQueue, ticks: Ticks) -> None:
    queue.put_after(A, 10)
    queue.put(A)
    assert queue.take() == A
    queue.done(A)
    ticks.now += 20
    assert queue.take() is None


def test_failures_back_off_doubling_up_to_the_cap_with_jitter(queue: KeyedQueue, ticks: Ticks) -> None:
    delays = []
    for _ in range(12):
        queue.put(A)
        assert queue.take() == A
        delays.append(queue.fail(A))
    for number, delay in enumerate(delays):
        full = min(60.0, 2.0**number)
        assert full / 2 <= delay <= full
    assert len(set(delays)) == 12


def test_a_success_forgets_the_failures(queue: KeyedQueue) -> None:
    for _ in range(5):
        queue.put(A)
        queue.take()
        queue.fail(A)
    queue.put(A)
    queue.take()
    queue.done(A)
    queue.put(A)
    queue.take()
    assert queue.fail(A) <= 1.0


def test_back_off_of_thousands_of_failures_does_not_overflow() -> None:
    assert Backoff(1.0, 300.0, random.Random(1)).delay(100_000) <= 300.0


async def test_workers_share_the_keys_and_never_one_key(queue: KeyedQueue) -> None:
    active: set[Key] = set()
    done: list[Key] = []
    finished = asyncio.Event()

    async def work(key: Key) -> None:
        assert key not in active
        active.add(key)
        await asyncio.sleep(0)
        active.discard(key)
        done.append(key)
        if len(done) < 100:
            queue.put(Key("ml", f"k{len(done) % 5}"))
        else:
            finished.set()

    workers = [asyncio.create_task(run_worker(queue, work)) for _ in range(4)]
    for number in range(5):
        queue.put(Key("ml", f"k{number}"))
    await asyncio.wait_for(finished.wait(), 10)
    await cancelled(workers)


async def test_an_error_with_one_key_ends_no_worker_and_the_key_comes_again(queue: KeyedQueue, ticks: Ticks) -> None:
    seen: list[Key] = []
    twice = asyncio.Event()

    async def work(key: Key) -> None:
        seen.append(key)
        if seen.count(A) == 1 and key == A:
            raise RuntimeError("boom")
        if seen.count(A) == 2:
            twice.set()

    workers = [asyncio.create_task(run_worker(queue, work))]
    queue.put(A)
    queue.put(B)
    for _ in range(10):
        await asyncio.sleep(0)
    assert seen == [A, B]
    ticks.now += 2
    queue.put(B)
    await asyncio.wait_for(twice.wait(), 10)
    await cancelled(workers)


async def cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
