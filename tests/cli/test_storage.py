"""`finetune storage` and the embedded S3 server."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tests.support.processes import is_alive, wait_for
from tests.support.s3 import S3Server
from tests.support.shell import Shell

from finetune_operator.cli.store import uses_s3


@pytest.fixture
def shell(tmp_path: Path, s3_server: S3Server) -> Shell:
    """Somebody whose environment names a server."""
    shell = Shell(tmp_path)
    shell.environ |= s3_server.environ()
    return shell


def test_a_folder_goes_into_a_bucket_and_out_again(shell: Shell, bucket: str) -> None:
    (shell.folder / "model" / "deep").mkdir(parents=True)
    shell.write("model/a.txt", "a")
    shell.write("model/deep/b.txt", "bb")
    assert shell.run("storage", "cp", "model", f"s3://{bucket}/models/x/").returncode == 0
    listed = shell.run("storage", "ls", f"s3://{bucket}/models/").stdout.split()
    assert listed == ["1", f"s3://{bucket}/models/x/a.txt", "2", f"s3://{bucket}/models/x/deep/b.txt"]
    assert shell.run("storage", "cp", f"s3://{bucket}/models/x/", "copy").returncode == 0
    copied = {str(path.relative_to(shell.folder / "copy")) for path in (shell.folder / "copy").rglob("*.*")}
    assert copied == {"a.txt", "deep/b.txt"}


def test_a_file_is_copied_under_the_name_that_is_given(shell: Shell, bucket: str) -> None:
    shell.write("a.txt", "a")
    shell.run("storage", "cp", "a.txt", f"s3://{bucket}/b.txt")
    shell.run("storage", "cp", "a.txt", f"s3://{bucket}/folder/")
    shell.run("storage", "cp", f"s3://{bucket}/b.txt", "c.txt")
    assert (shell.folder / "c.txt").read_text() == "a"
    assert shell.run("storage", "cat", f"s3://{bucket}/folder/a.txt").stdout == "a"


def test_rm_removes_what_a_folder_holds(shell: Shell, bucket: str) -> None:
    shell.write("a.txt", "a")
    for name in ("x/1", "x/2", "y"):
        shell.run("storage", "cp", "a.txt", f"s3://{bucket}/{name}")
    assert shell.run("storage", "rm", f"s3://{bucket}/x/").returncode == 0
    assert shell.run("storage", "ls", f"s3://{bucket}/").stdout.split() == ["1", f"s3://{bucket}/y"]


def test_what_is_missing_is_named(shell: Shell, bucket: str) -> None:
    no_bucket = shell.run("storage", "ls", "s3://no-such-bucket/")
    assert no_bucket.returncode == 64
    assert "there is no bucket `no-such-bucket`" in no_bucket.stderr
    no_file = shell.run("storage", "cp", "nowhere", f"s3://{bucket}/x")
    assert no_file.returncode == 64
    assert "there is no file or folder nowhere" in no_file.stderr


def test_two_addresses_of_the_same_side_are_refused(shell: Shell, bucket: str) -> None:
    done = shell.run("storage", "cp", f"s3://{bucket}/a", f"s3://{bucket}/b")
    assert done.returncode == 64
    assert "name one path of this machine and one s3:// address" in done.stderr


def test_the_embedded_server_keeps_data_and_is_shared_while_it_serves(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.write("a.txt", "a")
    stored = shell.run("storage", "cp", "a.txt", "s3://new-bucket/a.txt")
    assert stored.returncode == 0, stored.stderr
    server = shell.start("storage", "serve")
    assert server.stdout is not None
    wait_for(lambda: "AWS_ENDPOINT_URL_S3" in server.stdout.readline())  # type: ignore[union-attr]
    listed = shell.run("storage", "ls", "s3://new-bucket/")
    weed = int((tmp_path / ".finetune" / "s3" / "weed.pid").read_text())
    server.send_signal(signal.SIGKILL)
    server.communicate()
    assert listed.stdout.split() == ["1", "s3://new-bucket/a.txt"]
    wait_for(lambda: not is_alive(weed))


def test_a_job_that_reads_angles_from_a_bucket_needs_a_server() -> None:
    folders = {"model": {"uri": "file:///m"}, "dataset": {"uri": "file:///d"}, "output": {"uri": "file:///o"}}
    folders["task"] = {"type": "CausalLM"}
    angle = {"from": "s3://probes/report/angles.json", "topK": 2}
    assert uses_s3({**folders, "strategy": {"type": "Partial", "select": {"angle": angle}}})
    assert not uses_s3({**folders, "strategy": {"type": "Full"}})
