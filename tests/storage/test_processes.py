"""What only a process of its own shows: the resumption after SIGKILL, and the memory that a transfer takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from finetune_trainer.storage import Store
from finetune_trainer.storage.files import RECORD_FILE
from tests.storage.conftest import MIB
from tests.storage.test_download import visible
from tests.support.s3 import Proxy, S3Server

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(str(ROOT / name) for name in (".", "crds", "operator", "trainer_image"))


def transferring(environ: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.storage.transferring", *arguments],
        cwd=ROOT,
        env=os.environ | environ | {"PYTHONPATH": PATHS},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_download_killed_with_sigkill_goes_on_from_its_finished_files(
    s3_server: S3Server, store: Store, proxy: Proxy, bucket: str, tmp_path: Path
) -> None:
    contents = {f"{number}.bin": os.urandom(3 * MIB) for number in range(8)}
    for name, data in contents.items():
        store.write_bytes(f"s3://{bucket}/d/{name}", data)
    arguments = ("quick", f"s3://{bucket}/d/", str(tmp_path / "down"))

    process = transferring(s3_server.environ(proxy.url), *arguments)
    proxy.after(15 * MIB, process.kill)
    assert process.wait(60) == -9
    finished = [json.loads(line)[0] for line in (tmp_path / "down" / RECORD_FILE).read_text().splitlines()]
    assert 0 < len(finished) < len(contents)

    proxy.requests.clear()
    assert transferring(s3_server.environ(proxy.url), *arguments).wait(60) == 0
    fetched = {request.rpartition("/")[2] for request in proxy.requests if request.endswith(".bin")}
    assert fetched == set(contents) - set(finished)
    assert visible(tmp_path / "down") == sorted(contents)
    for name, data in contents.items():
        assert (tmp_path / "down" / name).read_bytes() == data


def test_a_transfer_holds_less_than_150_mib_whatever_its_size(s3_server: S3Server, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in ("a", "b"):
        with (tmp_path / "source" / name).open("wb") as file:
            file.truncate(160 * MIB)
    for mode, folder in (("upload", "source"), ("download", "down")):
        process = transferring(s3_server.environ(), mode, f"s3://{bucket}/d/", str(tmp_path / folder))
        output, _ = process.communicate(timeout=120)
        assert int(output) < 150 * MIB
    assert visible(tmp_path / "down") == ["a", "b"]
