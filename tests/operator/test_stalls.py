"""Standstills: what the pod's agent says, what the operator sees when that is dead too, and what it cannot know."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_api.contract import Progress, Stage
from finetune_api.status import ConditionType, FineTuneJobStatus, Phase, Restarts
from finetune_operator.lifecycle import Decision, decide
from finetune_operator.observed import Observed
from tests.operator.test_lifecycle import NOW, SETTINGS, pod, running, workload
from tests.operator.world import World

LIMIT = 1800


def a_progress(age: float = 0.0, **fields: Any) -> Progress:
    return Progress(stage=Stage.TRAINING, step=40, total_steps=100, heartbeat_age_seconds=age, **fields)


def look(what: Any, progress: Progress | None, silence: float = 0.0) -> Decision:
    return decide(what, Observed(workload=workload(), pods=(pod(),), progress=progress, silence=silence), NOW, SETTINGS)


def stalled(status: FineTuneJobStatus) -> str:
    return next(item.status for item in status.conditions if item.type is ConditionType.STALLED)


@pytest.mark.parametrize(("age", "ends"), [(LIMIT + 1, False), (LIMIT * 1.5 + 1, True)])
def test_the_pods_own_agent_gets_time_before_the_operator_ends_a_standstill(age: float, ends: bool) -> None:
    decision = look(running(), a_progress(age))
    assert (decision.status.incident is not None) == ends
    assert stalled(decision.status) == ("True" if ends else "False")
    if ends:
        assert decision.status.phase is Phase.RESTARTING
        assert "no progress for 45m1s in stage Training at step 40" in (decision.status.message or "")


def test_what_an_earlier_attempt_said_does_not_count() -> None:
    assert look(running(), a_progress(LIMIT * 9, attempt=7)).status.incident is None


def test_a_standstill_is_counted_on_its_own_and_paid_by_the_budget_for_infrastructure() -> None:
    used = Restarts(total=2, infrastructure=1, stalled=1)
    within = look(running(restarts=used), a_progress(LIMIT * 9)).status
    assert within.restarts == Restarts(total=3, infrastructure=1, stalled=2)
    spent = look(running(restarts=within.restarts), a_progress(LIMIT * 9)).status
    assert spent.incident is not None
    assert not spent.incident.retry
    assert spent.restarts == within.restarts


def test_a_pod_that_does_not_answer_is_not_called_stalled_however_long_it_is_silent() -> None:
    status = look(running(), a_progress(LIMIT * 9), silence=LIMIT * 9).status
    assert (status.phase, status.reason, stalled(status)) == (Phase.RUNNING, "Unreachable", "Unknown")
    assert "not known whether it makes progress" in (status.message or "")
    assert status.incident is None


def test_silence_is_told_after_two_minutes_and_over_with_the_first_answer() -> None:
    quiet = look(running(), a_progress(5), silence=119)
    assert quiet.status.reason == "Training"
    silent = look(running(), a_progress(5), silence=120).status
    again = look(running(**dict(silent) | {"nodes": 1}), a_progress(1)).status
    assert (again.reason, stalled(again)) == ("Training", "False")


def test_a_new_operator_that_has_not_asked_yet_says_what_the_old_one_knew() -> None:
    silent = look(running(), None, silence=500).status
    assert stalled(look(running(**dict(silent) | {"nodes": 1}), None, silence=3).status) == "Unknown"
    assert stalled(look(running(), None, silence=3).status) == "False"


def test_the_pod_with_the_culprit_speaks_before_one_whose_ranks_waited() -> None:
    def ended(index: int, message: str) -> Any:
        made = pod(index, code=81, state="ended")
        made["status"]["containerStatuses"][0]["state"]["terminated"]["message"] = message
        return made

    waited = ended(0, '{"exitCode": 81, "message": "all wait"}')
    culprit = ended(1, '{"exitCode": 81, "message": "rank 5 hangs in get (queue.py:171)", "rank": 5}')
    what = replace(Observed(), workload=workload(), pods=(waited, culprit))
    status = decide(running(), what, NOW, SETTINGS).status
    assert status.incident is not None
    assert (status.incident.cause, status.incident.message) == ("Stalled", "rank 5 hangs in get (queue.py:171)")
    assert status.restarts.stalled == 1


async def test_a_trainer_that_stands_still_is_started_again_whichever_operator_looks() -> None:
    world = World()
    await world.create(runPolicy={"stallTimeoutSeconds": 60})
    await world.settle()
    world.progress = a_progress(10)
    world.clock.forward(15)
    await world.settle()
    assert (await world.conditions())["Stalled"] == "False"
    world.engine = world.operator(world.cluster)
    world.progress = a_progress(130)
    await world.settle()
    world.clock.forward(15)
    await world.settle()
    status = await world.status()
    assert status["restarts"]["stalled"] == 1
    assert status["attempt"] == 2
    assert any(reason == "Restarting" and "Stalled: Rank 0" in text for reason, text in await world.events())
    world.progress = a_progress(1, attempt=2)
    world.clock.forward(45)
    await world.settle()
    assert await world.phase() == ("Running", "Training")
    assert (await world.conditions())["Stalled"] == "False"
