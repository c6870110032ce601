"""`finetune run` as a user types it, with a trainer of a few lines in the pods."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.local.jobs import fine_tune_job
from tests.support.processes import processes_in, wait_for
from tests.support.shell import Shell
from tests.support.stub_trainer_seeds import BROKEN, CRASHING, PARENT, STUBBORN

QUICK, LONG = 3, 1000


class User(Shell):
    """Somebody whose pods run the stub trainer."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "tests.support.stub_cli")

    def write_job(self, **options: Any) -> Path:
        return self.write("job.yaml", yaml.safe_dump(fine_tune_job(self.folder, **options)))

    def job(self) -> dict[str, Any]:
        objects = json.loads((self.folder / ".finetune" / "objects.json").read_text())["objects"]
        found: dict[str, Any] = next(obj for obj in objects if obj["kind"] == "FineTuneJob")
        return found

    def wait_until_training(self, attempt: int = 1) -> None:
        wait_for((self.folder / "out" / f"attempt-{attempt}.json").exists)


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    yield User(tmp_path)
    wait_for(lambda: not processes_in(tmp_path))


def test_a_job_trains_to_its_end_and_says_what_came_out(user: User) -> None:
    user.write_job(steps=QUICK)
    done = user.run("run", "job.yaml")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^tune +LoRA +Succeeded +3/3 ", done.stdout, re.MULTILINE)
    assert re.search(r"^eval_loss +2\.5 +1\.5$", done.stdout, re.MULTILINE)
    assert "before     b" in done.stdout
    assert f"The adapter is at file://{user.folder}/out/adapter" in done.stdout


def test_without_a_terminal_there_are_plain_lines(user: User) -> None:
    user.write_job(steps=QUICK)
    done = user.run("run", "job.yaml")
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    phases = [line.split()[1] for line in done.stdout.splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)]
    assert phases[0] == "Starting"
    assert phases[-1] == "Succeeded"


def test_on_a_terminal_there_is_a_bar(user: User) -> None:
    user.write_job(steps=60)
    ours, theirs = pty.openpty()
    process = user.start("run", "job.yaml", stdout=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # how a terminal says that nobody writes to it any more
            break
    os.close(ours)
    assert process.wait() == 0
    assert "━" in shown.decode()
    assert re.search(r"step \d+/60", shown.decode())


def test_a_failed_job_shows_cause_advice_and_log(user: User) -> None:
    user.write_job(seed=BROKEN)
    done = user.run("run", "job.yaml")
    assert done.returncode == 1
    assert "train.jsonl:3: not JSON" in done.stdout
    assert "mend the line" in done.stdout
    assert "  reading the dataset" in done.stdout
    assert re.search(r"^tune +LoRA +Failed ", done.stdout, re.MULTILINE)


def test_a_crash_is_tried_again_as_often_as_the_budget_says(user: User) -> None:
    user.write_job(seed=CRASHING, runPolicy={"retries": {"application": 1}})
    done = user.run("run", "job.yaml")
    assert done.returncode == 1
    assert user.job()["status"]["restarts"]["application"] == 1
    assert "the stub was told to crash" in done.stdout


def test_a_job_for_a_queue_starts_at_once_since_nobody_else_is_here(user: User) -> None:
    user.write_job(seed=CRASHING, scheduling={"queue": "team"}, runPolicy={"retries": {"application": 1}})
    assert user.run("run", "job.yaml").returncode == 1
    assert (user.job()["status"]["phase"], user.job()["status"]["attempt"]) == ("Failed", 2)


def test_ctrl_c_saves_and_the_next_run_goes_on_from_there(user: User) -> None:
    user.write_job(steps=LONG)
    process = user.start("run", "job.yaml")
    user.wait_until_training()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Go on with: finetune run job.yaml" in out
    suspended = user.job()
    assert suspended["status"]["phase"] == "Suspended"
    saved = int((user.folder / "out" / "stub-checkpoint").read_text())

    process = user.start("run", "job.yaml")
    user.wait_until_training(attempt=2)
    assert json.loads((user.folder / "out" / "attempt-2.json").read_text())["step"] == saved
    assert user.job()["metadata"]["uid"] == suspended["metadata"]["uid"]
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out.startswith("tune goes on from ")


def test_a_second_ctrl_c_ends_a_stubborn_trainer_at_once(user: User) -> None:
    user.write_job(steps=LONG, seed=STUBBORN)
    process = user.start("run", "job.yaml")
    user.wait_until_training()
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    while "Once more" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "goes on from the newest checkpoint" in out
    assert processes_in(user.folder) == []


def test_killing_the_command_leaves_no_process_and_the_next_run_goes_on(user: User) -> None:
    user.write_job(steps=40)
    process = user.start("run", "job.yaml")
    user.wait_until_training()
    uid = user.job()["metadata"]["uid"]
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_in(user.folder))
    done = user.run("run", "job.yaml")
    assert done.returncode == 0, done.stderr
    job = user.job()
    assert job["metadata"]["uid"] == uid
    assert job["status"]["restarts"]["disruption"] == 1


