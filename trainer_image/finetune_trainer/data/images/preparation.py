"""From the files of a dataset to images that can be trained on: found, looked at, numbered by class, held out.

A pure function of the files, the spec and the seed: a run that is stopped and goes on elsewhere meets the same images
in the same places. Nothing is resized here: that is the model's own image processor's, in `collator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.job import DatasetSpec, InvalidRowPolicy
from finetune_trainer.data import class_columns
from finetune_trainer.data.building import Progress, write_json
from finetune_trainer.data.class_columns import LABEL
from finetune_trainer.data.fingerprint import fingerprint
from finetune_trainer.data.images.found import Found, find
from finetune_trainer.data.images.index import IndexWriter, encoded
from finetune_trainer.data.images.looking import Looked, look_at_all, thumbnail
from finetune_trainer.data.images.stream import stream_of
from finetune_trainer.data.images.tally import ImageTally
from finetune_trainer.data.labels import ClassLabel, ordered
from finetune_trainer.data.once import build_once
from finetune_trainer.data.preparation import read_json
from finetune_trainer.data.prepared import Prepared
from finetune_trainer.data.rows import open_rows
from finetune_trainer.data.sources import NamedFile, SizedFile
from finetune_trainer.data.splits import TRAINING, VALIDATION, held_out_evenly, source_column, split
from finetune_trainer.data.workers import usable_cores
from finetune_trainer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

MAX_THREADS = 8
"""Each may hold an image of MAX_PIXELS."""
PROGRESS_IMAGES = 200
SHOWN = 12
"""Images in the report."""


@dataclass(frozen=True)
class PreparedImages(Prepared):
    """Rows with the columns of the index, and `labels`, the number of the class.

    Attributes:
        classes: names in the order of the model's outputs.
    """

    classes: tuple[str, ...]


def prepare_images(
    files: Sequence[NamedFile] | Sequence[SizedFile],
    spec: DatasetSpec,
    labels: Sequence[str] | None,
    *,
    seed: int,
    scratch: Path,
    validation_files: Sequence[NamedFile] = (),
    order: tuple[str, ...] = (),
    processes: int = 0,
    progress: Progress = lambda part, rows: None,
) -> PreparedImages:
    """Prepare the dataset, or take up what another process on this machine has prepared.

    Args:
        files: the files of dataset.uri, on this machine unless they are streamed; validation_files those of
            dataset.validation.uri, if that is set. They are read again while training.
        labels: task.labels; without it the classes are those of the training data.
        scratch: folder for what is prepared: the images of tables, and some bytes for each that is a file.
        order: of the classes, where the same ones are in the data and nobody has named any.
        processes: that look at the images of a stream beside the training process.

    Raises:
        DataError: images that cannot be used (under onInvalidRow Fail), or fewer than two classes.
        UsageError: dataset.columns names what is not read.
    """
    known, on_disk = ClassLabel(tuple(labels) if labels else None), [] if spec.streaming else files
    folder = (
        scratch
        / "prepared"
        / fingerprint([*on_disk, *validation_files], None, "images", len(on_disk), spec, labels, seed)
    )
    builder = Builder(spec, known, seed, progress)
    build_once(folder, lambda partial: builder.build(partial, on_disk, validation_files))
    found, report = read_json(folder / "classes.json"), read_json(folder / "report.json")
    classes = tuple(found["names"])
    if found["sorted"] and set(order) == set(classes):
        classes = order
    parts = _parts(folder, classes)
    train = stream_of(files, spec, known, seed, processes) if spec.streaming else parts[TRAINING]
    return PreparedImages(train, parts.get(VALIDATION), report, classes)


def _parts(folder: Path, classes: tuple[str, ...]) -> dict[str, Dataset]:
    return split(folder, read_json(folder / "held-out.json"), partial(_open, classes=classes))


def _open(path: Path, classes: tuple[str, ...]) -> Dataset:
    """The rows with the column `labels` beside those of the file."""
    rows = open_rows(path)
    return rows.add_column("labels", class_columns.numbered(rows.data.column(LABEL).combine_chunks(), classes))


@dataclass(frozen=True)
class Classes:
    """The classes in the order of the outputs; `sorted` where nobody has given them an order."""

    names: tuple[str, ...]
    sorted: bool


@dataclass(frozen=True)
class Builder:
    """The settings of a preparation; `build` does it."""

    spec: DatasetSpec
    labels: ClassLabel
    seed: int
    progress: Progress

    def build(self, folder: Path, files: Sequence[NamedFile], others: Sequence[NamedFile]) -> None:
        """Write everything into the folder.

        Args:
            files: those of dataset.uri; none where they are streamed.
            others: those of dataset.validation.uri.
        """
        tallies: dict[str, ImageTally] = {}
        classes, held = Classes(self.labels.classes or (), sorted=False), []
        if not self.spec.streaming:
            tallies[TRAINING], classes = self._training(files, folder)
            held = self._held_out(folder)
        if others:
            labels = self.labels.among(classes.names)
            tallies[VALIDATION] = self._index(VALIDATION, find(others, self.spec), labels, folder)
        write_json(folder / "held-out.json", held)
        write_json(folder / "classes.json", asdict(classes))
        write_json(folder / "report.json", _report(tallies, _parts(folder, classes.names), classes.names))

    def _training(self, files: Sequence[NamedFile], folder: Path) -> tuple[ImageTally, Classes]:
        found = find(files, self.spec)
        labels = self.labels.among(found.names) if found.names else self.labels
        tally = self._index(TRAINING, found, labels, folder)
        names = _names(folder)
        _must_differ(names)
        return tally, Classes(labels.classes or ordered(names), sorted=labels.classes is None)

    def _index(self, part: str, found: Found, labels: ClassLabel, folder: Path) -> ImageTally:
        """Look at all images of a part and write its index.

        Raises:
            DataError: an image cannot be used and onInvalidRow is Fail, or no image can be used.
        """
        tally = ImageTally(found.format, ignored=found.ignored, notes=found.notes)
        threads = min(usable_cores(), MAX_THREADS)
        # closing: a callback that raises must not leave threads behind.
        with (
            IndexWriter(folder / f"{part}.arrow") as writer,
            closing(look_at_all(found.pictures(), labels, threads)) as items,
        ):
            for number, item in enumerate(items):
                tally.add(item)
                if isinstance(item, Looked):
                    writer.add(item.picture, number)
                if (number + 1) % PROGRESS_IMAGES == 0:
                    self.progress(part, number + 1)
        self._must_be_usable(tally)
        return tally

    def _must_be_usable(self, tally: ImageTally) -> None:
        if tally.problems.count and self.spec.on_invalid_row is InvalidRowPolicy.FAIL:
            raise tally.problems.error("repair or remove these images, or set dataset.onInvalidRow to Drop")
        if not tally.used:
            raise tally.problems.error("repair the dataset: not one of its images can be used")

    def _held_out(self, folder: Path) -> list[int]:
        validation = self.spec.validation
        if validation is None or validation.fraction is None:
            return []
        sources = source_column(open_rows(folder / f"{TRAINING}.arrow"))
        return held_out_evenly(sources, _names(folder), validation.fraction, self.seed)


def _names(folder: Path) -> list[str]:
    """The class of every training image."""
    return open_rows(folder / f"{TRAINING}.arrow").data.column(LABEL).to_pylist()  # type: ignore[no-any-return]


def _must_differ(names: list[str]) -> None:
    if len(set(names)) < 2:
        raise DataError(
            f"all {len(names)} training images are of one class, {names[0]}: there is nothing to tell apart",
            "name in dataset.uri the folder above those of the classes: the class of an image is the folder it lies in",
        )


def _report(tallies: dict[str, ImageTally], parts: dict[str, Dataset], classes: tuple[str, ...]) -> dict[str, Any]:
    columns = class_columns.report({part: class_columns.counts(classes, rows[LABEL]) for part, rows in parts.items()})
    told = [f"{part}: {warning}" for part, tally in tallies.items() for warning in tally.warnings("")]
    shown = parts.get(TRAINING, parts.get(VALIDATION))
    return {
        "format": next((tally.format for tally in tallies.values()), None),
        "rows": {part: len(rows) for part, rows in parts.items()},
        "ignoredFiles": [name for tally in tallies.values() for name in tally.ignored[:SHOWN]],
        **columns,
        "warnings": [*told, *columns["warnings"]],
        **{part: tally.counts() for part, tally in tallies.items()},
        "images": _shown(shown) if shown is not None else [],
    }


def _shown(rows: Dataset) -> list[dict[str, str]]:
    """Some images that lie evenly over the rows, as the model will get them but for their size."""
    stride = -(-len(rows) // SHOWN)
    return [
        {"class": row[LABEL], "image": thumbnail(encoded(row)), "file": row["file"]}
        for row in rows.select(range(0, len(rows), stride))
    ]
