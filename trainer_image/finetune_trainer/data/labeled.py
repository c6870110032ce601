"""The way from files with labelled texts to tokens and labels as the loss takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from finetune_api.job import DatasetSpec
from finetune_api.task import TaskSpec
from finetune_trainer.data import class_columns
from finetune_trainer.data.building import Builder, Built, Progress, write_json
from finetune_trainer.data.class_columns import LABEL
from finetune_trainer.data.label_encoding import LabeledEncoder, LabelTally
from finetune_trainer.data.labels import ClassLabel, ClassLabels, Labels, Numbers, labels_of, ordered
from finetune_trainer.data.preparation import built, read_json, streamed, usual_processes
from finetune_trainer.data.prepared import Prepared
from finetune_trainer.data.rows import open_rows
from finetune_trainer.data.sources import NamedFile, SizedFile
from finetune_trainer.data.splits import TRAINING, VALIDATION, held_out_evenly, source_column, split
from finetune_trainer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

TRAINED = ("input_ids", "token_type_ids", "labels")


@dataclass(frozen=True)
class PreparedLabels(Prepared):
    """Rows with the columns input_ids, token_type_ids where the model has them, and labels: the number of a class, a
    list of such numbers, or a number.

    Attributes:
        classes: names in the order of the model's outputs; none for numbers.
    """

    classes: tuple[str, ...]


@dataclass(frozen=True)
class LabelBuilder(Builder):
    """Texts and what is to be said of them.

    Attributes:
        limits: what longer rows are cut to, in words.
    """

    labels: Labels
    typed: bool
    limits: str

    @property
    def columns(self) -> pa.Schema:
        types = [("token_type_ids", pa.list_(pa.int8()))] if self.typed else []
        return pa.schema([("input_ids", pa.list_(pa.int32())), (LABEL, self.labels.kind), *types])

    @property
    def limit(self) -> str:
        return self.limits

    def encoder(self, row_format: str, part: str, folder: Path) -> LabeledEncoder:
        labels = self.labels
        if part == VALIDATION and isinstance(labels, ClassLabel):
            labels = labels.among(self._classes(folder))
        return LabeledEncoder(self.tokenizer, labels, row_format, self.max_length, self.typed)

    def tally(self, row_format: str) -> LabelTally:
        return LabelTally(row_format)

    def trained(self, sample: dict[str, Any]) -> dict[str, Any]:
        """With the label as a number, which the classes of the spec tell: those of a stream show only at its end."""
        row = super().trained(sample)
        label = row.pop(LABEL)
        if not isinstance(self.labels, Numbers):
            classes = self.labels.classes
            assert classes is not None, "the API asks for task.labels"
            label = [classes.index(name) for name in label] if isinstance(label, list) else classes.index(label)
        return row | {"labels": label}

    def hold_out(self, rows: Dataset, fraction: float) -> list[int]:
        """Of single classes the same share of each: a rare one could else be held out whole, and never be learned."""
        if not isinstance(self.labels, ClassLabel) or isinstance(self.labels, ClassLabels):
            return super().hold_out(rows, fraction)
        classes = rows.data.column(LABEL).to_pylist()
        return held_out_evenly(source_column(rows), classes, fraction, self.seed)

    def complete(self, built: Built) -> dict[str, Any]:
        """Write the classes; what the labels are, and which of them are missing where."""
        if isinstance(self.labels, Numbers):
            write_json(built.folder / "classes.json", [])
            spreads = {name: _spread(part[LABEL]) for name, part in built.parts.items()}
            _must_spread(spreads, built.parts)
            far = _far(spreads[TRAINING]) if TRAINING in spreads else []
            return {"maxLength": self.limits, "labels": spreads, "warnings": far}
        classes = self._classes(built.folder)
        write_json(built.folder / "classes.json", classes)
        counts = {name: class_columns.counts(classes, part[LABEL]) for name, part in built.parts.items()}
        return {"maxLength": self.limits, **class_columns.report(counts)}

    def _classes(self, folder: Path) -> tuple[str, ...]:
        if self.spec.streaming:
            return self.labels.classes or ()
        rows = open_rows(folder / f"{TRAINING}.arrow")
        found = ordered(pc.unique(_flat(rows.data.column(LABEL))).to_pylist())
        return self.labels.classes or found


def prepare_labeled(
    files: Sequence[NamedFile] | Sequence[SizedFile],
    spec: DatasetSpec,
    task: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    limit: str,
    typed: bool,
    seed: int,
    scratch: Path,
    validation_files: Sequence[NamedFile] = (),
    order: tuple[str, ...] = (),
    processes: int | None = None,
    progress: Progress = lambda part, rows: None,
) -> PreparedLabels:
    """Prepare the dataset, or take up what another process on this machine has prepared; see preparation.prepare.

    Args:
        limit: where max_length comes from, in words.
        typed: whether the model asks which of two texts a token belongs to.
        order: of the classes, where the same ones are in the data and the spec names none.

    Raises:
        DataError: rows that cannot be used, or labels that tell nothing apart.
    """
    labels = labels_of(task)
    builder = LabelBuilder(
        spec, task.type, tokenizer, max_length, seed, processes or usual_processes(), progress, labels, typed, limit
    )
    folder = built(builder, files, validation_files, scratch, labels, typed)
    classes = tuple(read_json(folder / "classes.json"))
    if labels.classes is None and set(order) == set(classes):
        classes = order
    parts = split(folder, read_json(folder / "held-out.json"), partial(_open, labels=labels, classes=classes))
    train, shown = streamed(builder, files, processes) if spec.streaming else (_trained(parts[TRAINING]), {})
    return PreparedLabels(
        train=train,
        validation=_trained(parts[VALIDATION]) if VALIDATION in parts else None,
        report=read_json(folder / "report.json") | shown,
        classes=classes,
    )


def _open(path: Path, labels: Labels, classes: tuple[str, ...]) -> Dataset:
    """The rows with the column `labels` beside those of the file."""
    rows = open_rows(path)
    column = rows.data.column(LABEL).combine_chunks()
    if not isinstance(labels, Numbers):
        column = class_columns.numbered(column, classes)
    return rows.add_column("labels", column)


def _trained(rows: Dataset) -> Dataset:
    return rows.select_columns(
        [name for name in rows.column_names if name in ("input_ids", "token_type_ids", "labels")]
    )


def _flat(names: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.list_flatten(names) if pa.types.is_list(names.type) else names


def _spread(labels: Any) -> dict[str, float]:
    numbers = np.asarray(labels, dtype=np.float64)
    return {"mean": numbers.mean(), "std": numbers.std(), "smallest": numbers.min(), "largest": numbers.max()}


def _must_spread(spreads: dict[str, dict[str, float]], parts: dict[str, Dataset]) -> None:
    if TRAINING in spreads and not spreads[TRAINING]["std"]:
        raise DataError(
            f"the training rows all have the label {spreads[TRAINING]['mean']:g}, so there is nothing to learn",
            "name in dataset.columns the column that holds the labels",
        )
    if VALIDATION in parts and len(parts[VALIDATION]) < 2:
        raise DataError(
            "dataset.validation: there is one held-out row, and r2 compares what two or more of them have",
            "hold out more rows, or remove dataset.validation",
        )


def _far(spread: dict[str, float]) -> list[str]:
    """A fresh head starts at 0 and makes small steps."""
    if max(abs(spread["mean"]), spread["std"]) <= 100:
        return []
    return [
        f"training: the labels are about {spread['mean']:.4g}, give or take {spread['std']:.4g}; numbers near 1 are "
        "learned best: divide them, or take their logarithm"
    ]
