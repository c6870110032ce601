"""The command `finetune`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune_operator.cli.errors import CliError
from finetune_operator.cluster.local.runtime import TRAINER

STATE_DIR = Path(".finetune")
MOST_RANKS = 1024
"""As many GPUs as are simulated."""


def main(arguments: Sequence[str] | None = None, program: Sequence[str] = TRAINER) -> int:
    """Run one command; returns its exit code: 0 well, 1 failed, 2 wrong use, 130 suspended by a signal.

    Args:
        program: what a pod of `finetune run` runs, as arguments of Python.
    """
    options = _parser().parse_args(arguments)
    try:
        return _dispatch(options, program)
    except CliError as error:
        print(f"finetune: {error.message}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 1


def _dispatch(options: argparse.Namespace, program: Sequence[str]) -> int:
    """Imports stand here, so that a command does not wait for what only another one needs."""
    match options.command:
        case "validate":
            from finetune_operator.cli.validate import show_problems

            return show_problems(options)
        case "plan":
            from finetune_operator.cli.plan import show_plan

            return show_plan(options)
        case "run":
            from finetune_operator.cli.run import run

            return run(options, program)
        case "storage":
            from finetune_operator.cli.storage import storage

            return storage(options)
        case "get":
            from finetune_operator.cli.state import show_jobs

            return show_jobs(options)
    from finetune_operator.cli.state import show_log

    return show_log(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune", description="Fine-tuning by FineTuneJobs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("validate", help="check files as the API server would, with lines")
    check.add_argument("files", nargs="+", type=Path, metavar="FILE")
    plan = commands.add_parser("plan", help="show what would train, and the manifests that the operator would create")
    _add_plan(plan)
    _add_run(commands.add_parser("run", help="run jobs on this machine, or go on with them"))
    keep = commands.add_parser(
        "storage", help="copy data into and out of buckets: cp, ls, cat, rm, mb, serve", add_help=False
    )
    _add_folders(keep)
    keep.add_argument("arguments", nargs=argparse.REMAINDER)
    get = commands.add_parser("get", help="list the jobs of this machine")
    get.add_argument("name", nargs="?")
    logs = commands.add_parser("logs", help="show what the newest pod of a job has written")
    logs.add_argument("name")
    for command in (plan, get, logs):
        command.add_argument("--state-dir", type=Path, default=STATE_DIR, help="folder of `finetune run` [%(default)s]")
    return parser


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--config", type=Path, metavar="FILE", help="config.json to read in place of the model's")
    command.add_argument("--simulate", action="store_true", help="estimate memory, traffic and checkpoints, too")
    command.add_argument(
        "--world-size", type=_ranks, nargs="+", default=[], metavar="N", help="GPUs to simulate beside the job's own"
    )


def _ranks(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= MOST_RANKS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs from 1 to {MOST_RANKS}")
    return int(text)


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, metavar="FILE", help="YAML file with one FineTuneJob, or several")
    _add_folders(command)
    command.add_argument(
        "--upload", action="append", default=[], metavar="PATH=s3://BUCKET/KEY", help="copy this into the bucket first"
    )
    command.add_argument(
        "--replace", action="store_true", help="delete the jobs of these names and their checkpoints, and start anew"
    )


def _add_folders(command: argparse.ArgumentParser) -> None:
    command.add_argument("--state-dir", type=Path, default=STATE_DIR, help="where jobs and logs are kept [%(default)s]")
    command.add_argument("--storage-dir", type=Path, help="data of the embedded S3 server [s3 in the state folder]")


if __name__ == "__main__":
    sys.exit(main())
