"""GET /progress, /metrics and /healthz on rank 0's pod, from a side thread that can never harm the training."""

from __future__ import annotations

import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from finetune_api.contract import Progress
from finetune_trainer.progress import Reporter

REQUEST_SECONDS = 5
MAX_REQUESTS = 8
"""At the same time; more are turned away, so that nobody can fill the pod with threads."""

GAUGES = {
    "attempt": "Number of this incarnation of the job's pods.",
    "step": "Optimizer steps done.",
    "total_steps": "Optimizer steps that the run has.",
    "epoch": "Passes over the data.",
    "loss": "Training loss.",
    "learning_rate": "Learning rate.",
    "grad_norm": "Norm of the gradient before clipping.",
    "tokens_per_second": "Tokens learned from a second, over all ranks.",
    "eta_seconds": "Seconds until the last step.",
    "heartbeat_age_seconds": "Seconds since the training thread gave a sign of life.",
    "trainable_parameters": "Parameters that learn.",
    "total_parameters": "Parameters of the model.",
}


def serve(reporter: Reporter, address: str, port: int) -> ThreadingHTTPServer | None:
    """Serve the reporter's state in a daemon thread; None, with a warning, where the port cannot be had."""
    handler = type("BoundHandler", (_Handler,), {"reporter": reporter})
    server_class = _ServerV6 if ":" in address else _Server
    try:
        server = server_class((address, port), handler)
    except OSError as error:
        reporter.warn(f"progress cannot be served on {address}:{port} ({error}); training goes on without it")
        return None
    threading.Thread(target=server.serve_forever, name="progress", daemon=True).start()
    return server


def metrics_text(progress: Progress) -> str:
    """The state in Prometheus' text format."""
    lines: list[str] = []
    for name, text in GAUGES.items():
        value = getattr(progress, name)
        if value is not None:
            lines += _gauge(name, text, {}, value)
    lines += _gauge("stage", "What the trainer is doing (1).", {"stage": progress.stage.value}, 1)
    for index, (name, value) in enumerate(progress.metrics.items()):
        sample = _gauge("evaluation", "Newest evaluation.", {"metric": name}, value)
        lines += sample if index == 0 else sample[-1:]
    return "\n".join(lines) + "\n"


def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> list[str]:
    full = f"finetune_{name}"
    shown = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
    sample = f"{full}{{{shown}}}" if shown else full
    return [f"# HELP {full} {text}", f"# TYPE {full} gauge", f"{sample} {value}"]


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *args: Any) -> None:
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(*args)

    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for a name that nobody reads, which can take seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that went away in the middle is its own affair; one line is enough for anything else.
        print(f"progress request from {client_address[0]} failed: {sys.exc_info()[1]!r}", file=sys.stderr, flush=True)


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    reporter: Reporter
    timeout = REQUEST_SECONDS
    server_version = "finetune"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path == "/progress":
            self._answer("application/json", json.dumps(self.reporter.snapshot().to_wire(), allow_nan=False))
        elif self.path == "/metrics":
            self._answer("text/plain; version=0.0.4; charset=utf-8", metrics_text(self.reporter.snapshot()))
        elif self.path == "/healthz":
            self._answer("text/plain; charset=utf-8", "ok\n")
        else:
            self.send_error(404)

    def _answer(self, content_type: str, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: the operator asks every few seconds."""
