"""All benchmarks in turn, each in a process of its own: `python -m bench`, or `python -m bench reconcile transfer`."""

from __future__ import annotations

import subprocess
import sys

ALL = (
    *("reconcile", "restarts", "scale", "transfer", "preparation"),
    *("training", "weak_scaling", "checkpoints", "strategies", "green"),
)


def main() -> int:
    """The number of benchmarks that failed."""
    names = sys.argv[1:] or list(ALL)
    return sum(subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode != 0 for name in names)


if __name__ == "__main__":
    sys.exit(main())
