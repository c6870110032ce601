"""The one way from dataset files to what is trained: read, encoded, checked, held out, packed, and kept for restarts.

Everything is a pure function of the files, the spec, the tokenizer and the seed, in this order and with any number of
processes: a run that is stopped and goes on elsewhere meets the same rows in the same places.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from finetune_api.job import DatasetSpec, TaskType
from finetune_trainer.data import sources
from finetune_trainer.data.building import Builder, Progress, TextBuilder
from finetune_trainer.data.columns import check_columns
from finetune_trainer.data.fingerprint import fingerprint
from finetune_trainer.data.once import build_once
from finetune_trainer.data.packing import COLUMNS
from finetune_trainer.data.prepared import Prepared
from finetune_trainer.data.rows import open_rows
from finetune_trainer.data.samples import Sample
from finetune_trainer.data.sources import NamedFile, SizedFile
from finetune_trainer.data.splits import TRAINING, VALIDATION, split
from finetune_trainer.data.stream import Stream
from finetune_trainer.data.templates import chat_template
from finetune_trainer.data.workers import usable_cores
from finetune_trainer.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

MAX_PROCESSES = 8
"""More only wait for the one that reads and writes, and each holds a tokenizer."""


@dataclass(frozen=True)
class PreparedText(Prepared):
    """Tokenised rows with the columns input_ids and labels, packed ones seq_lengths too.

    What is trained on is memory-mapped from scratch, or a Stream.

    Attributes:
        eos_token_ids: what generation_config.eos_token_id must be, so that generation stops where answers end.
        samples: held-out prompts with the answers that were expected.
        packed: whether the rows are packs, for packing.collator and packing.sft_arguments.
    """

    eos_token_ids: list[int]
    samples: list[Sample]
    packed: bool


def prepare(
    files: Sequence[NamedFile] | Sequence[SizedFile],
    spec: DatasetSpec,
    task: TaskType,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    scratch: Path,
    validation_files: Sequence[NamedFile] = (),
    packing: bool = False,
    samples: int = 3,
    processes: int | None = None,
    progress: Progress = lambda part, rows: None,
) -> PreparedText:
    """Prepare the dataset, or take up what another process on this machine has prepared.

    Args:
        files: the files of dataset.uri, on this machine unless they are streamed; validation_files those of
            dataset.validation.uri, if that is set.
        tokenizer: one without a chat template is given the default one.
        max_length: tokens; conversations are cut there, texts split.
        scratch: folder for what is prepared: 8 bytes a token, 16 when packing; nothing of a stream.
        processes: that tokenise; where not given as many as there are cores, at most MAX_PROCESSES, and for a stream
            none beside the training process.

    Raises:
        DataError: rows that cannot be used (under onInvalidRow Fail), or a dataset without usable rows.
        UsageError: the tokenizer cannot be used, or dataset.columns maps to a field that nothing reads.
    """
    template = chat_template(tokenizer) if task is TaskType.INSTRUCTION else None
    builder = TextBuilder(
        spec, task, tokenizer, max_length, seed, processes or usual_processes(), progress, template, packing, samples
    )
    folder = built(builder, files, validation_files, scratch, template, packing, samples)
    parts, report = _load(folder, packing), read_json(folder / "report.json")
    train, shown = streamed(builder, files, processes) if spec.streaming else (parts[TRAINING], {})
    ends = template.turn_ends if template else (tokenizer.eos_token,)
    return PreparedText(
        train=train,
        validation=parts.get(VALIDATION),
        report=report | shown,
        eos_token_ids=[tokenizer.convert_tokens_to_ids(token) for token in ends],
        samples=[Sample(**sample) for sample in read_json(folder / "samples.json")],
        packed=packing,
    )


def built(
    builder: Builder,
    files: Sequence[NamedFile] | Sequence[SizedFile],
    validation_files: Sequence[NamedFile],
    scratch: Path,
    *settings: object,
) -> Path:
    """The folder that the builder has made of the files, now or earlier.

    Args:
        files: those of dataset.uri; nothing is made of them where they are streamed.
        settings: what the rows depend on beside the settings of every builder.
    """
    if not builder.tokenizer.is_fast:
        raise UsageError(
            f"model.uri: {type(builder.tokenizer).__name__} does not tell which characters a token stands for",
            "add the tokenizer.json of its fast version to the model",
        )
    check_columns(builder.spec, builder.task)
    usable, ignored = sources.select(files)
    others = sources.select(validation_files)[0] if validation_files else []
    common = (len(usable), builder.spec, builder.task, builder.max_length, builder.seed)
    on_disk = [] if builder.spec.streaming else usable
    folder = scratch / "prepared" / fingerprint([*on_disk, *others], builder.tokenizer, *common, *settings)
    build_once(folder, lambda partial: builder.build(partial, on_disk, others, ignored))
    return folder


def streamed(builder: Builder, files: Sequence[SizedFile], processes: int | None) -> tuple[Stream, dict[str, Any]]:
    """The files as a stream, and what the report says of it; see Builder.stream."""
    return builder.stream(sources.select(files)[0], processes or 0)


def usual_processes() -> int:
    """How many encode where nobody says it."""
    return min(usable_cores(), MAX_PROCESSES)


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _load(folder: Path, packing: bool) -> dict[str, Dataset]:
    if packing:
        files = {name: folder / f"{name}-packs.arrow" for name in (TRAINING, VALIDATION)}
        return {name: open_rows(file) for name, file in files.items() if file.exists()}
    parts = split(folder, read_json(folder / "held-out.json"))
    return {name: part.select_columns(COLUMNS) for name, part in parts.items()}
