"""`finetune run` with the real check before a trainer of a few lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.test_run import QUICK, User
from tests.support.jobs import write_rows
from tests.support.models import greetings, save_tiny_llama

pytestmark = pytest.mark.slow
CHECKED = {"runPolicy": {"preflight": "Always", "terminationGracePeriodSeconds": 30}}


@pytest.fixture
def user(tmp_path: Path) -> User:
    save_tiny_llama(tmp_path / "model")
    write_rows(tmp_path / "data.jsonl", greetings(24))
    return User(tmp_path)


def valid(user: User) -> dict[str, str]:
    return next(item for item in user.job()["status"]["conditions"] if item["type"] == "Valid")


def test_what_has_passed_is_trained(user: User) -> None:
    user.write_job(steps=QUICK, hyperparameters={"maxSteps": QUICK, "maxLength": 128}, **CHECKED)
    done = user.run("run", "job.yaml")
    assert done.returncode == 0, done.stderr + done.stdout
    assert valid(user)["reason"] == "PreflightPassed"
    assert "the data has 24 rows for training" in valid(user)["message"]
    assert "the output can be written" in done.stdout
    logs = [log.parent.name.rsplit("-", 1)[0] for log in sorted((user.folder / ".finetune/pods").glob("*/log"))]
    assert logs == ["tune-0", "tune-preflight-0"]


def test_what_cannot_work_is_not_trained(user: User) -> None:
    write_rows(user.folder / "data.jsonl", [{"prompt": "alone"}])
    user.write_job(steps=QUICK, hyperparameters={"maxSteps": QUICK, "maxLength": 128}, **CHECKED)
    done = user.run("run", "job.yaml")
    assert done.returncode == 1
    status = user.job()["status"]
    assert (status["phase"], status["reason"], status.get("attempt", 0)) == ("Failed", "Data", 0)
    assert f"{user.folder}/data.jsonl:1" in status["message"]
    assert valid(user)["status"] == "False"
