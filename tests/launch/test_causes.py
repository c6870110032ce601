"""From ends and exceptions to the one cause: tables."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest
import torch

from finetune_api.contract import ExitCode
from finetune_api.defaults import resolve
from finetune_api.job import FineTuneJob
from finetune_api.run import Sharding
from finetune_trainer.causes import (
    CAUSE_FILE_BYTES,
    CauseRecord,
    Kind,
    WorkerEnd,
    cause_file,
    read_cause,
    reserve_cause_file,
    root_cause,
    write_cause,
)
from finetune_trainer.diagnosis import PeersLostError, classify
from finetune_trainer.errors import DataError, StoppedError, UnavailableError
from finetune_trainer.memory import memory_limit, oom_kills
from finetune_trainer.progress import Reporter
from finetune_trainer.runtime import Pod
from finetune_trainer.worker import record_end
from tests.launch.conftest import JOB
from tests.support.jobs import a_job


def end(rank: int, error: BaseException) -> WorkerEnd:
    record = classify(error)
    return WorkerEnd(rank=rank, exit_code=record.exit_code, record=record)


def find(*ends: WorkerEnd, stopping: bool = False, oom: int | None = 0, world_size: int = 4) -> CauseRecord:
    cause = root_cause(ends, world_size=world_size, stopping=stopping, oom_kills=oom)
    assert cause is not None
    return cause


BROKEN = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711")
KILLED = WorkerEnd(rank=2, exit_code=-signal.SIGKILL)


@pytest.mark.parametrize(
    ("ends", "rank", "code"),
    [
        ([end(0, BROKEN), end(1, DataError("row 3"))], 1, ExitCode.DATA),
        ([end(0, BROKEN), KILLED], 2, ExitCode.UNAVAILABLE),
        ([KILLED, end(3, ValueError("x"))], 3, ExitCode.SOFTWARE),
        ([end(0, ValueError("x")), end(3, DataError("row 3"))], 3, ExitCode.DATA),
        ([end(1, StoppedError("saved")), end(0, BROKEN)], 1, ExitCode.TEMPFAIL),
        ([end(1, StoppedError("saved")), end(0, UnavailableError("bucket is gone"))], 0, ExitCode.UNAVAILABLE),
        ([end(3, DataError("row 3")), end(1, DataError("row 1"))], 1, ExitCode.DATA),
    ],
)
def test_the_cause_wins_over_its_effects(ends: list[WorkerEnd], rank: int, code: int) -> None:
    cause = find(*ends)
    assert (cause.rank, cause.exit_code) == (rank, code)


def test_nothing_is_wrong_where_all_ended_with_0() -> None:
    assert root_cause([WorkerEnd(0, 0), WorkerEnd(1, 0)], world_size=2, stopping=False, oom_kills=0) is None


def test_peers_that_went_first_on_request_are_no_failure() -> None:
    assert find(end(0, BROKEN), stopping=True).exit_code == ExitCode.TEMPFAIL


def test_the_out_of_memory_killer_is_named_where_the_kernel_counted_it() -> None:
    assert find(KILLED, oom=1).exit_code == ExitCode.OUT_OF_MEMORY
    assert "resources.memory" in find(KILLED, oom=1).advice
    assert find(KILLED, oom=None).exit_code == ExitCode.UNAVAILABLE


def test_an_abort_among_many_ranks_is_a_lost_peer_and_alone_is_a_crash() -> None:
    aborted = WorkerEnd(rank=0, exit_code=-signal.SIGABRT)
    assert find(aborted).kind is Kind.BROKEN
    assert find(aborted, world_size=1).exit_code == ExitCode.SOFTWARE


def test_a_worker_that_the_agent_killed_does_not_hide_the_culprit() -> None:
    killed = WorkerEnd(rank=0, exit_code=-signal.SIGKILL, killed_by_agent=True)
    assert find(killed, end(1, DataError("row 3"))).rank == 1


@pytest.mark.parametrize(
    ("error", "code", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 79, Kind.OWN, "accelerator's memory"),
        (RuntimeError("CUDA error: out of memory"), 79, Kind.OWN, "accelerator's memory"),
        (MemoryError(), 79, Kind.OWN, "pod's memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 79, Kind.OWN, "pod's memory"),
        (BROKEN, 69, Kind.BROKEN, "peer"),
        (torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp"), 69, Kind.BROKEN, "peer"),
        (torch.distributed.DistNetworkError("failed to recv"), 69, Kind.BROKEN, "peer"),
        (PeersLostError("stale"), 69, Kind.BROKEN, "stale"),
        (ConnectionRefusedError(111, "refused"), 69, Kind.OWN, "did not answer"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/model.bin"), 69, Kind.OWN, "writing /tmp/model.bin"),
        (RuntimeError("Error while serializing: No space left on device (os error 28)"), 69, Kind.OWN, "disk is full"),
        (KeyboardInterrupt(), 75, Kind.STOPPED, "interrupted"),
        (KeyError("labels"), 70, Kind.OWN, "KeyError: 'labels'"),
    ],
)  # fmt: skip
def test_an_exception_is_told_by_what_it_means(error: BaseException, code: int, kind: Kind, words: str) -> None:
    record = classify(error)
    assert (record.exit_code, record.kind) == (code, kind)
    assert words in record.message


def test_an_understood_error_inside_a_librarys_error_is_found() -> None:
    wrapped = RuntimeError("map failed")
    wrapped.__cause__ = DataError("row 3 is empty")
    assert classify(wrapped).message == "row 3 is empty"


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        (
            {"perDeviceBatchSize": 4, "gradientAccumulationSteps": 4},
            "perDeviceBatchSize to 2 (now 4) and gradientAccumulationSteps to 8 (now 4)",
        ),
        ({"perDeviceBatchSize": 1, "gradientCheckpointing": False}, "gradientCheckpointing to true"),
        ({"perDeviceBatchSize": 1, "gradientCheckpointing": True}, "use strategy QLoRA"),
    ],
)
def test_advice_on_memory_has_the_jobs_own_numbers(values: dict[str, object], advice: str) -> None:
    job = FineTuneJob.from_wire(
        {**JOB, "spec": {**JOB["spec"], "output": {"uri": "s3://b/o"}, "hyperparameters": values}}
    )
    record = classify(torch.OutOfMemoryError("CUDA out of memory"), resolve(job))
    assert advice in record.advice


@pytest.mark.parametrize(
    ("values", "sharding", "advice"),
    [
        ({"perDeviceBatchSize": 1}, None, "set distributed.sharding to FSDP"),
        ({"perDeviceBatchSize": 1}, Sharding.FSDP, "use strategy QLoRA"),
        ({"perDeviceBatchSize": 4, "gradientAccumulationSteps": 50_000}, None, "set distributed.sharding to FSDP"),
    ],
)
def test_the_end_of_a_worker_is_written_down_with_advice_about_the_job_as_it_runs(
    values: dict[str, int], sharding: Sharding | None, advice: str, tmp_path: Path
) -> None:
    job = a_job(tmp_path, hyperparameters={**values, "gradientCheckpointing": True}, resources={"processesPerNode": 2})
    pod = Pod(tmp_path / "job.json", tmp_path, 1, 1, 2, 0, "127.0.0.1", None, "127.0.0.1", 30)
    pod.job_file.write_text(job.model_dump_json(by_alias=True, exclude_none=True))
    reserve_cause_file(cause_file(tmp_path, 1))
    reporter = Reporter()
    reporter.update(sharding=sharding)
    assert record_end(torch.OutOfMemoryError("CUDA out of memory"), pod, 1, reporter) == ExitCode.OUT_OF_MEMORY
    record = read_cause(cause_file(tmp_path, 1))
    assert record is not None
    assert record.advice.startswith(advice)


def test_a_cause_fits_the_room_that_was_reserved_for_it(tmp_path: Path) -> None:
    file = tmp_path / "causes" / "rank-0.json"
    reserve_cause_file(file)
    assert read_cause(file) is None
    write_cause(file, CauseRecord(kind=Kind.OWN, exit_code=70, message="é" * 9000, traceback="\x01" * 90_000))
    assert file.stat().st_size == CAUSE_FILE_BYTES
    record = read_cause(file)
    assert record is not None
    assert record.message == "é" * 2000


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("memory.events", ""),
        ("pods/a/memory.events", "0::/pods/a\n"),
        ("memory/pods/a/memory.oom_control", "4:memory:/pods/a\n"),
    ],
)
def test_the_kernels_count_is_found_in_both_versions_of_cgroups(tmp_path: Path, file: str, own: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("low 0\noom 3\noom_kill 2\n")
    (tmp_path / "own").write_text(own)
    assert oom_kills(tmp_path, tmp_path / "own") == 2


def test_without_a_count_there_is_no_evidence(tmp_path: Path) -> None:
    assert oom_kills(tmp_path, tmp_path / "own") is None


def test_the_memory_of_a_container_is_its_limit(tmp_path: Path) -> None:
    whole = memory_limit(tmp_path)
    assert whole > 10**9
    (tmp_path / "memory.max").write_text("123456789\n")
    assert memory_limit(tmp_path) == 123456789
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) == whole
