"""Reading files: what each kind yields, and how each fault is told. Formats are not looked at here."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_trainer.data.problems import Problem
from finetune_trainer.data.readers import Row
from finetune_trainer.data.sources import NamedFile, read, select
from finetune_trainer.errors import DataError

Write = Callable[[str, Any], NamedFile]
ROWS = [{"text": "one"}, {"text": "zwei: ä, 🙂"}, {"text": "three"}]


def zstd(raw: bytes) -> bytes:
    buffer = io.BytesIO()
    with pa.CompressedOutputStream(pa.PythonFile(buffer, mode="w"), "zstd") as stream:
        stream.write(raw)
        stream.flush()
        return _closed(stream, buffer)


def _closed(stream: pa.NativeFile, buffer: io.BytesIO) -> bytes:
    held = buffer
    held.close = lambda: None  # type: ignore[method-assign]
    stream.close()
    return held.getvalue()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def problems(file: NamedFile) -> list[str]:
    return [str(item) for item in read([file], {}) if isinstance(item, Problem)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.ndjson", lines(ROWS)),
        ("A.JSONL", lines(ROWS)),
        ("a.jsonl.gz", gzip.compress(lines(ROWS[:1])) + gzip.compress(lines(ROWS[1:]))),
        ("a.jsonl.zst", zstd(lines(ROWS[:1])) + zstd(lines(ROWS[1:]))),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("one-object-a-line.json", lines(ROWS)),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("a.csv", 'text\none\n"zwei: ä, 🙂"\nthree\n'.encode()),
        ("a.parquet", parquet(ROWS)),
        ("a.txt", "one\n\nzwei: ä, 🙂\r\n  \nthree".encode()),
        ("byte-order-mark.jsonl", b"\xef\xbb\xbf" + lines(ROWS)),
        ("byte-order-mark.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("byte-order-mark.csv", '\ufefftext\none\n"zwei: ä, 🙂"\nthree\n'.encode()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_file_gives_the_same_rows(data_file: Write, name: str, content: bytes) -> None:
    assert [item.value for item in read([data_file(name, content)], {}) if isinstance(item, Row)] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n', [1, 3]),
        ("a.json", b'[\n{"text":\n"a"},\n\n{"text": "b"}]', [2, 5]),
        ("a.csv", b'text\n"a\nb"\nc\n', [2, 4]),
        ("a.txt", b"a\n\nb\n", [1, 3]),
        ("a.parquet", parquet(ROWS[:2]), [1, 2]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_know_the_line_they_begin_on(data_file: Write, name: str, content: bytes, expected: list[int]) -> None:
    assert [item.line for item in read([data_file(name, content)], {})] == expected


def test_a_truncated_line_is_named_by_file_and_line(data_file: Write) -> None:
    file = data_file("conversations.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "c')
    (problem,) = problems(file)
    assert problem.startswith("s3://bucket/data/conversations.jsonl:3: the JSON is cut off")


@pytest.mark.parametrize("rest", ['{"text"', '{"text": "b', '{"text": "b"', '{"text": tru', '{"text": "b", '])
def test_a_line_is_cut_off_wherever_it_ends(data_file: Write, rest: str) -> None:
    (problem,) = problems(data_file("a.jsonl", f'{{"text": "a"}}\n{rest}\n'))
    assert "a.jsonl:2: the JSON is cut off: the line ends at column" in problem


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('["a"]', "a list, where a JSON object"),
        ('"a"', "a string, where a JSON object"),
        ("7", "a number, where a JSON object"),
        ("null", "null, where a JSON object"),
        ('{"text": "a" "more": 1}', "not JSON at column 14"),
        ("text: a", "not JSON at column 1"),
        ("[" * 100_000, "the JSON is nested too deeply"),
    ],
)
def test_a_line_that_is_no_object_says_what_it_is(data_file: Write, line: str, reason: str) -> None:
    file = data_file("a.jsonl", f'{{"text": "fine"}}\n{line}\n{{"text": "fine"}}\n')
    (problem,) = problems(file)
    assert problem.startswith(f"s3://bucket/data/a.jsonl:2: {reason}")
    assert sum(isinstance(item, Row) for item in read([file], {})) == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_that_is_not_utf8_is_named_and_the_next_ones_are_read(data_file: Write, name: str) -> None:
    good, bad = b'{"text": "good"}\n', '{"text": "Köln"}\n'.encode("latin-1")
    file = data_file(name, good + bad + good)
    assert "a." in problems(file)[0]
    assert ":2: the line is not UTF-8 text" in problems(file)[0]
    assert [item.line for item in read([file], {}) if isinstance(item, Row)] == [1, 3]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.csv", 'text\nfine\n"Köln"\n'.encode("latin-1"), "a.csv:3: the line is not UTF-8"),
        ("a.json", '[{"text": "fine"},\n{"text": "Köln"}]'.encode("latin-1"), "a.json:1: not a JSON array of objects"),
        ("a.json", b'[{"text": "fine"},\n{"text": "cut', "a.json:2: not a JSON array of objects: the array is cut off"),
        (
            "a.json",
            b'[{"text": "fine"},\n{"text": "a"}\n',
            "a.json:3: not a JSON array of objects: the array is cut off",
        ),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "a.json:2: not a JSON array of objects: expected ','"),
        (
            "a.json",
            b'[\n{"text" "this one is broken a good way before the end"},\n{"text": "b"}]',
            "a.json:2: not a JSON",
        ),
        ("a.csv", b'text\nfine\n"never closed\n', "a.csv:3: not CSV: unexpected end of data"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-12], "a.jsonl.gz: the file is damaged or cut off"),
        ("a.jsonl.gz", lines(ROWS), "a.jsonl.gz: the file is damaged or cut off after line 0"),
        ("a.jsonl.zst", zstd(lines(ROWS * 100))[:-12], "a.jsonl.zst: the file is damaged or cut off"),
        ("a.parquet", parquet(ROWS)[:-12], "a.parquet: the file is damaged or cut off"),
        ("a.parquet", b"no parquet at all", "a.parquet: the file is damaged or cut off"),
    ],
)
def test_a_file_whose_rest_cannot_be_read_is_refused_by_name(
    data_file: Write, name: str, content: bytes, place: str
) -> None:
    with pytest.raises(DataError) as refusal:
        list(read([data_file(name, content)], {}))
    assert refusal.value.message.startswith(f"s3://bucket/data/{place}")
    assert refusal.value.advice
    assert refusal.value.exit_code == 65


def test_a_csv_row_with_more_fields_than_the_header_is_named(data_file: Write) -> None:
    assert problems(data_file("a.csv", "text,more\na,b\na,b,c\na\n")) == [
        "s3://bucket/data/a.csv:3: 3 fields, where the header has 2",
        "s3://bucket/data/a.csv:4: 1 fields, where the header has 2",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b""), ("a.json", b"[]"), ("a.csv", b"text\n"), ("a.txt", b"\n \n"), ("a.parquet", parquet(ROWS)[:0])],
)
def test_an_empty_file_is_named(data_file: Write, name: str, content: bytes) -> None:
    if name == "a.parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), buffer)
        content = buffer.getvalue()
    assert problems(data_file(name, content)) == [f"s3://bucket/data/{name}: the file has no rows"]


def test_a_file_that_is_not_there_is_named_as_the_user_knows_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/gone\.jsonl: the file does not exist"):
        list(read([NamedFile("s3://bucket/gone.jsonl", tmp_path / "local")], {}))


def test_no_files_are_refused() -> None:
    with pytest.raises(DataError, match="the dataset has no files"):
        select([])


def test_files_of_unknown_kinds_are_left_out_beside_known_ones_and_named(data_file: Write) -> None:
    files = [data_file(name, "x") for name in ("z.jsonl", "README.md", "a.csv", "_SUCCESS", ".part.jsonl", "b.bin.gz")]
    usable, ignored = select(files)
    assert [file.name for file in usable] == ["s3://bucket/data/a.csv", "s3://bucket/data/z.jsonl"]
    assert len(ignored) == 4


def test_files_of_unknown_kinds_alone_are_refused_with_the_known_endings(data_file: Write) -> None:
    with pytest.raises(
        DataError, match=r"no file of the dataset has a known ending: s3://bucket/data/a\.xlsx"
    ) as refusal:
        select([data_file("a.xlsx", b"x")])
    assert ".jsonl" in refusal.value.advice
    assert ".zst" in refusal.value.advice


@pytest.mark.parametrize("name", ["big.jsonl", "big.json", "big.jsonl.gz", "big.csv"])
def test_a_big_file_is_read_in_bounded_memory(data_file: Write, name: str) -> None:
    rows = [{"text": "x" * 1000} for _ in range(20_000)]
    content = {
        "big.jsonl": lines(rows),
        "big.json": json.dumps(rows).encode(),
        "big.jsonl.gz": gzip.compress(lines(rows), 1),
        "big.csv": b"text\n" + b"".join(row["text"].encode() + b"\n" for row in rows),
    }[name]
    file = data_file(name, content)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read([file], {})) == len(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 1024 * 1024, "20 MB of rows were read"
