"""The command `finetune` as somebody with a shell in a folder uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FINETUNE = "finetune_operator.cli.main"


class Shell:
    """A folder, and an environment without settings for S3."""

    def __init__(self, folder: Path, module: str = FINETUNE) -> None:
        self.folder = folder
        self.module = module
        paths = [ROOT, *(ROOT / part for part in ("crds", "operator", "trainer_image"))]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self.environ = {**plain, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def start(self, *arguments: str, **streams: Any) -> subprocess.Popen[str]:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        command = [sys.executable, "-m", self.module, *arguments]
        return subprocess.Popen(command, cwd=self.folder, env=self.environ, text=True, **streams)

    def run(self, *arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)
