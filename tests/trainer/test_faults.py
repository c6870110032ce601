"""What clusters do to a gang in the middle of its work: afterwards the weights are those of an undisturbed run.

Two pods of one rank each, with real agents, workers, collectives and checkpoints. This file plays the operator: when a
pod has ended, it stops the others, waits until all are gone, and starts the next attempt.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_api.contract import ExitCode
from finetune_api.job import FineTuneJob
from finetune_api.run import Sharding
from finetune_trainer.progress import read_progress
from finetune_trainer.runtime import progress_file
from tests.support.jobs import a_job
from tests.support.processes import processes_in, wait_for
from tests.support.warm import WarmPod, WarmPods, warm_pods

pytestmark = pytest.mark.slow
STEPS, EVERY = 14, 2
JOBS, BLOWS = 10, 3
"""Thirty seeds: ten jobs of which each is disturbed three times."""
MOST_SECONDS = 45
"""From the end of one pod to the end of all, on a busy machine."""
Weights = dict[str, torch.Tensor]


def a_gang_job(root: Path) -> FineTuneJob:
    hyper = {"maxSteps": STEPS, "epochs": 100, "learningRate": 1e-3, "perDeviceBatchSize": 2, "dropout": 0.1}
    return a_job(
        root, "Full", "CausalLM", hyperparameters=hyper, checkpoint={"everySteps": EVERY},
        evaluation={"everySteps": 7, "samples": 0}, output={"weights": "Last"},
    )  # fmt: skip


class Operator:
    """Starts attempts at one job."""

    def __init__(self, pods: WarmPods, root: Path) -> None:
        self._pods, self.root = pods, root
        self.job = a_gang_job(root)
        self.attempt = 0

    def start(self, entry: str = "", **env: Any) -> list[WarmPod]:
        self.attempt += 1
        named = {"entry": f"tests.trainer.fault_entries:{entry}"} if entry else {}
        return self._pods.start(self.job, self.root / "pods", attempt=self.attempt, **named, **env)

    def see_it_end(self, pods: list[WarmPod], first: float = 120) -> list[int]:
        """The exit codes; pods whose peer has ended are stopped. Nothing may be left of any."""
        wait_for(lambda: any(pod.has_ended for pod in pods), first)
        for pod in pods:
            pod.signal(signal.SIGTERM)
        codes = [pod.exit_code(MOST_SECONDS) for pod in pods]
        wait_for(lambda: not processes_in(self.root / "pods"))
        return codes

    def finish(self) -> Weights:
        """Train to the end, undisturbed."""
        pods = self.start()
        codes = [pod.exit_code() for pod in pods]
        assert codes == [0, 0], "\n".join(pod.log[-3000:] for pod in pods)
        return load_file(self.root / "out/model/model.safetensors")

    def complete_steps(self) -> list[int]:
        manifests = (self.root / "out/checkpoints").glob("step-*/manifest.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in manifests)


@pytest.fixture(scope="module")
def pods() -> Iterator[WarmPods]:
    with warm_pods() as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(pods: WarmPods, tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, float]:
    """The weights, and the seconds that it took."""
    operator = Operator(pods, tmp_path_factory.mktemp("undisturbed"))
    begun = time.monotonic()
    return operator.finish(), time.monotonic() - begun


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("seed", range(JOBS))
def test_a_rank_that_is_killed_three_times_at_random_changes_no_weight(seed, pods, undisturbed, tmp_path):
    operator, dice = Operator(pods, tmp_path), random.Random(seed)
    for _ in range(BLOWS):
        rank, steps, delay = dice.randrange(2), dice.randint(1, 4), dice.uniform(0, 0.2)
        gang = operator.start("be_killed", TEST_RANK=rank, TEST_STEPS=steps, TEST_DELAY=delay)
        codes = operator.see_it_end(gang)
        # 75: its peer stopped it just before, or it waits for the request to stop.
        assert set(codes) <= {ExitCode.UNAVAILABLE, ExitCode.TEMPFAIL}, gang[rank].log[-3000:]
        assert "died by SIGKILL" in (gang[rank].folder / "termination-log").read_text()
    assert same(operator.finish(), undisturbed[0])


@pytest.mark.parametrize("seed", range(JOBS))
def test_sigterm_at_three_random_moments_changes_no_weight(seed, pods, undisturbed, tmp_path):
    operator, dice = Operator(pods, tmp_path), random.Random(100 + seed)
    for _ in range(BLOWS):
        gang = operator.start()
        moment, rank = dice.uniform(0, undisturbed[1] * 0.9), dice.randrange(2)
        until = time.monotonic() + moment
        wait_for(lambda until=until: time.monotonic() >= until, moment + 1)
        before = max(operator.complete_steps(), default=0)
        gang[rank].signal(signal.SIGTERM)
        codes = operator.see_it_end(gang, first=MOST_SECONDS)
        if codes == [0, 0]:
            break
        orderly, logs = {ExitCode.TEMPFAIL, ExitCode.OK}, "\n".join(pod.log[-3000:] for pod in gang)
        assert codes[rank] in orderly, logs
        # Its peer may find a collective broken before it hears of the request, and says so: that charges nobody.
        assert codes[1 - rank] in {*orderly, ExitCode.UNAVAILABLE}, logs
        assert max(operator.complete_steps(), default=0) >= before
    assert same(operator.finish(), undisturbed[0])


STAGES = ("Downloading", "Preparing", "Loading", "Training", "Evaluating", "Uploading", "Exporting")


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_to_one_pod_stops_the_gang_in_stage(stage, pods, undisturbed, tmp_path):
    operator = Operator(pods, tmp_path)
    # What is delivered is rank 0's work alone.
    rank = 0 if stage in ("Exporting", "Uploading") else 1
    gang = operator.start("stop_in_stage", TEST_RANK=rank, TEST_STAGE=stage)
    codes = operator.see_it_end(gang)
    assert codes[rank] == ExitCode.TEMPFAIL, "\n".join(pod.log[-3000:] for pod in gang)
    # Rank 1 is done when rank 0 delivers, but its pod must not end with 0: it would not be started again.
    assert codes[1 - rank] in (ExitCode.TEMPFAIL, ExitCode.UNAVAILABLE)
    assert same(operator.finish(), undisturbed[0])


def test_a_hung_upload_is_no_sign_of_life(pods, tmp_path):
    operator = Operator(pods, tmp_path)
    operator.job.spec.run_policy.stall_timeout_seconds = 10
    # A volume whose server is gone: the call that opens the file does not return.
    file = tmp_path / f"out/checkpoints/step-{EVERY:08d}/.trainable.safetensors.part"
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    (pod,) = operator.start(nodes=1)
    assert pod.exit_code() == ExitCode.STALLED
    assert "called by wait (delivery.py" in (pod.folder / "termination-log").read_text()
    assert not operator.complete_steps()


def test_a_slow_rank_holds_its_peers_up_and_changes_nothing(pods, undisturbed, tmp_path):
    operator = Operator(pods, tmp_path)
    gang = operator.start("be_slow", TEST_RANK=1)
    wait_for(operator.complete_steps, 60)
    gang[0].signal(signal.SIGTERM)
    assert operator.see_it_end(gang) == [ExitCode.TEMPFAIL] * 2
    progress = read_progress(progress_file(gang[0].folder / "scratch"))
    assert progress is not None
    assert progress.sharding is Sharding.DDP, "what Auto has come to, for advice"
    # Both left at the same step, the slow one's: nothing but whole steps was saved.
    assert same(operator.finish(), undisturbed[0])
