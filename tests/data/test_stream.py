"""Streams: the order, its independence of ranks and processes, and going on from any position exactly."""

from __future__ import annotations

import gzip
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.job import DatasetSpec, TaskType
from finetune_trainer.data import order
from finetune_trainer.data.building import TextBuilder
from finetune_trainer.data.order import Bookmark, Window, ahead, windows
from finetune_trainer.data.stream import Feed, Stream
from finetune_trainer.errors import DataError
from finetune_trainer.inputs import StoredFile
from finetune_trainer.storage import ChangedError, Store
from tests.data import tokenizers

COUNTS = [7, 1, 12, 5]
"""Rows of the files of a dataset: 25, in windows of 4."""


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW_ROWS", 4)


def as_csv(texts: list[str]) -> bytes:
    return b"id,text\n" + b"".join(f'{i},"{text}\nand more"\n\n'.encode() for i, text in enumerate(texts))


def as_lines(texts: list[str]) -> bytes:
    return b"\xef\xbb\xbf" + b"".join(json.dumps({"text": text}).encode() + b"\r\n\n" for text in texts)


def as_array(texts: list[str]) -> bytes:
    return json.dumps([{"text": text} for text in texts], indent=1).encode()


def as_parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, row_group_size=3)
    return buffer.getvalue()


def zstd(raw: bytes) -> bytes:
    return bytes(pa.compress(raw, "zstd", asbytes=True))


KINDS: dict[str, Callable[[list[str]], bytes]] = {
    ".jsonl": as_lines,
    ".jsonl.gz": lambda texts: gzip.compress(as_lines(texts)),
    ".jsonl.zst": lambda texts: zstd(as_lines(texts)),
    ".json": as_array,
    ".json.gz": lambda texts: gzip.compress(as_array(texts)),
    ".csv": as_csv,
    ".csv.gz": lambda texts: gzip.compress(as_csv(texts)),
    ".csv.zst": lambda texts: zstd(as_csv(texts)),
    ".parquet": as_parquet,
    ".txt": lambda texts: "\n\n".join(texts).encode(),
}


