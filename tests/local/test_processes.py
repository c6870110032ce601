"""Pods of the local adaptor are processes with the environment, files, address and end that a container would have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.local.jobs import fine_tune_job
from tests.support.processes import is_alive, wait_for

from finetune_api.job import FineTuneJob
from finetune_operator.cluster.job_rules import pod_of
from finetune_operator.cluster.kubelet import Exit, StartError
from finetune_operator.cluster.local.environment import address_of
from finetune_operator.cluster.local.runtime import ProcessRuntime, newest_log
from finetune_operator.cluster.port import Key, Object
from finetune_operator.plan import plan
from finetune_operator.settings import Settings

SHOW_ENVIRONMENT = "import json, os; json.dump(dict(os.environ), open('environment', 'w'))"
WAIT = "import signal, time; open('up', 'w').close(); time.sleep(1000)"
SAVE_ON_SIGTERM = """
import os, signal, time
def stop(*_): open(os.environ["FINETUNE_TERMINATION_LOG"], "w").write("saved"); os._exit(75)
signal.signal(signal.SIGTERM, stop)
open("up", "w").close()
time.sleep(1000)
"""
IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAIT
START_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
open("child", "w").write(str(child.pid))
open("up", "w").close()
"""


class World:
    """A runtime and the pods of one job."""

    def __init__(self, folder: Path, **spec: Any) -> None:
        self.folder = folder
        job = FineTuneJob.from_wire(fine_tune_job(folder, **spec))
        job.metadata.uid = "uid-of-the-job"
        self.manifests = plan(job, Settings())
        self.workload = {**self.manifests.workload}
        self.workload["metadata"] = {**self.workload["metadata"], "uid": "uid-of-the-workload"}
        self.time = 0.0

    def pod(self, index: int = 0) -> Object:
        pod = pod_of(self.workload, index, 0, "abcde")
        pod["metadata"]["uid"] = f"uid-of-pod-{index}"
        return pod

    def runtime(self, program: str, **options: Any) -> ProcessRuntime:
        def config_map(key: Key) -> Object | None:
            found = self.manifests.config_map
            return found if key.name == found["metadata"]["name"] else None

        return ProcessRuntime(
            self.folder / "pods",
            self.folder / "claims",
            config_map,
            overrides=options.pop("overrides", {}),
            program=("-c", program),
            clock=lambda: self.time,
            **options,
        )

    def file(self, name: str, index: int = 0) -> Path:
        return self.folder / "pods" / f"tune-{index}-abcde" / name

    def environment(self, index: int = 0) -> dict[str, str]:
        found: dict[str, str] = json.loads(self.file("environment", index).read_text())
        return found


def end_of(runtime: ProcessRuntime, pod: Object) -> Exit:
    found: Exit = wait_for(lambda: runtime.poll(pod))
    return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def started(world: World) -> Iterator[Callable[[str], tuple[ProcessRuntime, Object]]]:
    """Starts index 0 with a program that writes the file `up`; what is left is killed afterwards."""
    runtimes = []

    def start(program: str) -> tuple[ProcessRuntime, Object]:
        runtime, pod = world.runtime(program), world.pod()
        runtimes.append(runtime)
        runtime.start(pod)
        wait_for(world.file("up").exists)
        return runtime, pod

    yield start
    for runtime in runtimes:
        runtime.kill_all()


def run(world: World, program: str = SHOW_ENVIRONMENT, **options: Any) -> Exit:
    runtime, pod = world.runtime(program, **options), world.pod()
    runtime.start(pod)
    return end_of(runtime, pod)


# --- environment -----------------------------------------------------------------------------------------------------


def test_a_pod_gets_the_values_and_downward_fields_of_its_spec(world: World) -> None:
    assert run(world) == Exit(0)
    found = world.environment()
    assert found["PET_NNODES"] == "1"
    assert found["PET_NODE_RANK"] == "0"
    assert found["FINETUNE_ATTEMPT"] == "1"
    assert found["FINETUNE_POD_NAME"] == "tune-0-abcde"
    assert found["FINETUNE_GRACE_PERIOD_SECONDS"] == "30"


def test_each_pod_has_a_loopback_address_and_finds_index_0_by_it(tmp_path: Path) -> None:
    world = World(tmp_path, resources={"nodes": 2})
    runtime = world.runtime(SHOW_ENVIRONMENT)
    addresses = [runtime.start(world.pod(index)) for index in (0, 1)]
    for index in (0, 1):
        end_of(runtime, world.pod(index))
    assert len(set(addresses)) == 2
    assert all(address.startswith("127.") and not address.startswith("127.0.") for address in addresses)
    assert world.environment(1)["FINETUNE_POD_IP"] == addresses[1]
    assert [world.environment(index)["PET_MASTER_ADDR"] for index in (0, 1)] == [addresses[0]] * 2


