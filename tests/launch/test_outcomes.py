"""How a pod ends: exit code and termination message, by what its worker did."""

from __future__ import annotations

import re
import socket

import pytest

from finetune_api import contract
from finetune_api.contract import Cause, ExitCode
from tests.launch.conftest import StartPod
from tests.support.gangs import fresh_address


def test_success_is_told_with_the_result_but_without_its_samples(start_pod: StartPod) -> None:
    pod = start_pod("succeed", FINETUNE_ATTEMPT=3)
    assert pod.exit_code() == ExitCode.OK
    message = pod.message
    assert (message.exit_code, message.cause, message.attempt, message.step) == (0, None, 3, 12)
    assert message.result is not None
    assert message.result.job == "tiny"
    assert message.result.output.uri == "s3://models/out/adapter"
    assert message.result.metrics == {"eval_loss": 1.25}
    assert message.result.samples == []


def test_a_lone_rank_sees_no_process_group_in_its_environment(start_pod: StartPod) -> None:
    pod = start_pod("print_environment", RANK=1, LOCAL_RANK=1, WORLD_SIZE=2, MASTER_ADDR="elsewhere")
    assert pod.exit_code() == ExitCode.OK
    assert pod.line("seen").endswith(
        "seen 0/1 on node 0: RANK=None LOCAL_RANK=None WORLD_SIZE=None MASTER_ADDR=None MASTER_PORT=None"
    )


def test_success_without_a_result_is_a_failure(start_pod: StartPod) -> None:
    pod = start_pod("forget_the_result")
    assert pod.exit_code() == ExitCode.SOFTWARE
    assert "left no result" in pod.message.message


UNDERSTOOD = {
    "UsageError": (ExitCode.USAGE, Cause.USAGE),
    "DataError": (ExitCode.DATA, Cause.DATA),
    "UnavailableError": (ExitCode.UNAVAILABLE, Cause.INFRASTRUCTURE),
    "PermissionRefusedError": (ExitCode.NOPERM, Cause.PERMISSION),
    "OutOfMemoryError": (ExitCode.OUT_OF_MEMORY, Cause.OUT_OF_MEMORY),
    "DivergedError": (ExitCode.DIVERGED, Cause.DIVERGED),
    "StoppedError": (ExitCode.TEMPFAIL, Cause.DISRUPTION),
}


def test_an_understood_error_keeps_its_code_its_words_and_what_was_reached(start_pod: StartPod) -> None:
    pods = {error: start_pod("fail_with", TEST_ERROR=error) for error in UNDERSTOOD}
    for error, (code, cause) in UNDERSTOOD.items():
        assert pods[error].exit_code() == code
        message = pods[error].message
        assert (message.exit_code, message.cause, message.rank) == (code, cause, 0)
        assert message.message == "rows.jsonl:3 has no answer"
        assert message.advice == "add an answer, or set dataset.onInvalidRow to Drop"
        assert message.step == 7
        assert message.checkpoint is not None
        assert message.checkpoint.step == 5


def test_an_unexpected_exception_is_named_with_its_place(start_pod: StartPod) -> None:
    pod = start_pod("crash")
    assert pod.exit_code() == ExitCode.SOFTWARE
    assert re.fullmatch(r"ZeroDivisionError: division by zero \(in _divide, entries.py:\d+\)", pod.message.message)
    assert "return one / other" in pod.output
    saved = pod.folder / "scratch" / "causes" / "rank-0.traceback"
    assert "ZeroDivisionError" in saved.read_text()


def test_a_full_disk_is_called_a_full_disk(start_pod: StartPod) -> None:
    pod = start_pod("fill_the_disk")
    assert pod.exit_code() == ExitCode.UNAVAILABLE
    assert pod.message.message.startswith("the disk is full (in fill_the_disk, entries.py:")
    assert "resources.scratch" in pod.message.advice


SPEECHLESS = {
    "be_killed": (ExitCode.UNAVAILABLE, "a worker died by SIGKILL", "resources.memory"),
    "segfault": (ExitCode.SOFTWARE, "a worker died by SIGSEGV", "native library"),
    "exit_without_a_word": (ExitCode.SOFTWARE, "exited with code 41 and left no cause", "log"),
    "exit_by_itself": (ExitCode.SOFTWARE, "exited by itself with 3", ""),
}


def test_a_worker_that_cannot_speak_is_described_by_its_end(start_pod: StartPod) -> None:
    pods = {entry: start_pod(entry) for entry in SPEECHLESS}
    for entry, (code, words, advice) in SPEECHLESS.items():
        assert pods[entry].exit_code() == code
        assert words in pods[entry].message.message
        assert advice in pods[entry].message.advice


def test_an_entry_point_that_cannot_be_imported_is_a_failure_of_the_program(start_pod: StartPod) -> None:
    pod = start_pod("does_not_exist")
    assert pod.exit_code() == ExitCode.SOFTWARE
    assert "does_not_exist" in pod.message.message


def test_a_job_that_does_not_match_the_api_is_refused_by_field(start_pod: StartPod) -> None:
    pod = start_pod("succeed", FINETUNE_JOB_FILE="/dev/null")
    assert pod.exit_code() == ExitCode.USAGE
    assert pod.message.message.startswith("/dev/null is not JSON")


def test_a_missing_job_names_the_file_and_the_way_out(start_pod: StartPod) -> None:
    pod = start_pod("succeed", FINETUNE_JOB_FILE="/nowhere/job.json")
    assert pod.exit_code() == ExitCode.USAGE
    assert "/nowhere/job.json" in pod.message.message
    assert contract.ENV_JOB_FILE in pod.message.advice


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PET_NPROC_PER_NODE": "many"}, "PET_NPROC_PER_NODE is 'many'"),
        ({"PET_NNODES": "2"}, "PET_NODE_RANK and PET_MASTER_ADDR must be set"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "x"}, "PET_NODE_RANK is 2, but PET_NNODES is 2"),
    ],
)
def test_a_wrong_environment_is_named_by_its_variable(
    start_pod: StartPod, environment: dict[str, str], words: str
) -> None:
    pod = start_pod("succeed", **environment)
    assert pod.exit_code() == ExitCode.USAGE
    assert words in pod.message.message


def test_a_port_in_use_is_named(start_pod: StartPod) -> None:
    address = fresh_address()
    with socket.create_server((address, contract.RENDEZVOUS_PORT)):
        pod = start_pod("never_stop", address=address, PET_NNODES=2, PET_NODE_RANK=0, PET_MASTER_ADDR=address)
        assert pod.exit_code() == ExitCode.UNAVAILABLE
    assert f"cannot listen on {address}:{contract.RENDEZVOUS_PORT}" in pod.message.message


def test_a_name_that_does_not_resolve_is_given_up_after_a_while(start_pod: StartPod) -> None:
    pod = start_pod("never_stop", patience=0.5, PET_NNODES=2, PET_NODE_RANK=1, PET_MASTER_ADDR="nobody.invalid")
    assert pod.exit_code() == ExitCode.UNAVAILABLE
    assert "nobody.invalid" in pod.message.message
    assert "does not resolve" in pod.message.message
