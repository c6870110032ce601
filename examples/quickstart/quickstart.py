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
SOURCES = {
    "model": "s3://models/smollm2-135m-instruct/",
    "data/train.jsonl": "s3://datasets/python-docs/train.jsonl",
    "data/validation.jsonl": "s3://datasets/python-docs/validation.jsonl",
    "data/topics.jsonl": "s3://datasets/python-docs/topics.jsonl",
}
"""What is put into the bucket, from where in STATE/quickstart to where."""


def main() -> int:
    print("Preparing SmolLM2-135M-Instruct and instruction pairs from Python's own docstrings ...", flush=True)
    model.write(STATE / "quickstart" / "model")
    data.write(STATE / "quickstart" / "data")
    uploads = [f"--upload={STATE}/quickstart/{source}={target}" for source, target in SOURCES.items()]
    arguments = ["run", str(HERE / "job.yaml"), *uploads, *sys.argv[1:]]
    print("\n$ finetune " + " ".join(arguments), flush=True)
    return subprocess.run([sys.executable, "-m", "finetune_operator.cli.main", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
