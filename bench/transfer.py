"""S3 download and upload of 1 GiB, in 64 files and in one, against rclone on the same embedded server.

Both sides verify what they move. Ours runs in a process that has the SDK loaded, as a trainer has; rclone's time is
that of its process less its start-up, which is measured too. Objects to download are put there by rclone, so that they
carry the checksums that it checks, and by us, so that they carry ours. Figures: throughput of ours over rclone's
(higher is better), both medians in seconds, and the peak of our resident memory above idle.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from botocore.config import Config

from bench.common import interleaved, median, report
from finetune_api import contract
from finetune_operator.cluster.seaweed import Endpoint, Seaweed
from finetune_trainer.storage import Store

MIB = 1024 * 1024
TOTAL_BYTES = 1024 * MIB
SHAPES = {"64 files": 64, "1 file": 1}
PAIRS = 5


@dataclass
class Bench:
    """A server, its bucket, the source folders and what was measured."""

    server: Endpoint
    work: Path
    rclone_start_seconds: float = 0.0
    ratios: list[float] = field(default_factory=list)

    def run(self) -> None:
        for shape, files in SHAPES.items():
            source = self.work / shape
            _make_files(source, files)
            self._put_with_rclone(source, f"objects/rclone/{shape}")
            _run_ours(self.server, "upload", f"objects/ours/{shape}", source)
        self.rclone_start_seconds = median([self._rclone("lsf", "w:objects/empty/") for _ in range(PAIRS)])
        for shape in SHAPES:
            self._upload(shape)
            for origin in ("rclone", "ours"):
                self._download(shape, origin)
        report("transfer, all", ratio=math.prod(self.ratios) ** (1 / len(self.ratios)), target=1.0)

    def _upload(self, shape: str) -> None:
        source, peaks = self.work / shape, []

        def ours() -> float:
            seconds, peak = _run_ours(self.server, "upload", "uploads/new", source)
            peaks.append(peak)
            return seconds

        self._compare(f"upload, {shape}", ours, lambda: self._put_with_rclone(source, "uploads/new"), peaks)

    def _download(self, shape: str, origin: str) -> None:
        target, peaks = self.work / "down", []

        def ours() -> float:
            seconds, peak = _run_ours(self.server, "download", f"objects/{origin}/{shape}", target)
            peaks.append(peak)
            return seconds

        def theirs() -> float:
            return self._rclone("copy", f"w:objects/{origin}/{shape}", str(target)) - self.rclone_start_seconds

        self._compare(f"download, {shape}, put by {origin}", ours, theirs, peaks)

    def _compare(self, name: str, ours: Callable[[], float], theirs: Callable[[], float], peaks: list[int]) -> None:
        our_seconds, their_seconds = interleaved(ours, theirs, PAIRS, self._settle)
        ratio = median(their_seconds) / median(our_seconds)
        self.ratios.append(ratio)
        report(
            f"transfer, {name}",
            ratio=ratio,
            target=0.9,
            ours_seconds=median(our_seconds),
            rclone_seconds=median(their_seconds),
            ours_peak_mib_above_idle=max(peaks) / MIB,
        )

    def _settle(self) -> None:
        """Each run starts with an empty folder and bucket, and without bytes still on their way to the disk."""
        shutil.rmtree(self.work / "down", ignore_errors=True)
        renew_bucket(self.server, "uploads")
        os.sync()

    def _put_with_rclone(self, source: Path, prefix: str) -> float:
        return self._rclone("copy", str(source), f"w:{prefix}") - self.rclone_start_seconds

    def _rclone(self, *arguments: str) -> float:
        remote = {
            "TYPE": "s3",
            "PROVIDER": "SeaweedFS",
            "ENDPOINT": self.server.url,
            "ACCESS_KEY_ID": self.server.access_key,
            "SECRET_ACCESS_KEY": self.server.secret_key,
        }
        environ = os.environ | {f"RCLONE_CONFIG_W_{name}": value for name, value in remote.items()}
        command = [str(Path(sys.executable).with_name("rclone")), "--config=/dev/null", *arguments]
        started = time.perf_counter()
        subprocess.run(command, env=environ, check=True, capture_output=True)
        return time.perf_counter() - started


def _make_files(folder: Path, files: int) -> None:
    folder.mkdir()
    for number in range(files):
        with (folder / f"{number:03}.bin").open("wb") as file:
            for _ in range(TOTAL_BYTES // files // (4 * MIB)):
                file.write(os.urandom(4 * MIB))


def _run_ours(server: Endpoint, mode: str, prefix: str, folder: Path) -> tuple[float, int]:
    """Seconds and peak bytes above idle of one transfer in a process of its own."""
    environ = os.environ | _environ(server)
    command = [sys.executable, "-m", "bench.transfer", mode, f"s3://{prefix}", str(folder)]
    done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def worker(mode: str, uri: str, folder: Path) -> None:
    """What the process of our side does."""
    with Store.connect(os.environ) as store:
        store.list("s3://objects/none/")
        idle, started = _peak_rss_bytes(), time.perf_counter()
        if mode == "upload":
            store.upload_folder(folder, uri)
        else:
            store.download(uri + "/", folder)
        print(json.dumps([time.perf_counter() - started, _peak_rss_bytes() - idle]))


def _peak_rss_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _environ(server: Endpoint) -> dict[str, str]:
    return {
        contract.ENV_S3_ENDPOINT: server.url,
        contract.ENV_S3_ACCESS_KEY_ID: server.access_key,
        contract.ENV_S3_SECRET_ACCESS_KEY: server.secret_key,
    }


def renew_bucket(server: Endpoint, name: str) -> None:
    """Drop a bucket with all its bytes on the disk, and make it anew. A first object, since that one costs the server
    the making of its volumes."""
    client = boto3.client(
        "s3",
        endpoint_url=server.url,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    with suppress(client.exceptions.NoSuchBucket):
        client.delete_bucket(Bucket=name)
    client.create_bucket(Bucket=name)
    client.put_object(Bucket=name, Key="first", Body=b"x" * MIB)


def main() -> None:
    work = Path(tempfile.mkdtemp(prefix="finetune-bench-"))
    try:
        with Seaweed() as seaweed:
            server = seaweed.start(work / "server")
            renew_bucket(server, "objects")
            Bench(server, work).run()
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        main()
