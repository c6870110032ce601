"""One reader for each kind of file: bytes -> rows with line numbers. Nothing here knows what a row means."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from json.decoder import JSONDecodeError
from typing import Any

from finetune_trainer.data.json_array import Window, values
from finetune_trainer.data.problems import Problem, kind
from finetune_trainer.errors import DataError

MAX_ROW_BYTES = 64 * 1024 * 1024
"""The longest row that is read: the bound of memory for files without line breaks."""
PARQUET_ROWS = 256
"""Rows of a parquet file that are held as Python objects at a time."""
PARQUET_BYTES = 4 * 1024 * 1024
"""Bytes of a column that are read at a time: row groups may be larger than the memory."""
SKIPPED_BYTES = 1024 * 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NOT_UTF8 = "the line is not UTF-8 text; convert the file, e.g. by `iconv -t utf-8`"
LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")


@dataclass(frozen=True)
class Row:
    """A row as it stands in the file; `line` is 1-based, for parquet the row's number."""

    file: str
    line: int
    value: dict[str, Any]


@dataclass
class Place:
    """How far a file is read: rows, lines and (decompressed) bytes that lie behind.

    A reader begins there and moves `line` and `offset` along, as far as its kind of file has them; who takes the rows
    counts `rows`. Between two rows the three together are a place to go on from.
    """

    rows: int = 0
    line: int = 0
    offset: int = 0


def text_lines(file: str, stream: io.BufferedReader, place: Place) -> Iterator[Row | Problem]:
    """Every line that is not blank is one text."""
    _skip(stream, place.offset)
    for line, text in _lines(file, stream, place):
        if text is None:
            yield Problem(file, line, NOT_UTF8)
        elif text.strip():
            yield Row(file, line, {"text": text})


def json_lines(file: str, stream: io.BufferedReader, place: Place) -> Iterator[Row | Problem]:
    """Every line that is not blank is one JSON object."""
    _skip(stream, place.offset)
    for line, text in _lines(file, stream, place):
        if text is None:
            yield Problem(file, line, NOT_UTF8)
        elif text.strip():
            yield _parsed(file, line, text)


def json_document(file: str, stream: io.BufferedReader, place: Place) -> Iterator[Row | Problem]:
    """An array of objects, read object by object; or, as many write it, one object a line under this ending."""
    if stream.peek(1).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
        # Where a value begins shows only to who has read those before it.
        for line, value in islice(values(Window(file, stream, MAX_ROW_BYTES)), place.rows, None):
            yield _row(file, line, value)
    else:
        yield from json_lines(file, stream, place)


def comma_separated(file: str, stream: io.BufferedReader, place: Place) -> Iterator[Row | Problem]:
    """A header line, then rows; quoted fields may go over lines, and `line` is where a row begins."""
    csv.field_size_limit(MAX_ROW_BYTES)
    start = Place()
    before = 0
    try:
        header = next((cells for cells in _records(file, stream, start) if cells), [])
        if place.offset:
            _skip(stream, place.offset - start.offset)
        else:
            place.line, place.offset = start.line, start.offset
        before = place.line
        for cells in _records(file, stream, place):
            line, before = before + 1, place.line
            if cells and len(cells) != len(header):
                yield Problem(file, line, f"{len(cells)} fields, where the header has {len(header)}")
            elif cells:
                yield Row(file, line, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(
            f"{file}:{before + 1}: not CSV: {error}", "quote fields with commas, line breaks or quotes in double quotes"
        ) from error


def parquet(file: str, stream: io.BufferedReader, place: Place) -> Iterator[Row | Problem]:
    """Rows of a parquet file; `line` counts them from 1. Row groups that lie behind are passed over."""
    import pyarrow.parquet as pq

    # Without pre_buffer, which would fetch all row groups at once.
    table = pq.ParquetFile(stream, buffer_size=PARQUET_BYTES, pre_buffer=False)
    behind, line, groups = place.rows, 0, list(range(table.num_row_groups))
    while groups and line + table.metadata.row_group(groups[0]).num_rows <= behind:
        line += table.metadata.row_group(groups.pop(0)).num_rows
    for batch in table.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups):
        passed = min(behind - line, len(batch)) if behind > line else 0
        line += passed
        for value in batch.slice(passed).to_pylist():
            line += 1
            yield Row(file, line, value)


def _records(file: str, stream: io.BufferedReader, place: Place) -> Iterator[list[str]]:
    """The cells of CSV rows."""
    return csv.reader(_strict_lines(file, stream, place), strict=True)


def _skip(stream: io.BufferedReader, count: int) -> None:
    """Pass over bytes; a compressed stream has to read them."""
    if stream.seekable():
        stream.seek(count, io.SEEK_CUR)
        return
    while count and (passed := len(stream.read(min(count, SKIPPED_BYTES)))):
        count -= passed


def _lines(file: str, stream: io.BufferedReader, place: Place) -> Iterator[tuple[int, str | None]]:
    """(line number, text without its line break); None for what is not UTF-8."""
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        place.line += 1
        place.offset += len(raw)
        if len(raw) > MAX_ROW_BYTES:
            raise DataError(f"{file}:{place.line}: the line is longer than {MAX_ROW_BYTES >> 20} MiB", "split the row")
        if place.line == 1:
            # Windows tools put it before the first line; it is no part of the text.
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        try:
            yield place.line, raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            yield place.line, None


def _strict_lines(file: str, stream: io.BufferedReader, place: Place) -> Iterator[str]:
    """For CSV, where a line that cannot be read leaves open where the next row begins."""
    for line, text in _lines(file, stream, place):
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
