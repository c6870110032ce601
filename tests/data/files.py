"""Rows as every kind of file that can be read."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]


def zstd(raw: bytes) -> bytes:
    return bytes(pa.compress(raw, "zstd", asbytes=True))


def as_jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(rows: Rows) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def as_csv(rows: Rows) -> bytes:
    """Lists are written as JSON."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows({key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows)
    return text.getvalue().encode()


def as_parquet(rows: Rows) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=max(4, len(rows) // 20))
    return buffer.getvalue()


def as_txt(rows: Rows) -> bytes:
    return "".join(row["text"] + "\n" for row in rows).encode()


PLAIN: dict[str, Callable[[Rows], bytes]] = {
    ".jsonl": as_jsonl,
    ".ndjson": as_jsonl,
    ".json": as_json,
    ".csv": as_csv,
    ".txt": as_txt,
}
KINDS: dict[str, Callable[[Rows], bytes]] = {
    **PLAIN,
    **{f"{ending}.gz": lambda rows, write=write: gzip.compress(write(rows)) for ending, write in PLAIN.items()},
    **{f"{ending}.zst": lambda rows, write=write: zstd(write(rows)) for ending, write in PLAIN.items()},
    ".parquet": as_parquet,
}
"""How a file with this ending is written."""
