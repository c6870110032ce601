"""Image classification on one machine: a small ViT and a small ResNet learn digits, and then other digits partially.

For each of the two `finetune run` trains a base from random weights on the digits 0 to 4, and from that base a second
model for 5 to 9, of which only the last block and a new head learn. Some minutes on two cores.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import data
import model

HERE = Path(__file__).parent
FOLDER = Path(".finetune") / "digits"
UPLOADS = {
    "models/vit": "s3://models/digits-vit/",
    "models/resnet": "s3://models/digits-resnet/",
    "images": "s3://datasets/digits/",
}
"""What is put into the bucket, from where in FOLDER to where."""
JOBS = ("vit-base", "vit", "resnet-base", "resnet")


def main() -> int:
    print("Writing digits as images, and two models with random weights ...", flush=True)
    model.write(FOLDER / "models")
    data.write(FOLDER / "images")
    uploads = [f"--upload={FOLDER}/{source}={target}" for source, target in UPLOADS.items()]
    for job in JOBS:
        arguments = ["run", str(HERE / f"{job}.yaml"), *uploads, *sys.argv[1:]]
        print("\n$ finetune " + " ".join(arguments), flush=True)
        code = subprocess.run([sys.executable, "-m", "finetune_operator.cli.main", *arguments], check=False).returncode
        if code != 0:
            return code
        # The bucket outlives a run; once is enough.
        uploads = []
    return 0


if __name__ == "__main__":
    sys.exit(main())