def test_what_a_trainer_has_started_is_gone_after_the_run(user: User) -> None:
    user.write_job(steps=QUICK, seed=PARENT)
    assert user.run("run", "job.yaml").returncode == 0
    assert processes_in(user.folder) == []


def test_a_finished_job_is_not_run_again(user: User) -> None:
    user.write_job(steps=QUICK)
    user.run("run", "job.yaml")
    again = user.run("run", "job.yaml")
    assert again.returncode == 0
    assert "tune has succeeded already; --replace runs it anew." in again.stdout
    assert user.job()["status"]["attempt"] == 1


def test_a_failed_job_is_not_run_again_by_itself(user: User) -> None:
    user.write_job(seed=BROKEN)
    user.run("run", "job.yaml")
    again = user.run("run", "job.yaml")
    assert again.returncode == 1
    assert "tune has failed already" in again.stdout
    assert "--replace" in again.stdout


def test_another_spec_under_the_same_name_is_refused_as_the_api_server_would(user: User) -> None:
    user.write_job(steps=QUICK)
    user.run("run", "job.yaml")
    user.write_job(steps=QUICK + 1)
    refused = user.run("run", "job.yaml")
    assert refused.returncode == 2
    assert "hyperparameters cannot be changed after creation" in refused.stderr
    assert "--replace" in refused.stderr


def test_what_may_change_after_creation_may_change_between_two_runs(user: User) -> None:
    user.write_job(steps=QUICK)
    user.run("run", "job.yaml")
    user.write_job(steps=QUICK, runPolicy={"terminationGracePeriodSeconds": 30, "retries": {"infrastructure": 7}})
    assert user.run("run", "job.yaml").returncode == 0
    assert user.job()["spec"]["runPolicy"]["retries"]["infrastructure"] == 7


def test_replace_starts_anew_without_the_checkpoints_of_before(user: User) -> None:
    user.write_job(steps=QUICK)
    user.run("run", "job.yaml")
    uid = user.job()["metadata"]["uid"]
    checkpoints = user.folder / "out" / "checkpoints" / "step-00000003"
    checkpoints.mkdir(parents=True)
    (checkpoints / "manifest.json").write_text("{}")
    user.write_job(steps=QUICK + 1)
    done = user.run("run", "job.yaml", "--replace")
    assert done.returncode == 0, done.stderr
    assert user.job()["metadata"]["uid"] != uid
    assert not (checkpoints / "manifest.json").exists()


def test_a_job_for_gpus_that_are_not_there_is_refused_at_once(user: User) -> None:
    user.write_job(resources={"gpusPerNode": 1})
    user.environ["CUDA_VISIBLE_DEVICES"] = ""
    refused = user.run("run", "job.yaml")
    assert refused.returncode == 2
    assert "spec.resources.gpusPerNode is 1, and this machine has 0 GPU(s)" in refused.stderr


def test_containers_that_no_process_can_stand_for_are_refused(user: User) -> None:
    user.write_job(podTemplate={"initContainers": [{"name": "wait", "image": "wait:1"}]})
    refused = user.run("run", "job.yaml")
    assert refused.returncode == 2
    assert "spec.podTemplate.initContainers are containers of other images" in refused.stderr


def test_a_secret_is_asked_for_by_the_names_of_its_keys(user: User) -> None:
    s3 = {"endpoint": "http://127.0.0.1:1", "secretName": "keys"}
    user.write_job(storage={"s3": s3}, model={"uri": "s3://models/tiny"})
    refused = user.run("run", "job.yaml")
    assert refused.returncode == 2
    assert "export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead" in refused.stderr


def test_two_runs_in_one_folder_do_not_meet(user: User) -> None:
    user.write_job(steps=LONG)
    process = user.start("run", "job.yaml")
    user.wait_until_training()
    second = user.run("run", "job.yaml")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert second.returncode == 2
    assert "another `finetune run` works in .finetune" in second.stderr
    assert process.returncode == 130


def test_get_and_logs_show_what_was_run(user: User) -> None:
    user.write_job(steps=QUICK)
    user.run("run", "job.yaml")
    assert re.search(r"^tune +LoRA +Succeeded +3/3 ", user.run("get").stdout, re.MULTILINE)
    assert user.run("logs", "tune").stdout == "attempt 1\nstarting at step 0\n"
    unknown = user.run("logs", "other")
    assert (unknown.returncode, unknown.stderr) == (1, "finetune: no pod of other has left a log in .finetune\n")
