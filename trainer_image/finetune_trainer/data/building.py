"""Dataset files -> a folder with encoded rows, packs, samples and the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from finetune_api.job import DatasetFormat, DatasetSpec, InvalidRowPolicy, TaskType
from finetune_trainer.data import sources
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.formats import FORMATS, Canonical, Format, detect
from finetune_trainer.data.masks import Masker
from finetune_trainer.data.packing import pack
from finetune_trainer.data.problems import Problem, Problems
from finetune_trainer.data.readers import Row
from finetune_trainer.data.report import Tally, warnings
from finetune_trainer.data.rows import RowWriter, open_rows
from finetune_trainer.data.samples import samples_of
from finetune_trainer.data.sources import NamedFile
from finetune_trainer.data.splits import TRAINING, VALIDATION, held_out, source_column, split
from finetune_trainer.data.templates import ChatTemplate
from finetune_trainer.data.workers import encode_all

if TYPE_CHECKING:
    from datasets import Dataset

DETECTION_ROWS = 50
"""Rows that are looked at for the format: more than one, since the first may be the broken one."""
PROGRESS_ROWS = 1000
"""Rows between two calls of the progress callback."""

Progress = Callable[[str, int], None]
"""Called with `training` or `validation` and the rows done so far."""


@dataclass(frozen=True)
class Builder:
    """The settings of a preparation; `build` does it."""

    spec: DatasetSpec
    task: TaskType
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    max_length: int
    seed: int
    packing: bool
    samples: int
    processes: int
    progress: Progress

    def build(self, folder: Path, files: list[NamedFile], others: list[NamedFile], ignored: list[str]) -> None:
        """Write everything into the folder; `others` are the files of dataset.validation.uri."""
        tallies = {TRAINING: self._encode(TRAINING, files, folder)}
        held: list[int] = []
        if others:
            tallies[VALIDATION] = self._encode(VALIDATION, others, folder)
        elif self.spec.validation and self.spec.validation.fraction:
            rows = open_rows(folder / f"{TRAINING}.arrow")
            held = held_out(source_column(rows), self.spec.validation.fraction, self.seed)
        parts = split(folder, held)
        packs = self._pack(folder, parts) if self.packing else {}
        last = tallies[VALIDATION if others else TRAINING]
        rows_held = source_column(parts[VALIDATION])[: self.samples * 10].tolist() if others else held
        report = {
            "format": tallies[TRAINING].format,
            "template": self.template.source if self.template else None,
            "rows": {name: len(part) for name, part in parts.items()},
            "packs": packs,
            "ignoredFiles": ignored,
            "warnings": warnings(tallies, ignored, self.max_length),
            **{name: tally.report(self.tokenizer) for name, tally in tallies.items()},
        }
        samples = self._samples(others or files, FORMATS[last.format], rows_held)
        _write_json(folder / "held-out.json", held)
        _write_json(folder / "report.json", report)
        _write_json(folder / "samples.json", samples)

    def _encode(self, part: str, files: list[NamedFile], folder: Path) -> Tally:
        """Encode all rows of the files into the part's file.

        Raises:
            DataError: a row cannot be used and onInvalidRow is Fail, or no row can be used.
        """
        items = sources.read(files)
        head = list(islice(items, DETECTION_ROWS))
        tally = Tally(self._format(head).name)
        encoder = Encoder(Masker.of(self.tokenizer), self.template, tally.format, self.max_length)
        # closing: a callback that raises must not leave processes behind.
        with (
            RowWriter(folder / f"{part}.arrow") as writer,
            closing(encode_all(encoder, chain(head, items), self.processes)) as results,
        ):
            for source, (_, result) in enumerate(results):
                tally.add(result)
                if not isinstance(result, Problem):
                    writer.add(result, source)
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
            raise problems.error("repair these rows; without a readable one the format cannot be told")
        return detect((row.value for row in rows), self.task, f"{rows[0].file}:{rows[0].line}")

    def _must_be_usable(self, tally: Tally) -> None:
        if not tally.problems.count:
            return
        if self.spec.on_invalid_row is InvalidRowPolicy.FAIL:
            raise tally.problems.error("repair or remove these rows, or set dataset.onInvalidRow to Drop")
        if not tally.used:
            raise tally.problems.error("repair the dataset: not one of its rows can be used")

    def _pack(self, folder: Path, parts: dict[str, Dataset]) -> dict[str, int]:
        """Write the packs of each part; returns how many there are."""
        return {name: len(pack(part, self.max_length, folder / f"{name}-packs.arrow")) for name, part in parts.items()}

    def _samples(self, files: list[NamedFile], row_format: Format, wanted: list[int]) -> list[dict[str, Any]]:
        """Of held-out rows, read once more: the encoded ones no longer tell prompts from answers as people do."""
        rows = _canonical(sources.read(files), row_format, wanted)
        return [asdict(sample) for sample in samples_of(rows, self.tokenizer, self.samples, self.max_length)]


def _canonical(items: Iterable[Row | Problem], row_format: Format, wanted: list[int]) -> Iterator[Canonical]:
    """The wanted rows, by their numbers; reads no further than the last."""
    numbers = set(wanted)
    for number, item in enumerate(islice(items, max(wanted, default=-1) + 1)):
        if number in numbers and isinstance(item, Row):
            yield row_format.read(item.value)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
