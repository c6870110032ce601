"""Datasets in a real bucket, prepared and streamed: every kind of file, and every way to name several."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import FineTuneJob, TaskType
from finetune_trainer.data import order
from finetune_trainer.data.preparation import PreparedText, prepare
from finetune_trainer.data.readers import Place
from finetune_trainer.data.sources import read_file
from finetune_trainer.data.stream import Feed, Stream
from finetune_trainer.errors import DataError, UnavailableError
from finetune_trainer.inputs import StoredFile, fetch_dataset
from finetune_trainer.storage import Store, TransferSettings
from tests.data import tokenizers
from tests.data.files import KINDS, as_jsonl
from tests.support.jobs import a_context
from tests.support.s3 import Proxy, S3Server

ROWS = [{"text": f"row {number} with ä and 🙂", "id": number} for number in range(10)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"question {number}?"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    }
    for number in range(10)
]
MIB = 1024 * 1024
QUICK = TransferSettings(patience_seconds=1.0, first_backoff_seconds=0.05, max_backoff_seconds=0.2)

Put = Callable[[str, bytes], None]


@pytest.fixture
def put(s3_server: S3Server, bucket: str) -> Put:
    client = s3_server.client()
    return lambda key, body: client.put_object(Bucket=bucket, Key=key, Body=body)


@pytest.fixture
def store(s3_server: S3Server) -> Iterator[Store]:
    with Store.connect(s3_server.environ()) as store:
        yield store


def prepared(store: Store, scratch: Path, uri: str, task: TaskType, **dataset: Any) -> PreparedText:
    """From the spec to rows, as a worker does it."""
    wire = {
        "task": {"type": task.value},
        "model": {"uri": "s3://models/none"},
        "dataset": {"uri": uri, **dataset},
        "strategy": {"type": "Full"},
        "output": {"uri": "s3://models/out"},
    }
    job = FineTuneJob.from_wire({"metadata": {"name": "tiny", "uid": "uid-1"}, "spec": wire})
    files, others = fetch_dataset(a_context(job, scratch), store)
    tokenizer = tokenizers.chatml()
    options = {"max_length": 512, "seed": 1, "scratch": scratch, "validation_files": others}
    return prepare(files, job.spec.dataset, task, tokenizer, **options)


def texts(samples: Any) -> list[str]:
    decode = tokenizers.chatml().decode
    return [str(decode(sample["input_ids"])).removesuffix("<|im_end|>") for sample in samples]


@pytest.mark.parametrize("ending", KINDS)
def test_every_kind_of_file_is_prepared_and_streamed_from_a_bucket(
    store: Store, put: Put, bucket: str, tmp_path: Path, ending: str
) -> None:
    put(f"data/rows{ending}", KINDS[ending](ROWS))
    uri, expected = f"s3://{bucket}/data/rows{ending}", [row["text"] for row in ROWS]
    on_disk = prepared(store, tmp_path / "one", uri, TaskType.CAUSAL_LM)
    assert texts(on_disk.train) == expected
    stream = prepared(store, tmp_path / "two", uri, TaskType.CAUSAL_LM, streaming=True).train
    assert isinstance(stream, Stream)
    assert sorted(texts(islice(Feed(stream, 0, 1), len(ROWS)))) == sorted(expected)


@pytest.mark.parametrize("ending", [ending for ending in KINDS if not ending.startswith(".txt")])
def test_conversations_come_from_every_kind_of_file_that_has_fields(
    store: Store, put: Put, bucket: str, tmp_path: Path, ending: str
) -> None:
    put(f"data/chats{ending}", KINDS[ending](CHATS))
    result = prepared(store, tmp_path, f"s3://{bucket}/data/", TaskType.INSTRUCTION)
    assert result.report["format"] == "messages"
    assert [text.count("answer") for text in texts(result.train)] == [1] * len(CHATS)


WAYS = {
    "a prefix": ("data/", range(6)),
    "a prefix without its slash": ("data", range(6)),
    "a glob in a folder": ("data/*.jsonl", (0, 1)),
    "a glob over folders": ("data/**/part-*", (3, 4, 5)),
    "a set of letters": ("data/[b-z].*", (1, 2)),
    "one object": ("data/c.csv.gz", (2,)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("streaming", [False, True])
def test_many_objects_of_several_kinds_are_named_by_a_prefix_or_a_glob(
    store: Store, put: Put, bucket: str, tmp_path: Path, way: str, streaming: bool
) -> None:
    names = ["a.jsonl", "b.jsonl", "c.csv.gz", "deep/part-0.parquet", "deep/part-1.json.zst", "deep/part-2.txt"]
    for number, name in enumerate(names):
        ending = name[name.index(".") :]
        put(f"data/{name}", KINDS[ending]([{"text": f"of file {number}, row {row}"} for row in range(3)]))
    for name in ("README.md", "_SUCCESS", ".hidden.jsonl"):
        put(f"other/{name}" if way.startswith("a set") else f"data/{name}", b"no rows")
    pattern, files = WAYS[way]
    result = prepared(store, tmp_path, f"s3://{bucket}/{pattern}", TaskType.CAUSAL_LM, streaming=streaming)
    expected = [f"of file {number}, row {row}" for number in files for row in range(3)]
    assert texts(result.train) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_row_is_named_by_its_address_in_the_bucket(
    store: Store, put: Put, bucket: str, tmp_path: Path, streaming: bool
) -> None:
    put("data/a.jsonl", as_jsonl(ROWS))
    put("data/b.jsonl.zst", KINDS[".jsonl.zst"](ROWS[:3]) + KINDS[".jsonl.zst"]([{"id": 1}]))
    with pytest.raises(
        DataError, match=rf"s3://{bucket}/data/b\.jsonl\.zst:4: text is missing; the fields here are id"
    ):
        prepared(store, tmp_path, f"s3://{bucket}/data/*", TaskType.CAUSAL_LM, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("field", "spec"), [("uri", {}), ("validation.uri", {"validation": True})])
def test_an_address_that_means_nothing_is_named_by_its_field(
    store: Store, put: Put, bucket: str, tmp_path: Path, streaming: bool, field: str, spec: dict[str, Any]
) -> None:
    missing, uri = f"s3://{bucket}/gone/*.jsonl", f"s3://{bucket}/a.jsonl"
    put("a.jsonl", as_jsonl(ROWS))
    spec = {"validation": {"uri": missing}} if spec else {}
    with pytest.raises(DataError, match=rf"spec\.dataset\.{field}: there is nothing at {missing[:20]}"):
        prepared(store, tmp_path, uri if spec else missing, TaskType.CAUSAL_LM, streaming=streaming, **spec)


def test_a_parquet_file_that_is_compressed_as_a_whole_is_refused_with_the_way_out(
    store: Store, put: Put, bucket: str, tmp_path: Path
) -> None:
    put("a.parquet.gz", b"anything")
    with pytest.raises(DataError, match=r"a\.parquet\.gz: a parquet file is read from its end") as error:
        prepared(store, tmp_path, f"s3://{bucket}/a.parquet.gz", TaskType.CAUSAL_LM)
    assert "unpack it" in error.value.advice


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with Proxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def far(s3_server: S3Server, proxy: Proxy) -> Iterator[Store]:
    with Store.connect(s3_server.environ(proxy.url), QUICK) as store:
        yield store


def large(ending: str) -> bytes:
    """About 6 MiB that do not compress well."""
    rows = [{"text": f"{number:06} {random.Random(number).randbytes(750).hex()}"} for number in range(4000)]
    return KINDS[ending](rows)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_resumed_stream_fetches_nothing_that_lies_before_its_window(
    far: Store, put: Put, proxy: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(order, "WINDOW_ROWS", 100)
    body = large(ending)
    put(f"large{ending}", body)
    files = [StoredFile(far, info) for info in far.list(f"s3://{bucket}/")]
    found = order.windows(files, {}, 7, order.Bookmark())
    expected = next(islice(found, 38, None))
    found.close()
    proxy.requests.clear()
    before = proxy.passed_bytes
    again = order.windows(files, {}, 7, expected.bookmark)
    assert next(again).items == expected.items
    again.close()
    assert proxy.passed_bytes - before < 0.35 * len(body), "the last of 40 windows, of which one MiB is read ahead"


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv.zst", ".json", ".parquet"])
def test_a_stream_rides_out_a_broken_connection(far: Store, put: Put, proxy: Proxy, bucket: str, ending: str) -> None:
    body = large(ending)
    put(f"large{ending}", body)
    (info,) = far.list(f"s3://{bucket}/")
    proxy.after(len(body) // 2, lambda: proxy.down_for(0.3))
    rows = list(read_file(StoredFile(far, info), {}, Place()))
    assert len(rows) == 4000
    assert rows[-1].value["text"].startswith("003999 ")


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.zst", ".parquet"])
def test_a_store_that_stays_away_is_told_as_that_and_not_as_damaged_data(
    far: Store, put: Put, proxy: Proxy, bucket: str, ending: str
) -> None:
    body = large(ending)
    put(f"large{ending}", body)
    (info,) = far.list(f"s3://{bucket}/")
    proxy.after(len(body) // 2, proxy.down)
    with pytest.raises(UnavailableError):
        list(read_file(StoredFile(far, info), {}, Place()))