def test_the_next_attempt_has_other_addresses(world: World) -> None:
    pod = world.pod()
    before = address_of(pod, "tune-0")
    pod["metadata"]["annotations"]["finetune.dev/attempt"] = "2"
    assert address_of(pod, "tune-0") != before


def test_files_of_the_container_lie_in_the_pods_folder(world: World) -> None:
    program = """
import os, pathlib
scratch = pathlib.Path(os.environ["FINETUNE_SCRATCH_DIR"])
assert scratch.is_dir() and os.environ["HF_HOME"].startswith(str(scratch))
job = pathlib.Path(os.environ["FINETUNE_JOB_FILE"]).read_text()
pathlib.Path(os.environ["FINETUNE_TERMINATION_LOG"]).write_text(job)
"""
    end = run(world, program)
    assert end.code == 0
    assert json.loads(end.message)["metadata"]["name"] == "tune"


def test_volumes_of_claims_are_folders_that_stay(tmp_path: Path) -> None:
    world = World(tmp_path, model={"uri": "pvc://models/llama"})
    run(world)
    assert world.environment()["FINETUNE_VOLUMES_DIR"] == str(tmp_path / "claims")


def test_only_the_log_and_the_last_word_of_a_pod_stay(world: World) -> None:
    run(world, "print('hello')")
    assert sorted(path.name for path in world.file("log").parent.iterdir()) == ["log", "termination-log"]
    assert newest_log(world.folder / "pods", "tune") == world.file("log")
    assert newest_log(world.folder / "pods", "tu") is None


def test_the_log_of_a_gang_is_that_of_its_first_pod(world: World) -> None:
    runtime = world.runtime("print('hello')")
    for pod in (world.pod(0), world.pod(1)):
        runtime.start(pod)
        wait_for(partial(runtime.poll, pod))
    assert newest_log(world.folder / "pods", "tune") == world.file("log", index=0)


def test_secrets_are_answered_from_variables_of_the_same_name(tmp_path: Path) -> None:
    world = World(tmp_path, storage={"s3": {"secretName": "keys"}})
    run(world, environ={**os.environ, "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret"})
    found = world.environment()
    assert (found["AWS_ACCESS_KEY_ID"], found["AWS_SECRET_ACCESS_KEY"]) == ("me", "secret")
    assert "AWS_SESSION_TOKEN" not in found


def test_a_secret_that_nothing_answers_is_named_with_the_way_out(tmp_path: Path) -> None:
    world = World(tmp_path, storage={"s3": {"secretName": "keys"}})
    with pytest.raises(StartError, match="Secret 'keys' does not exist on this machine; export AWS_ACCESS_KEY_ID"):
        world.runtime(SHOW_ENVIRONMENT, environ={}).start(world.pod())


def test_the_embedded_servers_variables_hold_whatever_the_pod_says(world: World) -> None:
    run(world, overrides={"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1", "FINETUNE_S3_PATH_STYLE": "true"})
    found = world.environment()
    assert found["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:1"
    assert found["FINETUNE_S3_PATH_STYLE"] == "true"


def test_variables_of_another_run_are_not_inherited(world: World) -> None:
    run(world, environ={**os.environ, "WORLD_SIZE": "8", "PET_RDZV_ID": "x", "FINETUNE_SCRATCH_DIR": "/x", "MINE": "1"})
    found = world.environment()
    assert "WORLD_SIZE" not in found
    assert "PET_RDZV_ID" not in found
    assert found["FINETUNE_SCRATCH_DIR"] != "/x"
    assert found["MINE"] == "1"


# --- devices ---------------------------------------------------------------------------------------------------------


def test_a_pod_sees_the_gpus_it_asked_for_and_one_without_sees_none(tmp_path: Path) -> None:
    run(World(tmp_path / "cpu"), gpus=["0", "1"])
    assert World(tmp_path / "cpu").environment()["CUDA_VISIBLE_DEVICES"] == ""
    with_gpu = World(tmp_path / "gpu", resources={"gpusPerNode": 1})
    runtime = with_gpu.runtime(SHOW_ENVIRONMENT, gpus=["0", "1"])
    for index in (0, 1):
        runtime.start(with_gpu.pod(index))
    for index in (0, 1):
        end_of(runtime, with_gpu.pod(index))
    assert [with_gpu.environment(index)["CUDA_VISIBLE_DEVICES"] for index in (0, 1)] == ["0", "1"]


def test_gpus_are_free_again_when_a_pod_has_ended(tmp_path: Path) -> None:
    world = World(tmp_path, resources={"gpusPerNode": 1})
    runtime = world.runtime(SHOW_ENVIRONMENT, gpus=["3"])
    for _ in range(2):
        runtime.start(world.pod())
        end_of(runtime, world.pod())
    assert world.environment()["CUDA_VISIBLE_DEVICES"] == "3"


def test_more_gpus_than_the_machine_has_are_refused_in_words(tmp_path: Path) -> None:
    world = World(tmp_path, resources={"gpusPerNode": 1})
    with pytest.raises(StartError, match=r"asks for 1 GPU\(s\), 0 are free.*set resources.gpusPerNode"):
        world.runtime(SHOW_ENVIRONMENT).start(world.pod())


# --- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "code"), [("raise SystemExit(65)", 65), ("import os; os.kill(os.getpid(), 11)", 139)]
)
def test_the_exit_code_is_that_of_a_container(world: World, program: str, code: int) -> None:
    assert run(world, program).code == code


