"""One reader for each kind of file: bytes -> rows with line numbers. Nothing here knows what a row means."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from json.decoder import JSONDecodeError
from typing import Any

from finetune_trainer.data.json_array import Window, values
from finetune_trainer.data.problems import Problem, kind
from finetune_trainer.errors import DataError

MAX_ROW_BYTES = 64 * 1024 * 1024
"""The longest row that is read: the bound of memory for files without line breaks."""
PARQUET_ROWS = 256
"""Rows of a parquet file that are held as Python objects at a time."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NOT_UTF8 = "the line is not UTF-8 text; convert the file, e.g. by `iconv -t utf-8`"
LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")


@dataclass(frozen=True)
class Row:
    """A row as it stands in the file; `line` is 1-based, for parquet the row's number."""

    file: str
    line: int
    value: dict[str, Any]


def text_lines(file: str, stream: io.BufferedReader) -> Iterator[Row | Problem]:
    """Every line that is not blank is one text."""
    for line, text in _lines(file, stream):
        if text is None:
            yield Problem(file, line, NOT_UTF8)
        elif text.strip():
            yield Row(file, line, {"text": text})


def json_lines(file: str, stream: io.BufferedReader) -> Iterator[Row | Problem]:
    """Every line that is not blank is one JSON object."""
    for line, text in _lines(file, stream):
        if text is None:
            yield Problem(file, line, NOT_UTF8)
        elif text.strip():
            yield _parsed(file, line, text)


def json_document(file: str, stream: io.BufferedReader) -> Iterator[Row | Problem]:
    """An array of objects, read object by object; or, as many write it, one object a line under this ending."""
    if stream.peek(1).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
        for line, value in values(Window(file, stream, MAX_ROW_BYTES)):
            yield _row(file, line, value)
    else:
        yield from json_lines(file, stream)


def comma_separated(file: str, stream: io.BufferedReader) -> Iterator[Row | Problem]:
    """A header line, then rows; quoted fields may go over lines, and `line` is where a row begins."""
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(_strict_lines(file, stream), strict=True)
    header: list[str] = []
    before = 0
    try:
        for cells in reader:
            line, before = before + 1, reader.line_num
            if not header:
                header = cells
            elif cells and len(cells) != len(header):
                yield Problem(file, line, f"{len(cells)} fields, where the header has {len(header)}")
            elif cells:
                yield Row(file, line, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(
            f"{file}:{before + 1}: not CSV: {error}", "quote fields with commas, line breaks or quotes in double quotes"
        ) from error


def parquet(file: str, stream: io.BufferedReader) -> Iterator[Row | Problem]:
    """Rows of a parquet file; `line` counts them from 1."""
    import pyarrow.parquet as pq

    line = 0
    for batch in pq.ParquetFile(stream).iter_batches(batch_size=PARQUET_ROWS):
        for value in batch.to_pylist():
            line += 1
            yield Row(file, line, value)


def _lines(file: str, stream: io.BufferedReader) -> Iterator[tuple[int, str | None]]:
    """(line number, text without its line break); None for what is not UTF-8."""
    line = 0
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        line += 1
        if len(raw) > MAX_ROW_BYTES:
            raise DataError(f"{file}:{line}: the line is longer than {MAX_ROW_BYTES >> 20} MiB", "split the row")
        if line == 1:
            # Windows tools put it before the first line; it is no part of the text.
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        try:
            yield line, raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            yield line, None


def _strict_lines(file: str, stream: io.BufferedReader) -> Iterator[str]:
    """For CSV, where a line that cannot be read leaves open where the next row begins."""
    for line, text in _lines(file, stream):
        if text is None:
            raise DataError(f"{file}:{line}: {NOT_UTF8}", "convert the file to UTF-8")
        yield text + "\n"


def _parsed(file: str, line: int, text: str) -> Row | Problem:
    try:
        return _row(file, line, json.loads(text))
    except JSONDecodeError as error:
        return Problem(file, line, _syntax(error, text.rstrip()))
    except RecursionError:
        return Problem(file, line, "the JSON is nested too deeply")


def _row(file: str, line: int, value: Any) -> Row | Problem:
    if isinstance(value, dict):
        return Row(file, line, value)
    return Problem(file, line, f'{kind(value)}, where a JSON object such as {{"text": "..."}} is needed')


def _syntax(error: JSONDecodeError, text: str) -> str:
    rest = text[error.pos :]
    if error.msg.startswith("Unterminated") or not rest or any(literal.startswith(rest) for literal in LITERALS):
        return f"the JSON is cut off: the line ends at column {len(text)} within a value; complete or remove it"
    return f"not JSON at column {error.colno}: {error.msg}"
