"""YAML files of a user as objects, with errors by file, line and column."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_operator.cli.errors import CliError
from finetune_operator.cluster.port import FINE_TUNE_JOB

FLOAT = re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")


class Loader(yaml.SafeLoader):
    """Reads scalars as kubectl does: `1e-4` is a number, and a date is a text."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Document:
    """One document of a file."""

    file: Path
    node: yaml.Node
    data: dict[str, Any]

    @property
    def line(self) -> int:
        """Where it begins, from 1."""
        return int(self.node.start_mark.line) + 1

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def read(file: Path) -> list[Document]:
    """All documents that are not empty; raises CliError for what is no YAML, no file, or holds no object."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    loader = Loader(text)
    try:
        documents = [_document(file, loader, node) for node in _nodes(loader)]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
        raise CliError(f"{place}: not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise CliError(f"{file}: not YAML: {error}") from error
    finally:
        loader.dispose()
    if not documents:
        raise CliError(f"{file}: no document in it; a job begins with `apiVersion: {FINE_TUNE_JOB.api_version}`")
    return documents


def require_job(document: Document) -> None:
    """Raise CliError for another kind than FineTuneJob."""
    found = (document.data.get("apiVersion"), document.data.get("kind"))
    wanted = (FINE_TUNE_JOB.api_version, FINE_TUNE_JOB.kind)
    if found != wanted:
        raise CliError(
            f"{document.place}: apiVersion {found[0]} and kind {found[1]} are not known here; "
            f"set apiVersion: {wanted[0]} and kind: {wanted[1]}"
        )


def read_jobs(file: Path) -> list[Document]:
    """All documents of a file, each of which must be a FineTuneJob."""
    documents = read(file)
    for document in documents:
        require_job(document)
    return documents


def _nodes(loader: Loader) -> list[yaml.Node]:
    nodes = []
    while loader.check_node():
        nodes.append(loader.get_node())
    return [node for node in nodes if node is not None and node.tag != "tag:yaml.org,2002:null"]


def _document(file: Path, loader: Loader, node: yaml.Node) -> Document:
    data = loader.construct_document(node)
    if not isinstance(data, dict):
        raise CliError(f"{file}:{node.start_mark.line + 1}: not an object but {type(data).__name__}")
    return Document(file, node, data)
