"""dataset.columns: the data's own names, for every kind of file and format, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.job import DatasetFormat, DatasetSpec, InvalidRowPolicy, TaskType
from finetune_trainer.data.columns import check_columns, renamed
from finetune_trainer.data.encoding import IGNORED
from finetune_trainer.data.preparation import Prepared, prepare
from finetune_trainer.data.problems import Problem
from finetune_trainer.data.readers import Row
from finetune_trainer.data.sources import NamedFile
from finetune_trainer.errors import DataError, UsageError
from tests.data import tokenizers

Write = Callable[[str, Any], NamedFile]
TURNS = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]


def prepared(file: NamedFile, scratch: Path, columns: dict[str, str], task: TaskType, **spec: Any) -> Prepared:
    dataset = DatasetSpec(uri="s3://bucket/data/*", columns=columns, **spec)
    return prepare([file], dataset, task, tokenizers.chatml(), max_length=512, seed=1, scratch=scratch)


def learned(result: Prepared) -> list[str]:
    rows = [[label for label in row["labels"] if label != IGNORED] for row in result.train]
    return [tokenizers.chatml().decode(row).removesuffix("<|im_end|>") for row in rows]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


FILES: list[tuple[str, Any, dict[str, str], TaskType, str]] = [
    ("a.csv", "id,review\n1,good\n", {"text": "review"}, TaskType.CAUSAL_LM, "text"),
    ("a.parquet", parquet([{"id": 1, "review": "good"}]), {"text": "review"}, TaskType.CAUSAL_LM, "text"),
    (
        "a.jsonl",
        [{"frage": "why?", "antwort": "good"}],
        {"prompt": "frage", "completion": "antwort"},
        TaskType.INSTRUCTION,
        "prompt-completion",
    ),
    (
        "a.json",
        json.dumps([{"task": "Say", "context": "", "response": "good"}]),
        {"instruction": "task", "input": "context", "output": "response"},
        TaskType.INSTRUCTION,
        "alpaca",
    ),
    (
        "b.jsonl",
        [{"dialog": [TURNS[0], {"from": "gpt", "value": "good"}], "persona": "kind"}],
        {"conversations": "dialog", "system": "persona"},
        TaskType.INSTRUCTION,
        "sharegpt",
    ),
    (
        "b.parquet",
        parquet([{"chat": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "good"}]}]),
        {"messages": "chat"},
        TaskType.INSTRUCTION,
        "messages",
    ),
]


@pytest.mark.parametrize(
    ("name", "content", "columns", "task", "row_format"), FILES, ids=[f"{file[0]}-{file[4]}" for file in FILES]
)
def test_mapped_columns_are_recognised_and_learned(
    data_file: Write, tmp_path: Path, name: str, content: Any, columns: dict[str, str], task: TaskType, row_format: str
) -> None:
    result = prepared(data_file(name, content), tmp_path / "scratch", columns, task)
    assert result.report["format"] == row_format
    assert [text[-3:] for text in learned(result)] == ["ood"]


def test_a_row_keeps_its_other_fields_and_may_exchange_two() -> None:
    row = Row("a.jsonl", 1, {"prompt": "a", "completion": "b", "id": 7})
    exchanged = renamed(row, {"prompt": "completion", "completion": "prompt"})
    assert exchanged == Row("a.jsonl", 1, {"prompt": "b", "completion": "a", "id": 7})


def test_one_column_may_serve_two_fields_and_replaces_what_bore_the_name() -> None:
    row = Row("a.jsonl", 1, {"review": "a", "text": "rendered before"})
    assert renamed(row, {"text": "review", "completion": "review"}) == Row(
        "a.jsonl", 1, {"text": "a", "completion": "a"}
    )


def test_a_row_without_a_mapped_column_is_named_by_file_and_line_with_both_names(
    data_file: Write, tmp_path: Path
) -> None:
    file = data_file("a.jsonl", [{"review": "good"}, {"opinion": "bad"}])
    with pytest.raises(DataError) as refusal:
        prepared(file, tmp_path, {"text": "review"}, TaskType.CAUSAL_LM)
    assert refusal.value.message == (
        "s3://bucket/data/a.jsonl:2: 'review', which dataset.columns maps to text, is missing; "
        "the fields here are opinion"
    )


def test_a_column_that_no_row_has_is_told_before_the_format_is_looked_for(data_file: Write, tmp_path: Path) -> None:
    file = data_file("a.csv", "text\ngood\n")
    with pytest.raises(
        DataError, match=r"a\.csv:2: 'reveiw', which dataset\.columns maps to text, is missing"
    ) as error:
        prepared(file, tmp_path, {"text": "reveiw"}, TaskType.CAUSAL_LM)
    assert "dataset.columns" in error.value.advice


def test_rows_without_a_mapped_column_may_be_dropped(data_file: Write, tmp_path: Path) -> None:
    file = data_file("a.jsonl", [{"review": "good"}, {"opinion": "bad"}])
    policy = {"on_invalid_row": InvalidRowPolicy.DROP}
    result = prepared(file, tmp_path, {"text": "review"}, TaskType.CAUSAL_LM, **policy)
    assert result.report["training"]["dropped"]["count"] == 1


def test_problems_pass_through() -> None:
    problem = Problem("a.jsonl", 1, "not JSON")
    assert renamed(problem, {"text": "review"}) is problem


def test_a_field_that_no_format_of_the_task_reads_is_refused_with_those_that_are() -> None:
    spec = DatasetSpec(uri="s3://b/a.csv", columns={"label": "stars"})
    with pytest.raises(UsageError) as refusal:
        check_columns(spec, TaskType.INSTRUCTION)
    assert refusal.value.message == (
        "spec.dataset.columns: label (mapped to 'stars') is no field of a format of task Instruction"
    )
    assert "alpaca (instruction, input, output, system)" in refusal.value.advice
    assert "text (text)" not in refusal.value.advice


def test_a_field_that_the_named_format_does_not_read_is_refused() -> None:
    spec = DatasetSpec(uri="s3://b/a.csv", columns={"prompt": "question"}, format=DatasetFormat.ALPACA)
    with pytest.raises(UsageError, match=r"prompt \(mapped to 'question'\) is no field of format alpaca"):
        check_columns(spec, TaskType.INSTRUCTION)


def test_another_mapping_is_another_dataset(data_file: Write, tmp_path: Path) -> None:
    file = data_file("a.csv", "one,two\nfirst,second\n")
    results = [prepared(file, tmp_path, {"text": column}, TaskType.CAUSAL_LM) for column in ("one", "two")]
    assert [learned(result)[0][-4:] for result in results] == ["irst", "cond"]
