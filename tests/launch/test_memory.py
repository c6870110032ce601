"""Memory that is exhausted on several ranks is told once, with what helps."""

from __future__ import annotations

import time

import pytest

from finetune_api.contract import Cause, ExitCode
from tests.launch.conftest import StartPod


def test_accelerators_that_are_exhausted_on_all_ranks_are_told_once_with_the_jobs_numbers(start_pod: StartPod) -> None:
    pod = start_pod("exhausted:exhaust_every_accelerator", PET_NPROC_PER_NODE=2)
    assert pod.exit_code() == ExitCode.OUT_OF_MEMORY
    message = pod.message
    assert (message.cause, message.rank) == (Cause.OUT_OF_MEMORY, 0)
    assert message.message.startswith("the accelerator's memory is exhausted: CUDA out of memory. Tried to allocate 2")
    assert "perDeviceBatchSize to 2 (now 4)" in message.advice
    for rank in range(2):
        assert '"exitCode":79' in (pod.folder / f"scratch/causes/rank-{rank}.json").read_text()
    assert pod.output.count("advice: ") == 1


def test_the_hosts_memory_is_told_apart_and_the_rank_that_ran_out_is_named(start_pod: StartPod) -> None:
    pod = start_pod("exhausted:exhaust_the_hosts_memory_of_one", PET_NPROC_PER_NODE=2)
    assert pod.exit_code() == ExitCode.OUT_OF_MEMORY
    assert pod.message.rank == 1
    assert "the pod's memory is exhausted" in pod.message.message
    assert "resources.memory" in pod.message.advice


@pytest.mark.slow
def test_a_rank_that_hangs_for_one_whose_memory_is_exhausted_is_ended_within_seconds(start_pod: StartPod) -> None:
    """pytorch/pytorch#97191 and flyteorg/flyte-sdk#698: one rank ran out of memory, the others held their GPUs on."""
    pod = start_pod("exhausted:exhaust_one_accelerator_beside_a_rank_that_hangs", PET_NPROC_PER_NODE=2)
    pod.line("CUDA out of memory")
    died = time.monotonic()
    assert pod.exit_code() == ExitCode.OUT_OF_MEMORY
    assert time.monotonic() - died < 15
    assert (pod.message.cause, pod.message.rank) == (Cause.OUT_OF_MEMORY, 1)
