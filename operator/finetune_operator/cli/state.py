"""`finetune get` and `finetune logs`: what this machine knows of its jobs."""

from __future__ import annotations

import argparse
import shutil
import sys
from datetime import UTC, datetime

from finetune_operator.cli.errors import CliError
from finetune_operator.cli.table import table
from finetune_operator.cluster.local.machine import StateFolder
from finetune_operator.cluster.local.runtime import newest_log
from finetune_operator.cluster.statefile import StateFile


def show_jobs(options: argparse.Namespace) -> int:
    """Print the jobs of the state folder as `kubectl get` would."""
    objects = StateFile(StateFolder(options.state_dir).objects).load().get("objects", [])
    jobs = [obj for obj in objects if obj["kind"] == "FineTuneJob" and options.name in (None, obj["metadata"]["name"])]
    if not jobs:
        raise CliError(f"no job{f' {options.name}' if options.name else ''} in {options.state_dir}", 1)
    print(table(jobs, datetime.now(UTC)))
    return 0


def show_log(options: argparse.Namespace) -> int:
    """Print the log of a job's newest pod."""
    log = newest_log(StateFolder(options.state_dir).pods, options.name)
    if log is None:
        raise CliError(f"no pod of {options.name} has left a log in {options.state_dir}", 1)
    with log.open(errors="replace") as file:
        shutil.copyfileobj(file, sys.stdout)
    return 0
