"""`finetune run` with a file of several jobs, with a trainer of a few lines in the pods."""

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
from tests.support.stub_trainer_seeds import BROKEN

QUICK, LONG = 3, 1000


class User(Shell):
    """Somebody whose pods run the stub trainer, and who trains a model and goes on from it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "tests.support.stub_cli")

    def one(self, name: str, **options: Any) -> dict[str, Any]:
        """A job of this name, which delivers a whole model unless told otherwise."""
        output = {"uri": f"file://{self.folder}/{name}", **options.pop("output", {})}
        job = fine_tune_job(self.folder, **{"strategy": {"type": "Full"}, "steps": QUICK, **options}, output=output)
        return {**job, "metadata": {"name": name, "namespace": "default"}}

    def write_jobs(self, *jobs: dict[str, Any]) -> None:
        self.write("chain.yaml", yaml.safe_dump_all(jobs))

    def status(self, name: str) -> dict[str, Any]:
        objects = json.loads((self.folder / ".finetune" / "objects.json").read_text())["objects"]
        jobs = (obj for obj in objects if obj["kind"] == "FineTuneJob")
        found: dict[str, Any] = next(obj for obj in jobs if obj["metadata"]["name"] == name)["status"]
        return found

    def begun(self, name: str, attempt: int = 1) -> Path:
        return self.folder / name / f"attempt-{attempt}.json"

    def model_of(self, name: str) -> str:
        """What the trainer of a job was given for its model."""
        found: str = json.loads(self.begun(name).read_text())["model"]
        return found


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    yield User(tmp_path)
    wait_for(lambda: not processes_in(tmp_path))


def test_a_chain_runs_to_its_end_whatever_the_order_in_the_file(user: User) -> None:
    user.write_jobs(user.one("second", model={"uri": "job://first"}, strategy={"type": "LoRA"}), user.one("first"))
    done = user.run("run", "chain.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert user.model_of("second") == f"file://{user.folder}/first/model"
    lines = [line.split(maxsplit=3)[1:] for line in done.stdout.splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)]
    held = [line for line in lines if line[:2] == ["second", "Blocked"]]
    assert held[0][2].startswith("Waiting for job first (spec.model.uri), which is ")
    assert lines.index(held[-1]) < next(n for n, line in enumerate(lines) if line[:2] == ["first", "Succeeded"])
    assert re.search(r"^second +LoRA +Succeeded +3/3 .*\nfirst +Full +Succeeded +3/3 ", done.stdout, re.MULTILINE)
    assert "--- first\n" in done.stdout
    assert f"The model is at file://{user.folder}/first/model" in done.stdout
    assert f"The adapter is at file://{user.folder}/second/adapter" in done.stdout


def test_a_failure_ends_the_command_and_says_what_was_not_started(user: User) -> None:
    user.write_jobs(
        user.one("first", seed=BROKEN),
        user.one("second", model={"uri": "job://first"}),
        user.one("third", model={"uri": "job://second"}),
    )
    done = user.run("run", "chain.yaml")
    assert done.returncode == 1
    assert "train.jsonl:3: not JSON" in done.stdout
    assert "Not started: spec.model.uri: job first has failed (train.jsonl:3: not JSON. Advice: mend the line)" in (
        done.stdout
    )
    assert "Not started: spec.model.uri: job second cannot start itself (ReferencedJobFailed)" in done.stdout
    assert not user.begun("second").exists()

    user.write_jobs(user.one("first"), user.one("second", steps=QUICK + 1, model={"uri": "job://first"}))
    again = user.run("run", "chain.yaml")
    assert again.returncode == 2
    assert "first" in again.stderr
    user.write("first.yaml", yaml.safe_dump(user.one("first")))
    assert user.run("run", "first.yaml", "--replace").returncode == 0
    # What was never started may have changed meanwhile.
    mended = user.run("run", "chain.yaml")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "first has succeeded already" in mended.stdout
    assert re.search(r"^second +Full +Succeeded +4/4 ", mended.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("model", "others", "words"),
    [
        ("job://nobody", [], "there is no FineTuneJob nobody in namespace default; create it"),
        ("job://other", [("other", "job://first")], "these jobs wait for each other: first -> other -> first"),
    ],
    ids=["a job that is not there", "two jobs that wait for each other"],
)
def test_what_would_be_waited_for_without_end_is_told(
    user: User, model: str, others: list[tuple[str, str]], words: str
) -> None:
    user.write_jobs(user.one("first", model={"uri": model}), *(user.one(n, model={"uri": u}) for n, u in others))
    done = user.run("run", "chain.yaml")
    assert done.returncode == 1
    assert words in done.stdout
    again = user.run("run", "chain.yaml")
    assert (again.returncode, words in again.stdout) == (1, True)


def test_an_adapter_is_no_model_unless_it_was_merged(user: User) -> None:
    lora = {"strategy": {"type": "LoRA"}}
    user.write_jobs(user.one("first", **lora), user.one("second", model={"uri": "job://first"}))
    refused = user.run("run", "chain.yaml")
    assert refused.returncode == 1
    assert "goes on from a whole model only; create it anew with output.merge: true" in refused.stdout
    assert user.status("first")["phase"] == "Succeeded"
    user.write_jobs(
        user.one("merged", **lora, output={"merge": True}), user.one("second", model={"uri": "job://merged"})
    )
    assert user.run("run", "chain.yaml").returncode == 0
    assert user.model_of("second") == f"file://{user.folder}/merged/model"


def test_ctrl_c_suspends_all_jobs_and_the_next_run_goes_on_with_all(user: User) -> None:
    user.write_jobs(user.one("first", steps=LONG), user.one("second", model={"uri": "job://first"}))
    process = user.start("run", "chain.yaml")
    wait_for(user.begun("first").exists)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out.count("Go on with: finetune run chain.yaml") == 1
    assert [user.status(name)["phase"] for name in ("first", "second")] == ["Suspended", "Suspended"]
    assert user.status("second")["attempt"] == 0

    process = user.start("run", "chain.yaml")
    wait_for(user.begun("first", attempt=2).exists)
    wait_for(lambda: user.status("second")["phase"] == "Blocked")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_a_job_of_an_earlier_run_can_be_named_when_it_has_ended(user: User) -> None:
    user.write("first.yaml", yaml.safe_dump(user.one("first", steps=LONG)))
    process = user.start("run", "first.yaml")
    wait_for(user.begun("first").exists)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    user.write("second.yaml", yaml.safe_dump(user.one("second", model={"uri": "job://first"})))
    refused = user.run("run", "second.yaml")
    assert (refused.returncode, refused.stderr) == (
        2, "finetune: job://first: this job has not ended, it is Suspended; run its file to the end first, or put all "
        "these jobs into one file\n",
    )  # fmt: skip
    user.write("first.yaml", yaml.safe_dump(user.one("first")))
    user.run("run", "first.yaml", "--replace")
    done = user.run("run", "second.yaml")
    assert done.returncode == 0, done.stderr
    assert user.model_of("second") == f"file://{user.folder}/first/model"


def test_only_the_jobs_of_the_file_run(user: User) -> None:
    user.write("first.yaml", yaml.safe_dump(user.one("first", steps=LONG)))
    process = user.start("run", "first.yaml")
    wait_for(user.begun("first").exists)
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_in(user.folder))
    user.write("second.yaml", yaml.safe_dump(user.one("second")))
    assert user.run("run", "second.yaml").returncode == 0
    assert not user.begun("first", attempt=2).exists()
    process = user.start("run", "first.yaml")
    wait_for(user.begun("first", attempt=2).exists)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def test_jobs_that_name_no_other_run_side_by_side(user: User) -> None:
    user.write_jobs(user.one("first", steps=LONG), user.one("second", steps=LONG))
    process = user.start("run", "chain.yaml")
    wait_for(lambda: user.begun("first").exists() and user.begun("second").exists())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_on_a_terminal_each_job_has_its_bar(user: User) -> None:
    user.write_jobs(user.one("first", steps=60), user.one("second", steps=60))
    ours, theirs = pty.openpty()
    process = user.start("run", "chain.yaml", stdout=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # how a terminal says that nobody writes to it any more
            break
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert all(re.search(rf"{name}\S* .*━.*step \d+/60", text) for name in ("first", "second"))


def test_jobs_of_one_file_use_one_s3_service(user: User) -> None:
    named = {"s3": {"endpoint": "http://127.0.0.1:1"}}
    user.write_jobs(
        user.one("first", model={"uri": "s3://models/tiny"}, storage=named),
        user.one("second", model={"uri": "s3://models/tiny"}),
    )
    refused = user.run("run", "chain.yaml")
    assert refused.returncode == 2
    assert "set spec.storage.s3.endpoint in all of them, or give them files of their own" in refused.stderr
