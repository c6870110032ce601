"""`finetune validate`: everything that the API server would refuse, with file and line, before it is asked."""

from __future__ import annotations

import argparse
import sys

from finetune_operator.cli.documents import Document, read, require_job
from finetune_operator.cli.errors import CliError
from finetune_operator.cluster.port import Object
from finetune_operator.validation import admit, validate


def show_problems(options: argparse.Namespace) -> int:
    """Check all documents of all files; exit code 1 where anything is wrong."""
    found = []
    for file in options.files:
        try:
            documents = read(file)
        except CliError as error:
            found.append(error.message)
            continue
        for document in documents:
            found += problems(document)
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    if not found:
        print(f"{', '.join(map(str, options.files))}: valid")
    return 1 if found else 0


def problems(document: Document) -> list[str]:
    """One line for each problem: `job.yaml:12: spec.hyperparameters.epochs: ...`."""
    try:
        require_job(document)
    except CliError as error:
        return [error.message]
    found = validate(document.data, document.node)
    return [f"{document.file}:{problem.line or document.line}: {problem}" for problem in found]


def admitted(document: Document) -> Object:
    """The job of a document with its defaults; raises CliError with all that is wrong."""
    found = problems(document)
    if found:
        raise CliError("\n".join(found))
    if not document.data["metadata"].get("name"):
        raise CliError(f"{document.place}: metadata.name: Required value: names are not generated here")
    return admit(document.data)
