"""Dataset files -> a folder with encoded rows, the report, and whatever else a kind of data needs."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from finetune_api.job import DatasetFormat, DatasetSpec, InvalidRowPolicy, TaskType
from finetune_trainer.data import sources
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.formats import FORMATS, Canonical, Format, detect
from finetune_trainer.data.masks import Masker
from finetune_trainer.data.packs import pack
from finetune_trainer.data.problems import Problem, Problems
from finetune_trainer.data.readers import Row
from finetune_trainer.data.report import TextTally, TokenTally, warnings
from finetune_trainer.data.rows import TEXT_COLUMNS, RowWriter, open_rows
from finetune_trainer.data.samples import samples_of
from finetune_trainer.data.sources import DataFile, NamedFile, SizedFile
from finetune_trainer.data.splits import TRAINING, VALIDATION, held_out, source_column, split
from finetune_trainer.data.stream import RowEncoder, Stream
from finetune_trainer.data.templates import ChatTemplate
from finetune_trainer.data.workers import encode_all

if TYPE_CHECKING:
    from datasets import Dataset

DETECTION_ROWS = 50
"""Rows that are looked at for the format: more than one, since the first may be the broken one."""
PROGRESS_ROWS = 1000
"""Rows between two calls of the progress callback."""

Progress = Callable[[str, int], None]
"""Called with `training` or `validation`, or `packed training` and so on, and the rows done so far."""


@dataclass(frozen=True)
class Built:
    """What stands in the folder when all rows are encoded.

    Attributes:
        files: those that the held-out rows come from; without such rows, those of the training rows.
        format: of these files; none where there are none.
        parts: the rows that are trained on, unless they are streamed, and those that are held out, if there are any.
        held: the rows of the training files that are held out.
    """

    folder: Path
    files: list[NamedFile]
    format: str | None
    parts: dict[str, Dataset]
    held: list[int]

    def held_out(self, count: int) -> list[int]:
        """Numbers of held-out rows in the files, at most so many where they have files of their own."""
        if self.held or VALIDATION not in self.parts:
            return self.held
        return [int(source) for source in source_column(self.parts[VALIDATION])[:count]]


@dataclass(frozen=True)
class Builder(ABC):
    """The settings of a preparation; `build` does it."""

    spec: DatasetSpec
    task: TaskType
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    seed: int
    processes: int
    progress: Progress

    @property
    @abstractmethod
    def columns(self) -> pa.Schema:
        """The columns of encoded rows."""

    @abstractmethod
    def encoder(self, row_format: str, part: str, folder: Path) -> RowEncoder:
        """What encodes the rows of a part.

        The training rows are in the folder when it is asked for validation, unless they are streamed.
        """

    @abstractmethod
    def tally(self, row_format: str) -> TokenTally:
        """What counts the results."""

    @property
    def limit(self) -> str:
        """What longer rows are cut to, in words."""
        return f"hyperparameters.maxLength {self.max_length}"

    def hold_out(self, rows: Dataset, fraction: float) -> list[int]:
        """The source rows to hold out of the encoded training rows."""
        return held_out(source_column(rows), fraction, self.seed)

    @abstractmethod
    def complete(self, built: Built) -> dict[str, Any]:
        """Write what belongs to the rows; what the report says of it, its `warnings` among the others."""

    def trained(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A sample of a stream, as a row of what was prepared: plain lists and numbers."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in sample.items()}

    def build(self, folder: Path, files: list[NamedFile], others: list[NamedFile], ignored: list[str]) -> None:
        """Write everything into the folder.

        Args:
            files: those of dataset.uri; none where they are streamed.
            others: those of dataset.validation.uri.
            ignored: names of files that were left out.
        """
        given = {TRAINING: files, VALIDATION: others}
        tallies = {part: self._encode(part, found, folder) for part, found in given.items() if found}
        formats = [tally.format for tally in tallies.values()] or [None]
        held: list[int] = []
        if files and not others and self.spec.validation and self.spec.validation.fraction:
            held = self.hold_out(open_rows(folder / f"{TRAINING}.arrow"), self.spec.validation.fraction)
        parts = split(folder, held)
        more = self.complete(Built(folder, others or files, formats[-1], parts, held))
        report = {
            "format": formats[0],
            "rows": {name: len(part) for name, part in parts.items()},
            "ignoredFiles": ignored,
            **more,
            "warnings": [*warnings(tallies, ignored, self.limit), *more.get("warnings", [])],
            **{name: tally.report(self.tokenizer) for name, tally in tallies.items()},
        }
        write_json(folder / "held-out.json", held)
        write_json(folder / "report.json", report)

    def stream(self, files: Sequence[SizedFile], processes: int) -> tuple[Stream, dict[str, Any]]:
        """The files as a stream, and what its first rows show, for the report.

        Args:
            processes: see Stream.

        Raises:
            DataError: one of the first rows cannot be used and onInvalidRow is Fail.
        """
        head, _ = self._opened(files)
        tally = self.tally(self._format(head).name)
        stream = Stream(
            files=files,
            columns=self.spec.columns,
            encoder=self.encoder(tally.format, TRAINING, Path()),
            new_tally=partial(self.tally, tally.format),
            trained=self.trained,
            limit=self.limit,
            seed=self.seed,
            drop=self.spec.on_invalid_row is InvalidRowPolicy.DROP,
            processes=processes,
        )
        for result in stream.encoder(head):
            stream.count(result, tally)
        return stream, {"format": tally.format, TRAINING: {"sample": tally.sample(self.tokenizer)}}

    def _opened(self, files: Sequence[DataFile]) -> tuple[list[Row | Problem], Iterator[Row | Problem]]:
        """The first rows, and the others."""
        items = sources.read(files, self.spec.columns)
        return list(islice(items, DETECTION_ROWS)), items

    def _encode(self, part: str, files: list[NamedFile], folder: Path) -> TokenTally:
        """Encode all rows of the files into the part's file.

        Raises:
            DataError: a row cannot be used and onInvalidRow is Fail, or no row can be used.
        """
        head, items = self._opened(files)
        tally = self.tally(self._format(head).name)
        encoder = self.encoder(tally.format, part, folder)
        # closing: a callback that raises must not leave processes behind.
        with (
            RowWriter(folder / f"{part}.arrow", self.columns) as writer,
            closing(encode_all(encoder, chain(head, items), self.processes)) as results,
        ):
            for source, (_, result) in enumerate(results):
                tally.add(result)
                if not isinstance(result, Problem):
                    writer.add(result.samples(), source)
                if (source + 1) % PROGRESS_ROWS == 0:
                    self.progress(part, source + 1)
        self._must_be_usable(tally)
        return tally

    def _format(self, head: list[Row | Problem]) -> Format:
        if self.spec.format is not DatasetFormat.AUTO:
            return FORMATS[self.spec.format.value]
        rows = [item for item in head if isinstance(item, Row)]
        if not rows:
            problems = Problems()
            for item in head:
                problems.add(item)  # type: ignore[arg-type]
            advice = "repair these rows; without a readable one the format cannot be told"
            raise problems.error(f"correct dataset.columns, or {advice}" if self.spec.columns else advice)
        return detect((row.value for row in rows), self.task, f"{rows[0].file}:{rows[0].line}")

    def _must_be_usable(self, tally: TokenTally) -> None:
        if not tally.problems.count:
            return
        if self.spec.on_invalid_row is InvalidRowPolicy.FAIL:
            raise tally.problems.error("repair or remove these rows, or set dataset.onInvalidRow to Drop")
        if not tally.used:
            raise tally.problems.error("repair the dataset: not one of its rows can be used")


@dataclass(frozen=True)
class TextBuilder(Builder):
    """Conversations and texts, whose tokens are learned."""

    template: ChatTemplate | None
    packing: bool
    samples: int

    @property
    def columns(self) -> pa.Schema:
        return TEXT_COLUMNS

    def encoder(self, row_format: str, part: str, folder: Path) -> Encoder:
        return Encoder(Masker.of(self.tokenizer), self.template, row_format, self.max_length)

    def tally(self, row_format: str) -> TextTally:
        return TextTally(row_format)

    def complete(self, built: Built) -> dict[str, Any]:
        """Write packs and samples."""
        packs = {name: self._pack(name, part, built.folder) for name, part in built.parts.items()}
        wanted = built.held_out(self.samples * 10)
        samples = self._samples(built.files, FORMATS[built.format], wanted) if built.format else []
        write_json(built.folder / "samples.json", samples)
        return {"template": self.template.source if self.template else None, "packs": packs if self.packing else {}}

    def _pack(self, name: str, part: Dataset, folder: Path) -> int:
        if not self.packing:
            return 0
        progress = partial(self.progress, f"packed {name}")
        return len(pack(part, self.max_length, folder / f"{name}-packs.arrow", progress))

    def _samples(self, files: list[NamedFile], row_format: Format, wanted: list[int]) -> list[dict[str, Any]]:
        """Of held-out rows, read once more: the encoded ones no longer tell prompts from answers as people do."""
        rows = _canonical(sources.read(files, self.spec.columns), row_format, wanted)
        return [asdict(sample) for sample in samples_of(rows, self.tokenizer, self.samples, self.max_length)]


def _canonical(items: Iterable[Row | Problem], row_format: Format, wanted: list[int]) -> Iterator[Canonical]:
    """The wanted rows, by their numbers; reads no further than the last."""
    numbers = set(wanted)
    for number, item in enumerate(islice(items, max(wanted, default=-1) + 1)):
        if number in numbers and isinstance(item, Row):
            yield row_format.read(item.value)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
