"""One job through the whole control plane over the in-memory cluster."""

from __future__ import annotations

import json

from tests.operator.world import RESULT, World


async def test_a_job_goes_from_creation_to_success_with_the_trainers_result() -> None:
    world = World()
    await world.create()
    await world.settle()
    assert await world.phase() == ("Running", "Running")
    await world.end(0, json.dumps(RESULT))
    await world.settle()
    status = await world.status()
    assert (status["phase"], status["reason"]) == ("Succeeded", "Succeeded")
    assert status["message"] == "The adapter is at s3://out/tune/adapter after 40 steps, eval_loss 1.831"
    assert status["output"] == RESULT["result"]["output"]
    assert status["metrics"] == {"eval_loss": "1.831"}
    assert status["progress"]["steps"] == "40/40"
    assert status["completionTime"] == "2026-01-01T12:00:00Z"
    assert await world.conditions() == {
        "Valid": "True", "Scheduled": "True", "Running": "False", "Suspended": "False", "Complete": "True",
        "Failed": "False",
    }  # fmt: skip
