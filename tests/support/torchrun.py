"""Several ranks of one of the tests' own modules, by torch's launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(str(ROOT / part) for part in (".", "crds", "operator", "trainer_image"))


def leave() -> NoReturn:
    """End a rank, when all have come so far, as trainers end: at once, with the process group in place.

    With torch 2.13 taking it down may wait for ever: for gloo's thread, which drops its last collective and waits for
    the interpreter's lock, which whoever frees a model that was trained holds.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def torchrun(module: ModuleType, *arguments: object, ranks: int = 2, seconds: float | None = None) -> str:
    """Run it as main in so many processes of one thread each; what they print. Raises AssertionError when one fails.

    Args:
        seconds: how long they may take; absent: as long as the test.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", module.__name__, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
