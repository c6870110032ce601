"""A small hub on loopback: the calls of huggingface.co that fetching a model takes, and its ways to fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 4096
"""Bytes from which a file is kept by git-lfs and lies with somebody else."""


@dataclass
class Hub:
    """Repositories by name; each revision (branch, tag or commit) names the files of one commit.

    Attributes:
        token: what private repositories ask for.
        private: names of repositories that do.
        storage: the other host, to which large files are redirected.
        seen: requests by method and path, with their Authorization.
        fail: how many of the next requests are answered 503.
        break_after: bytes after which the next answers of a file break off, once each.
        corrupt: how often a file is still sent with a wrong byte.
    """

    endpoint: str = ""
    storage: str = ""
    token: str = "hf_secret"
    private: set[str] = field(default_factory=set)
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)
    fail: int = 0
    break_after: list[int] = field(default_factory=list)
    corrupt: int = 0

    def push(self, repo: str, folder: Path, branch: str = "main") -> str:
        """A commit with the files of a folder on a branch; its number."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        commit = hashlib.sha1(repr(sorted((name, _git(data)) for name, data in files.items())).encode()).hexdigest()
        self.repositories.setdefault(repo, {})[commit] = files
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def commit(self, repo: str, revision: str) -> str | None:
        known = self.branches.get(repo, {})
        return revision if revision in self.repositories.get(repo, {}) else known.get(revision)

    def downloads(self) -> list[str]:
        """Names of the files that were sent, in order."""
        return [path.rsplit("/", 1)[-1] for _, path, _ in self.seen if "/resolve/" in path]


def _git(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextmanager
def serve_hub(address: str = "127.0.0.1") -> Iterator[Hub]:
    """A running hub, and the host that keeps its large files."""
    hub = Hub()
    servers = [ThreadingHTTPServer((address, 0), type("Bound", (kind,), {"hub": hub})) for kind in (_Api, _Storage)]
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    hub.endpoint, hub.storage = (f"http://{address}:{server.server_port}" for server in servers)
    yield hub
    for server in servers:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.seen.append((self.command, path, self.headers.get("Authorization")))
        if self.hub.fail:
            self.hub.fail -= 1
            self.answer(503, b"busy")
            return
        self.handle_path([unquote(part) for part in path.strip("/").split("/")])

    def do_HEAD(self) -> None:
        self.do_GET()

    def handle_path(self, parts: list[str]) -> None:
        raise NotImplementedError

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_file(self, data: bytes, **headers: str) -> None:
        wanted = self.headers.get("Range", "")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        body = data[start:]
        if self.hub.corrupt and body and self.command == "GET":
            self.hub.corrupt -= 1
            body = bytes([body[0] ^ 1]) + body[1:]
        if self.hub.break_after and self.command == "GET":
            cut = self.hub.break_after.pop(0)
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:cut])
            self.close_connection = True
            return
        status = 206 if wanted else 200
        self.answer(status, body, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", **headers)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what was asked stands in `seen`."""


class _Api(_Handler):
    def handle_path(self, parts: list[str]) -> None:
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        revision = parts[5] if api else parts[3]
        if repo in self.hub.private and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(401, b"{}", X_Error_Code="RepoNotFound")
            return
        if repo not in self.hub.repositories:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            return
        commit = self.hub.commit(repo, revision)
        if commit is None:
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            return
        files = self.hub.repositories[repo][commit]
        if api:
            self.answer(200, json.dumps(_described(repo, commit, files)).encode(), Content_Type="application/json")
        else:
            self._resolve(repo, commit, "/".join(parts[4:]), files)

    def _resolve(self, repo: str, commit: str, name: str, files: dict[str, bytes]) -> None:
        data = files.get(name)
        if data is None:
            self.answer(404, b"", X_Error_Code="EntryNotFound")
        elif len(data) >= LARGE:
            etag = hashlib.sha256(data).hexdigest()
            where = f"{self.hub.storage}/{repo}/resolve/{commit}/{name}"
            linked = {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(data)), "X_Repo_Commit": commit}
            self.answer(302, b"", Location=where, **linked)
        else:
            self.send_file(data, ETag=f'"{_git(data)}"', X_Repo_Commit=commit)


class _Storage(_Handler):
    def handle_path(self, parts: list[str]) -> None:
        files = self.hub.repositories["/".join(parts[:2])][parts[3]]
        self.send_file(files["/".join(parts[4:])])


def _described(repo: str, commit: str, files: dict[str, bytes]) -> dict[str, object]:
    siblings = []
    for name, data in files.items():
        item: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": _git(data)}
        if len(data) >= LARGE:
            item["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        siblings.append(item)
    return {"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings}
