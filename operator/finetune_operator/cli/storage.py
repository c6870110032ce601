"""`finetune storage`: data of jobs in the embedded S3 server, or in the one that the environment names."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from finetune_operator.cli.store import embedded, of_environment, run_storage
from finetune_operator.cluster.local.machine import StateFolder


def storage(options: argparse.Namespace) -> int:
    """Run `cp`, `ls`, `cat`, `rm` or `mb`, or serve until a signal comes."""
    folder = options.storage_dir or StateFolder(options.state_dir).s3
    if options.arguments[:1] == ["serve"]:
        return _serve(folder)
    if options.arguments[:1] in ([], ["-h"], ["--help"]):
        return run_storage(["--help"], {}).returncode
    with _store(folder) as store:
        return run_storage(options.arguments, store).returncode


def _store(folder: Path) -> AbstractContextManager[Mapping[str, str]]:
    found = of_environment(os.environ)
    return embedded(folder) if found is None else nullcontext(found)


def _serve(folder: Path) -> int:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with embedded(folder) as store:
        print(f"# The embedded S3 server over {folder}; Ctrl-C ends it. For other tools:")
        print("\n".join(f"export {name}={value}" for name, value in store.items()), flush=True)
        stop.wait()
    return 0