def test_a_pod_that_fails_without_a_word_leaves_the_end_of_its_log(world: World) -> None:
    end = run(world, "print('x' * 3000); raise SystemExit('no such thing')")
    assert end.code == 1
    assert end.message.endswith("no such thing\n")
    assert len(end.message) == 2048


def test_a_termination_message_is_cut_as_the_kubelet_does(world: World) -> None:
    program = "import os; open(os.environ['FINETUNE_TERMINATION_LOG'], 'w').write('x' * 5000)"
    assert len(run(world, program).message) == 4096


def test_a_stopped_pod_may_save(started: Callable[[str], tuple[ProcessRuntime, Object]]) -> None:
    runtime, pod = started(SAVE_ON_SIGTERM)
    runtime.stop(pod, 30)
    assert end_of(runtime, pod) == Exit(75, "saved")


def test_a_pod_that_does_not_stop_is_killed_after_its_grace_period(
    world: World, started: Callable[[str], tuple[ProcessRuntime, Object]]
) -> None:
    runtime, pod = started(IGNORE_SIGTERM)
    runtime.stop(pod, 30)
    world.time = 29
    assert runtime.poll(pod) is None
    world.time = 30
    assert end_of(runtime, pod).code == 137


def test_no_grace_kills_at_once(started: Callable[[str], tuple[ProcessRuntime, Object]]) -> None:
    runtime, pod = started(IGNORE_SIGTERM)
    runtime.stop(pod, 0)
    assert end_of(runtime, pod).code == 137


def test_what_a_pod_has_started_ends_with_it(
    world: World, started: Callable[[str], tuple[ProcessRuntime, Object]]
) -> None:
    runtime, pod = started(START_A_CHILD)
    child = int(world.file("child").read_text())
    end_of(runtime, pod)
    wait_for(lambda: not is_alive(child))


def test_kill_all_leaves_nothing_behind(world: World, started: Callable[[str], tuple[ProcessRuntime, Object]]) -> None:
    runtime, _ = started(START_A_CHILD + "time.sleep(1000)")
    child = int(world.file("child").read_text())
    runtime.kill_all()
    wait_for(lambda: not is_alive(child))


def test_pods_die_with_the_program_that_runs_them(tmp_path: Path) -> None:
    """SIGKILL leaves that program no chance to end them itself."""
    shim = Path(sys.modules[ProcessRuntime.__module__].shim.__file__)
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(shim), str(tmp_path / "pid")])
    pod = int(wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    assert is_alive(pod)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    wait_for(lambda: not is_alive(pod))


OWNER = """
import os, subprocess, sys, time
pod = '''
import os, sys, time
open(sys.argv[1] + ".tmp", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(1000)
'''
command = [sys.executable, sys.argv[1], str(os.getpid()), sys.executable, "-c", pod, sys.argv[2]]
subprocess.Popen(command, start_new_session=True)
time.sleep(1000)
"""


def test_a_pod_whose_owner_is_gone_already_does_not_start(tmp_path: Path) -> None:
    shim = Path(sys.modules[ProcessRuntime.__module__].shim.__file__)
    command = [sys.executable, str(shim), "1", sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"]
    assert subprocess.run(command, check=False).returncode == 1
    assert not (tmp_path / "ran").exists()
