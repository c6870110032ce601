"""The main job on one machine: put a model and data into a bucket, apply a FineTuneJob, see what came out.

Everything between the two uploads and the result is the product: `finetune run` drives the operator's own lifecycle
code, with processes in place of pods and a bundled S3 server in place of a cloud's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import data
import model

HERE = Path(__file__).parent
STATE = Path(".finetune")
FINETUNE = [sys.executable, "-m", "finetune_operator.cli.main"]


def finetune(*arguments: str) -> None:
    """Run the command that a user would type, and show it."""
    print("\n$ finetune " + " ".join(arguments), flush=True)
    code = subprocess.run([*FINETUNE, *arguments], check=False).returncode
    if code != 0:
        raise SystemExit(code)


def main() -> None:
    print("Preparing SmolLM2-135M-Instruct and instruction pairs from Python's own docstrings ...", flush=True)
    weights = model.write(STATE / "quickstart" / "model")
    train, validation = data.write(STATE / "quickstart" / "data")
    finetune("storage", "cp", str(weights), "s3://models/smollm2-135m-instruct/")
    finetune("storage", "cp", str(train), "s3://datasets/python-docs/train.jsonl")
    finetune("storage", "cp", str(validation), "s3://datasets/python-docs/validation.jsonl")
    finetune("run", str(HERE / "job.yaml"))


if __name__ == "__main__":
    main()