def dataset(folder: Path, kind: str = ".jsonl", counts: list[int] = COUNTS) -> list[StoredFile]:
    """Files with numbered texts, listed."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for name, count in enumerate(counts):
        texts = [f"row {number + i} says ä" for i in range(count)]
        number += count
        (folder / f"{name}{kind}").write_bytes(KINDS[kind](texts))
    store = Store.connect({})
    return [StoredFile(store, info) for info in store.list(f"file://{folder}/")]


def places(found: Iterator[Window], count: int) -> list[tuple[Bookmark, list[Any]]]:
    return [(window.bookmark, window.items) for window in islice(found, count)]


def texts_of(found: list[tuple[Bookmark, list[Any]]], epoch: int) -> list[str]:
    return [item.value["text"] for bookmark, items in found if bookmark.epoch == epoch for item in items]


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_is_read_again_from_its_bookmark_in_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    files = dataset(tmp_path / "data", kind)
    found = places(windows(files, {}, 7, Bookmark()), 16)
    assert {bookmark.epoch for bookmark, _ in found} == {0, 1, 2}
    for i, (bookmark, _) in enumerate(found):
        assert places(windows(files, {}, 7, bookmark), len(found) - i) == found[i:]


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_has_every_row_once_with_the_line_it_stands_on(tmp_path: Path, kind: str) -> None:
    files = dataset(tmp_path / "data", kind)
    found = places(windows(files, {}, 7, Bookmark()), 14)
    lines = {(item.file, item.line): item.value["text"] for _, items in found for item in items}
    assert len(lines) == sum(COUNTS)
    for epoch in (0, 1):
        assert len(texts_of(found, epoch)) == len(set(texts_of(found, epoch))) == sum(COUNTS)
    assert texts_of(found, 0) != texts_of(found, 1)


def test_the_order_is_of_the_seed_and_nothing_else(tmp_path: Path) -> None:
    files = dataset(tmp_path / "data")
    one, same, other = (places(windows(files, {}, seed, Bookmark()), 7) for seed in (7, 7, 8))
    assert one == same
    assert texts_of(one, 0) != texts_of(other, 0)
    assert sorted(texts_of(one, 0)) == sorted(texts_of(other, 0))


def test_a_window_of_large_rows_ends_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW_BYTES", 30)
    files = dataset(tmp_path / "data", counts=[6])
    assert [len(items) for _, items in places(windows(files, {}, 7, Bookmark()), 3)] == [3, 3, 3]


def test_epochs_behind_grow_evenly_and_end_whole(tmp_path: Path) -> None:
    files = dataset(tmp_path / "data")
    found = islice(windows(files, {}, 7, Bookmark()), 14)
    shares = [window.epoch(rows) for window in found for rows in range(1, len(window.items) + 1)]
    assert shares == sorted(shares)
    assert shares[-1] == 2.0


def test_the_next_item_is_fetched_ahead_and_its_error_raised_when_it_is_due() -> None:
    fetched = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        fetched.set()
        yield 2
        raise DataError("a.jsonl:3: not JSON")

    found = ahead(items())
    assert next(found) == 1
    assert fetched.wait(10)
    assert next(found) == 2
    with pytest.raises(DataError, match="not JSON"):
        next(found)


def a_stream(
    files: list[StoredFile],
    *,
    row_format: str = "prompt-completion",
    max_length: int = 512,
    drop: bool = False,
    processes: int = 0,
) -> Stream:
    tokenizer = tokenizers.chatml()
    spec = DatasetSpec(uri="file:///data/")
    task = TaskType.CAUSAL_LM if row_format == "text" else TaskType.INSTRUCTION
    builder = TextBuilder(spec, task, tokenizer, max_length, 7, 1, lambda part, rows: None, None, False, 0)
    return Stream(
        files=files,
        columns={} if row_format == "text" else {"prompt": "text", "completion": "text"},
        encoder=builder.encoder(row_format, "training", Path()),
        new_tally=partial(builder.tally, row_format),
        trained=builder.trained,
        limit=builder.limit,
        seed=7,
        drop=drop,
        processes=processes,
    )


def taken(feed: Feed, count: int) -> list[list[int]]:
    return [sample["input_ids"] for sample in islice(feed, count)]


STREAMS: dict[str, dict[str, Any]] = {
    "whole rows": {},
    "split rows": {"row_format": "text", "max_length": 8},
    "dropped rows": {"drop": True},
}
"""Only of the first is known beforehand which rows a rank has to encode."""


def files_for(name: str, folder: Path) -> list[StoredFile]:
    files = dataset(folder)
    if name == "dropped rows":
        (folder / "4.jsonl").write_text('{"text": "fine"}\n{"text": ""}\nnot JSON\n{"text": "fine too"}\n')
    store = Store.connect({})
    return [StoredFile(store, info) for info in store.list(f"file://{folder}/")] if files else []


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_take_turns_in_one_order_that_does_not_depend_on_their_number(
    tmp_path: Path, name: str, ranks: int
) -> None:
    stream = a_stream(files_for(name, tmp_path / "data"), **STREAMS[name])
    alone = taken(Feed(stream, 0, 1), 120)
    shares = [taken(Feed(stream, rank, ranks), 120 // ranks) for rank in range(ranks)]
    assert [sample for turn in zip(*shares, strict=True) for sample in turn] == alone


@pytest.mark.parametrize("name", STREAMS)
def test_a_feed_goes_on_from_every_position_as_if_nothing_had_been(tmp_path: Path, name: str) -> None:
    stream = a_stream(files_for(name, tmp_path / "data"), **STREAMS[name])
    undisturbed = Feed(stream, 0, 1)
    whole = taken(undisturbed, 80)
    for used in range(1, 80, 3):
        first = Feed(stream, 0, 1)
        before = taken(first, used)
        state = json.loads(json.dumps(first.state()))
        again = Feed(stream, 0, 1)
        again.resume(state)
        assert before + taken(again, 80 - used) == whole
        assert again.tally.counts() == undisturbed.tally.counts()
        assert again.state() == undisturbed.state()


@pytest.mark.parametrize("name", STREAMS)
def test_another_number_of_ranks_goes_on_with_the_samples_that_were_not_used(tmp_path: Path, name: str) -> None:
    stream = a_stream(files_for(name, tmp_path / "data"), **STREAMS[name])
    whole = taken(Feed(stream, 0, 1), 90)
    three = [Feed(stream, rank, 3) for rank in range(3)]
    used = [taken(feed, 10) for feed in three]
    # The first rank's state is what is saved: it stands before the samples of the others.
    state = json.loads(json.dumps(three[0].state()))
    assert state["used"] == 30
    for ranks in (1, 2, 4):
        feeds = [Feed(stream, rank, ranks) for rank in range(ranks)]
        for feed in feeds:
            feed.resume(state)
        rest = sorted(sample for feed in feeds for sample in taken(feed, 60 // ranks))
        assert rest == sorted(whole[30:])
    assert [sample for turn in zip(*used, strict=True) for sample in turn] == whole[:30]


def test_processes_beside_change_nothing(tmp_path: Path) -> None:
    files = dataset(tmp_path / "data")
    expected = taken(Feed(a_stream(files), 0, 1), 120)
    feed = Feed(a_stream(files, processes=2), 0, 1)
    try:
        assert taken(feed, 120) == expected
    finally:
        feed.close()


def test_a_wrong_row_ends_a_stream_by_file_and_line_when_it_is_met(tmp_path: Path) -> None:
    files = dataset(tmp_path / "data")
    path = tmp_path / "data" / "2.jsonl"
    path.write_text(path.read_text("utf-8").replace('{"text": "row 15', '["row 15'), "utf-8")
    store = Store.connect({})
    files = [StoredFile(store, info) for info in store.list(f"file://{tmp_path}/data/")]
    feed = Feed(a_stream(files), 0, 1)
    with pytest.raises(DataError, match=r"/2\.jsonl:15: not JSON at column") as error:
        taken(feed, 25)
    assert "onInvalidRow to Drop" in error.value.advice
    assert len(taken(Feed(a_stream(files, drop=True), 0, 1), 60)) == 60


def test_dropped_rows_are_counted_once_in_every_epoch(tmp_path: Path) -> None:
    stream = a_stream(files_for("dropped rows", tmp_path / "data"), drop=True)
    feed = Feed(stream, 0, 1)
    taken(feed, 2 * 27)
    counts = feed.tally.counts()
    assert (counts["rows"], counts["dropped"]["count"]) == (54, 4)
    assert feed.warnings()[0].startswith("training: 4 of 58 rows were dropped; the first: file://")


def test_a_stream_of_nothing_but_wrong_rows_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 9)
    store = Store.connect({})
    stream = a_stream([StoredFile(store, info) for info in store.list(f"file://{tmp_path}/")], drop=True)
    for samples in (Feed(stream, 0, 1), stream):
        with pytest.raises(DataError, match=r"a\.jsonl:\d: completion is empty") as error:
            next(iter(samples))
        assert error.value.advice == "repair the dataset: not one of its rows can be used"


def test_a_changed_dataset_is_noticed_and_the_next_epoch_begun(tmp_path: Path) -> None:
    files = dataset(tmp_path / "data")
    feed = Feed(a_stream(files), 0, 1)
    taken(feed, 10)
    state = feed.state()
    changed = dataset(tmp_path / "data", counts=[*COUNTS, 3])
    again = Feed(a_stream(changed), 0, 1)
    again.resume(state)
    assert again.notes[0].startswith("the files of the dataset have changed since the last checkpoint; the stream beg")
    assert again.state()["used"] == 10
    assert taken(again, 28) == taken(fresh_at_epoch(a_stream(changed), 1), 28)
    assert again.tally.counts()["rows"] == 38
    assert again.state()["notes"] == again.notes


def fresh_at_epoch(stream: Stream, epoch: int) -> Feed:
    feed = Feed(stream, 0, 1)
    state = feed.state()
    state["position"]["bookmark"]["epoch"] = epoch
    feed.resume(state)
    return feed


def test_a_file_that_is_replaced_while_it_is_streamed_is_refused(tmp_path: Path) -> None:
    files = dataset(tmp_path / "data", counts=[5])
    (tmp_path / "data" / "0.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(ChangedError, match="was replaced after it was listed"):
        taken(Feed(a_stream(files), 0, 1), 1)


def test_a_look_at_a_stream_gives_the_rows_as_they_stand_and_moves_nothing(tmp_path: Path) -> None:
    stream = a_stream(dataset(tmp_path / "data"))
    decode = tokenizers.chatml().decode
    assert [decode(sample["input_ids"])[:6] for sample in islice(stream, 3)] == ["row 0 ", "row 1 ", "row 2 "]
    assert len(list(stream)) == sum(COUNTS)


def test_nothing_is_left_running_when_a_feed_is_closed(tmp_path: Path) -> None:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before, processes = set(threading.enumerate()), children.read_text()
    feed = Feed(a_stream(dataset(tmp_path / "data"), processes=2), 0, 1)
    taken(feed, 5)
    feed.close()
    readers = [thread for thread in set(threading.enumerate()) - before if thread.name == order.READER]
    for thread in readers:
        thread.join(10)
    assert not any(thread.is_alive() for thread in readers)
    assert children.read_text() == processes
