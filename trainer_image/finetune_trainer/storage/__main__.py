"""`python -m finetune_trainer.storage`: copy, list, show and remove stored data from a shell.

It reaches S3 by the environment, as a trainer pod does (AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID and so on).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from finetune_trainer.errors import TrainerError, UsageError
from finetune_trainer.storage.batch import Progress
from finetune_trainer.storage.errors import MissingContainerError
from finetune_trainer.storage.files import RECORD_FILE
from finetune_trainer.storage.s3 import S3
from finetune_trainer.storage.settings import MIB, S3Settings, TransferSettings
from finetune_trainer.storage.store import Store
from finetune_trainer.storage.uris import parse


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code is the contract's, 0 for success."""
    options = _parser().parse_args(arguments)
    try:
        with Store.connect(os.environ) as store:
            _run(store, options)
    except TrainerError as error:
        print(f"error: {error.message}" + (f"; {error.advice}" if error.advice else ""), file=sys.stderr)
        return int(error.exit_code)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune storage", description="Look after the data of jobs.")
    commands = parser.add_subparsers(dest="command", required=True)
    copy = commands.add_parser("cp", help="copy a file or the content of a folder from or to a bucket")
    copy.add_argument("source")
    copy.add_argument("target")
    for name, text in (
        ("ls", "list objects with their size in bytes"),
        ("cat", "write an object to the standard output"),
        ("rm", "remove objects: one, a folder or a glob"),
        ("mb", "make a bucket where it is missing"),
    ):
        commands.add_parser(name, help=text).add_argument("uri")
    return parser


def _run(store: Store, options: argparse.Namespace) -> None:
    match options.command:
        case "cp":
            copy(store, options.source, options.target)
        case "ls":
            for info in store.list(options.uri):
                print(f"{info.size:>14,}  {info.uri}")
        case "cat":
            sys.stdout.buffer.write(store.read_bytes(options.uri))
        case "rm":
            store.delete([info.uri for info in store.list(options.uri)])
        case "mb":
            make_bucket(store, options.uri)


def copy(store: Store, source: str, target: str) -> None:
    """From this machine to a bucket or back; a folder's content lands below the target.

    Raises:
        UsageError: neither side, or both, are on this machine; or there is no such file.
    """
    if _is_remote(source) == _is_remote(target):
        raise UsageError(f"cannot copy {source} to {target}", "name one path of this machine and one s3:// address")
    progress = _progress_printer() if sys.stderr.isatty() else None
    if _is_remote(source):
        _download(store, source, Path(target), to_folder=target.endswith("/"), progress=progress)
    else:
        _upload(store, Path(source), target, progress)


def make_bucket(store: Store, uri: str) -> None:
    """Make the bucket of a URI; one that is there is fine."""
    where = parse(uri)
    try:
        store.exists(str(where.at(".finetune")))
    except MissingContainerError:
        S3(S3Settings.from_environ(os.environ), TransferSettings()).request("create_bucket", where)


def _is_remote(path: str) -> bool:
    return path.startswith("s3://")


def _upload(store: Store, source: Path, target: str, progress: Progress | None) -> None:
    if source.is_dir():
        store.upload_folder(source, target, progress)
    elif source.is_file():
        store.upload({target + source.name if target.endswith("/") else target: source}, progress)
    else:
        raise UsageError(f"there is no file or folder {source}", "correct the path")


def _download(store: Store, source: str, target: Path, *, to_folder: bool, progress: Progress | None) -> None:
    """Into a folder beside the target first, so that what has the target's name is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".finetune-") as staging:
        paths = store.download(source, Path(staging), progress)
        one_file = len(paths) == 1 and source.endswith("/" + paths[0].name) and not (to_folder or target.is_dir())
        if one_file:
            paths[0].replace(target)
            return
        (Path(staging) / RECORD_FILE).unlink(missing_ok=True)
        for path in paths:
            final = target / path.relative_to(staging)
            final.parent.mkdir(parents=True, exist_ok=True)
            path.replace(final)


def _progress_printer() -> Progress:
    def show(done: int, total: int, files_done: int, files: int) -> None:
        end = "\n" if done >= total else ""
        text = f"\r{done / MIB:,.1f} of {total / MIB:,.1f} MiB, {files_done} of {files} files "
        print(text, end=end, file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
