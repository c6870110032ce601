"""Images of tables that are read while training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from finetune_api.job import DatasetSpec, InvalidRowPolicy
from finetune_trainer.data import sources
from finetune_trainer.data.class_columns import LABEL
from finetune_trainer.data.images.found import class_names, of_row, refuse_columns
from finetune_trainer.data.images.looking import Looked, look
from finetune_trainer.data.images.tally import ImageTally
from finetune_trainer.data.labels import ClassLabel
from finetune_trainer.data.problems import Problem
from finetune_trainer.data.readers import Row
from finetune_trainer.data.sources import SizedFile
from finetune_trainer.data.stream import Stream


@dataclass(frozen=True)
class ImageEncoder:
    """Rows of tables -> images that can be decoded, as encoded as they came; can be pickled.

    Attributes:
        names: of the numbers of labels, where the first file has names for them; that of all is not known beforehand.
    """

    labels: ClassLabel
    names: tuple[str, ...]

    @property
    def splits(self) -> bool:
        """Whether a row may become several samples."""
        return False

    def __call__(self, rows: Sequence[Row | Problem]) -> list[Looked | Problem]:
        """One result for each row, in order; what is a problem already stays one."""
        return [row if isinstance(row, Problem) else look(of_row(row, self.names), self.labels) for row in rows]


def stream_of(files: Sequence[SizedFile], spec: DatasetSpec, labels: ClassLabel, seed: int, processes: int) -> Stream:
    """The images of the files, as rows of an index with `labels`.

    Args:
        labels: with its classes, which the API wants to be named.
        processes: see Stream.

    Raises:
        DataError: no file is a table.
        UsageError: dataset.columns names what is not read.
    """
    usable, _ = sources.select(files)
    refuse_columns(spec.columns)
    assert labels.classes is not None, "the API refuses a stream without task.labels"
    return Stream(
        files=usable,
        columns=spec.columns,
        encoder=ImageEncoder(labels, class_names(usable[0], spec.columns)),
        new_tally=partial(ImageTally, "labeled"),
        trained=partial(_numbered, {name: number for number, name in enumerate(labels.classes)}),
        limit="",
        seed=seed,
        drop=spec.on_invalid_row is InvalidRowPolicy.DROP,
        processes=processes,
    )


def _numbered(numbers: dict[str, int], sample: dict[str, Any]) -> dict[str, Any]:
    return sample | {"labels": numbers[sample[LABEL]]}
