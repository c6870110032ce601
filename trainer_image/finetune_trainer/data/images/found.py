"""Where the images of a dataset are, and of which class each is: by its folder, or by a table's columns."""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from finetune_api.job import DatasetFormat, DatasetSpec
from finetune_trainer.data import sources
from finetune_trainer.data.columns import Columns
from finetune_trainer.data.images.decoding import ENDINGS, Encoded
from finetune_trainer.data.problems import Problem, RowError, kind
from finetune_trainer.data.readers import Row
from finetune_trainer.data.sources import DataFile, NamedFile
from finetune_trainer.data.values import field_of
from finetune_trainer.errors import DataError, UsageError

TABLES = (".parquet", ".csv", ".jsonl", ".ndjson")
"""Beside images these are tables of them; a .json there is more likely somebody's notes."""


@dataclass(frozen=True)
class Picture:
    """An image that has not been looked at yet.

    Attributes:
        file: by which people know it; `line` the row in it, 0 where the whole file is the image.
        label: its class as it stands in the data.
    """

    file: str
    line: int
    label: Any
    source: Encoded


@dataclass(frozen=True)
class Found:
    """The images of one part of a dataset.

    Attributes:
        ignored: names of files that are none.
        names: the classes in their order, where the files themselves name them.
        notes: what a user should know, in sentences.
    """

    format: str
    pictures: Callable[[], Iterator[Picture | Problem]]
    ignored: list[str]
    names: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def find(files: Sequence[NamedFile], spec: DatasetSpec) -> Found:
    """The images in the files of dataset.uri, or of dataset.validation.uri.

    Raises:
        DataError: there are none.
        UsageError: dataset.columns names what is not read.
    """
    if not files:
        raise DataError("the dataset has no files", "check dataset.uri; for images it is a prefix, a glob or a file")
    by_folder = spec.format is DatasetFormat.IMAGE_FOLDER
    if spec.format is DatasetFormat.AUTO:
        by_folder = any(map(_is_image, files)) and not any(_ending(file) in TABLES for file in files)
    refuse_columns(spec.columns, by_folder)
    return _in_folders(files) if by_folder else _in_tables(files, spec.columns)


def refuse_columns(columns: Columns, by_folder: bool = False) -> None:
    """Raise UsageError for a mapping to a field that is not read."""
    unread = [name for name in columns if by_folder or name not in ("image", "label")]
    if unread:
        fields = "an image folder has no columns" if by_folder else "of a table of images image and label are read"
        raise UsageError(f"spec.dataset.columns: {unread[0]} is not read: {fields}", f"remove {unread[0]}")


def _in_folders(files: Sequence[NamedFile]) -> Found:
    images = sorted(filter(_is_image, files), key=lambda file: file.name)
    if not images:
        names = ", ".join(file.name for file in files[:3])
        raise DataError(
            f"no file of the dataset is an image: {names}",
            f"name a prefix with one folder for each class; images end in {', '.join(ENDINGS)}",
        )
    # Of all depths the usual one; an image that lies elsewhere is in no class folder, or in a folder inside of one.
    depth = Counter(map(_depth, images)).most_common(1)[0][0]

    def pictures() -> Iterator[Picture | Problem]:
        for file in images:
            yield _by_folder(file) if _depth(file) == depth else _misplaced(file)

    above = sorted({PurePosixPath(file.name).parents[1].name for file in images if _depth(file) == depth})
    return Found("image-folder", pictures, _others(files, images), notes=_gathered(above))


def _gathered(folders: list[str]) -> list[str]:
    if len(folders) < 2:
        return []
    some = ", ".join(folders[:4])
    return [
        f"the classes are gathered from {len(folders)} folders ({some}); where these are parts, such as train and "
        "test, name one of them in dataset.uri"
    ]


def _by_folder(file: NamedFile) -> Picture:
    return Picture(file.name, 0, PurePosixPath(file.name).parent.name, file.path)


def _misplaced(file: NamedFile) -> Problem:
    return Problem(
        file.name,
        0,
        "the image lies at another depth than most; its class is the folder that it lies in, just below dataset.uri",
    )


def _in_tables(files: Sequence[NamedFile], columns: Columns) -> Found:
    usable, ignored = sources.select(files)
    images = {file.name: file for file in files if _is_image(file)}

    def pictures() -> Iterator[Picture | Problem]:
        for file in usable:
            classes = class_names(file, columns)
            for item in sources.read([file], columns):
                yield item if isinstance(item, Problem) else of_row(item, classes, images)

    others = [name for name in ignored if name not in images]
    return Found("labeled", pictures, others, class_names(usable[0], columns))


def of_row(row: Row, classes: tuple[str, ...], images: Mapping[str, NamedFile] | None = None) -> Picture | Problem:
    """The image of a table's row.

    Args:
        classes: see `class_names`.
        images: those beside the table, by their URIs; None where they are not at hand.
    """
    try:
        label = _class(field_of(row.value, "label"), classes)
        source = _encoded(field_of(row.value, "image"), row.file, images)
    except RowError as error:
        return Problem(row.file, row.line, str(error))
    return Picture(row.file, row.line, label, source)


def class_names(file: DataFile, columns: Columns) -> tuple[str, ...]:
    """The names that the datasets library has written into a parquet file for the numbers of labels, if it has."""
    if not file.name.lower().endswith(".parquet"):
        return ()
    try:
        with closing(file.open(scattered=True)) as stream:
            metadata = pq.read_schema(stream).metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except (*sources.DAMAGED, ValueError):
        return ()  # the reader says it better, or somebody else has written the metadata
    return tuple(features.get(columns.get("label", "label"), {}).get("names") or ())


def _class(label: Any, names: tuple[str, ...]) -> Any:
    """The name of a number, where the file has names."""
    if not names or not isinstance(label, int):
        return label
    if not 0 <= label < len(names):
        raise RowError(f"label is the number {label}, but the file names 0 to {len(names) - 1}")
    return names[label]


def _encoded(value: Any, table: str, images: Mapping[str, NamedFile] | None) -> Encoded:
    """Bytes as they are, {"bytes", "path"} as the datasets library writes it, or the name of a file by the table."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise RowError(f'image is {kind(value)}; it must be bytes, {{"bytes": ...}}, or the name of an image file')
    if images is None:
        raise RowError(f"image names the file {value}; a stream takes images from the table itself, as bytes")
    name = _resolved(value, table)
    if name not in images:
        raise RowError(f"image names {value}, which is not among the files of the dataset (as {name})")
    return images[name].path


def _resolved(name: str, table: str) -> str:
    """The URI of a file that is named beside a table."""
    scheme, _, path = table.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(posixpath.dirname(path), name))}"


def _is_image(file: NamedFile) -> bool:
    """By its ending; what begins with a dot, or lies in a folder that does, other programs have left."""
    hidden = any(part.startswith(".") for part in PurePosixPath(file.name).parts[-2:])
    return not hidden and _ending(file) in ENDINGS


def _ending(file: NamedFile) -> str:
    return PurePosixPath(file.name).suffix.lower()


def _depth(file: NamedFile) -> int:
    return file.name.count("/")


def _others(files: Iterable[NamedFile], images: Iterable[NamedFile]) -> list[str]:
    return sorted({file.name for file in files} - {file.name for file in images})
