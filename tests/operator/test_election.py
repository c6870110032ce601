"""Leader election: one writer at a time, over a lease store in memory and with clocks that the tests move."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from finetune_operator.cluster.memory import MemoryCluster
from finetune_operator.cluster.port import LEASE, ClusterError, Key, Object
from finetune_operator.election import Elector, LeadershipLostError

KEY = Key("finetune-system", "finetune")
DURATION = 12
SECONDS_OF_LEAD = DURATION * 2 / 3


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Store:
    """Passes on to a store; may be cut off, or hang until the request's deadline."""

    def __init__(self, inner: MemoryCluster) -> None:
        self._inner = inner
        self.down = False

    def __getattr__(self, name: str) -> Callable[..., object]:
        if self.down:
            raise ClusterError("no route to host")
        method: Callable[..., object] = getattr(self._inner, name)
        return method


class Race:
    """Two replicas before one store."""

    def __init__(self) -> None:
        self.time = Time()
        self.store = MemoryCluster()
        self.links = [Store(self.store), Store(self.store)]
        self.a, self.b = (
            Elector(link, KEY, name, duration=DURATION, clock=self.time)
            for link, name in zip(self.links, "ab", strict=True)
        )

    async def run(self, seconds: float, *electors: Elector) -> None:
        """The replicas do a round each as often as they would; never do both lead."""
        end = self.time.now + seconds
        while self.time.now < end:
            for elector in electors:
                await elector.round()
                assert not (self.a.leads() and self.b.leads())
            self.time.now += 2

    async def lease(self) -> Object:
        found = await self.store.read(LEASE, KEY)
        assert found is not None
        spec: Object = found["spec"]
        return spec


async def test_the_first_leads_and_stays_leader_while_it_renews() -> None:
    race = Race()
    await race.run(100, race.a, race.b)
    assert (race.a.leads(), race.b.leads()) == (True, False)
    assert (await race.lease())["holderIdentity"] == "a"
    assert (await race.lease())["leaseTransitions"] == 0


async def test_when_the_leader_dies_the_other_takes_over_within_twenty_seconds() -> None:
    race = Race()
    await race.run(20, race.a, race.b)
    died = race.time.now
    while not race.b.leads():
        await race.run(2, race.b)
    assert race.time.now - died < 20
    assert (await race.lease())["holderIdentity"] == "b"
    assert (await race.lease())["leaseTransitions"] == 1


async def test_one_who_cannot_renew_stops_leading_before_another_begins() -> None:
    race = Race()
    await race.run(20, race.a, race.b)
    race.links[0].down = True
    lost_at = None
    while not race.b.leads():
        with contextlib.suppress(LeadershipLostError):
            await race.a.round()
        if not race.a.leads() and lost_at is None:
            lost_at = race.time.now
        await race.b.round()
        assert not (race.a.leads() and race.b.leads())
        race.time.now += 0.5
    assert lost_at is not None
    assert race.time.now - lost_at >= DURATION - SECONDS_OF_LEAD - 2


async def test_a_leader_that_cannot_renew_in_time_is_told_so_by_an_error() -> None:
    race = Race()
    await race.a.round()
    race.links[0].down = True
    race.time.now += SECONDS_OF_LEAD - 1
    assert await race.a.round()
    race.time.now += 2
    with pytest.raises(LeadershipLostError):
        await race.a.round()


async def test_a_leader_that_slept_may_not_write_when_it_wakes_up() -> None:
    race = Race()
    await race.run(10, race.a, race.b)
    race.time.now += 3600
    assert not race.a.leads()


async def test_a_short_outage_costs_nothing() -> None:
    race = Race()
    await race.run(10, race.a, race.b)
    race.links[0].down = True
    await race.run(4, race.a, race.b)
    race.links[0].down = False
    await race.run(10, race.a, race.b)
    assert race.a.leads()


async def test_one_who_finds_another_in_his_place_loses_at_once() -> None:
    race = Race()
    await race.a.round()
    patch = [{"op": "add", "path": "/spec/holderIdentity", "value": "b"}]
    await race.store.patch(LEASE, KEY, patch)
    with pytest.raises(LeadershipLostError):
        await race.a.round()
    assert not race.a.leads()


async def test_who_releases_hands_over_at_the_next_round() -> None:
    race = Race()
    await race.run(10, race.a, race.b)
    await race.a.release()
    assert not race.a.leads()
    await race.run(2, race.b)
    assert race.b.leads()


async def test_who_does_not_lead_releases_nothing() -> None:
    race = Race()
    await race.run(10, race.a, race.b)
    await race.b.release()
    assert (await race.lease())["holderIdentity"] == "a"


async def test_of_two_who_come_at_once_one_wins() -> None:
    race = Race()
    await asyncio.gather(race.a.round(), race.b.round())
    assert race.a.leads() != race.b.leads()


async def test_clocks_that_disagree_change_nothing() -> None:
    """What the record says of the time is for people; the replicas measure by their own clocks."""
    race = Race()
    await race.a.round()
    patch = [{"op": "add", "path": "/spec/renewTime", "value": "1999-01-01T00:00:00.000000Z"}]
    await race.store.patch(LEASE, KEY, patch)
    await race.b.round()
    assert not race.b.leads()


async def test_a_lease_that_somebody_deletes_is_made_anew() -> None:
    race = Race()
    await race.a.round()
    lease = await race.store.read(LEASE, KEY)
    assert lease is not None
    await race.store.delete(LEASE, KEY, lease["metadata"]["uid"])
    race.time.now += 2
    await race.a.round()
    assert race.a.leads()


async def test_an_answer_that_does_not_come_is_not_waited_for_beyond_a_third_of_the_duration() -> None:
    class Mute:
        async def read(self, *_: object) -> None:
            await asyncio.Event().wait()

    elector = Elector(Mute(), KEY, "a", duration=3, clock=Time())  # type: ignore[arg-type]
    async with asyncio.timeout(2):
        assert not await elector.round()
