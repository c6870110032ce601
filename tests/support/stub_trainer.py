"""A trainer of a few lines that keeps the contract.

Runs as a pod's process in tests of the local adaptor, so that they need seconds and no torch. The job's seed picks
the behaviour; checkpoints are a number in a file beside the output, so that a resumed run goes on from there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from finetune_api.contract import (
    ENV_ATTEMPT,
    ENV_JOB_FILE,
    ENV_POD_IP,
    ENV_TERMINATION_LOG,
    PROGRESS_PORT,
    Cause,
    OutputRef,
    Progress,
    Result,
    Stage,
    TerminationMessage,
)
from tests.support.stub_trainer_seeds import BROKEN, CRASHING, PARENT, STUBBORN

STEPS_PER_SECOND = 20


class State:
    step = 0
    stopped = False
    attempt = int(os.environ.get(ENV_ATTEMPT, "1"))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        progress = Progress(
            attempt=State.attempt, stage=Stage.TRAINING, step=State.step, total_steps=total, loss=2.0 / (1 + State.step)
        )
        body = json.dumps(progress.to_wire()).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        return


def finish(code: int, **fields: Any) -> None:
    message = TerminationMessage(exit_code=code, attempt=State.attempt, step=State.step, **fields)
    Path(os.environ[ENV_TERMINATION_LOG]).write_text(json.dumps(message.to_wire()))
    sys.stdout.flush()
    os._exit(code)


def on_sigterm(signum: int, frame: object) -> None:
    State.stopped = True


job = json.loads(Path(os.environ[ENV_JOB_FILE]).read_text())
seed = job["spec"]["hyperparameters"]["seed"]
total = job["spec"]["hyperparameters"]["maxSteps"]
output = Path(job["spec"]["output"]["uri"].removeprefix("file://"))
output.mkdir(parents=True, exist_ok=True)
checkpoint = output / "stub-checkpoint"
signal.signal(signal.SIGTERM, signal.SIG_IGN if seed == STUBBORN else on_sigterm)
print(f"attempt {State.attempt}", flush=True)
if seed == BROKEN:
    print("reading the dataset", flush=True)
    finish(65, cause=Cause.DATA, message="train.jsonl:3: not JSON", advice="mend the line")
if seed == CRASHING:
    raise RuntimeError("the stub was told to crash")
if seed == PARENT:
    child = subprocess.Popen(["sleep", "1000"])
    (output / "child.pid").write_text(str(child.pid))
server = ThreadingHTTPServer((os.environ[ENV_POD_IP], PROGRESS_PORT), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
State.step = int(checkpoint.read_text()) if checkpoint.exists() else 0
print(f"starting at step {State.step}", flush=True)
begun = {"step": State.step, "env": dict(os.environ), "model": job["spec"]["model"]["uri"]}
(output / f"attempt-{State.attempt}.json").write_text(json.dumps(begun))
while State.step < total:
    if State.stopped:
        checkpoint.write_text(str(State.step))
        finish(75, cause=Cause.DISRUPTION, message="stopped after saving")
    time.sleep(1 / STEPS_PER_SECOND)
    State.step += 1
kind: Literal["model", "adapter"] = "model" if job["spec"]["strategy"]["type"] == "Full" else "adapter"
result = Result(
    job=job["metadata"]["name"],
    uid=job["metadata"]["uid"],
    output=OutputRef(uri=f"{job['spec']['output']['uri']}/{kind}", kind=kind),
    steps=State.step,
    metrics={"eval_loss": 1.5},
    baseline={"eval_loss": 2.5},
)
(output / "result.json").write_text(
    json.dumps(
        result.model_copy(
            update={"samples": [{"prompt": "p", "reference": "r", "before": "b", "after": "a"}]}
        ).to_wire()
    )
)
finish(0, result=result)
