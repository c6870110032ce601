"""The order in which a stream comes: a pure function of the files, the seed, the epoch and the position.

In every epoch the files are permuted and their rows read one after the other, in windows of consecutive rows; each
window is shuffled by itself. A window has a bookmark, from which it can be read again without what lies before it:
the file, and how far in it. A file whose end must be read first (compressed ones, JSON arrays) is read again from its
own beginning, but not parsed again where lines can be counted by bytes.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from finetune_trainer.data.columns import Columns
from finetune_trainer.data.problems import Problem
from finetune_trainer.data.readers import Place, Row
from finetune_trainer.data.sources import SizedFile, read_file

WINDOW_ROWS = 8192
"""Rows among which is shuffled: the more the better mixed, but a resumed run reads its window again first."""
WINDOW_BYTES = 32 * 1024 * 1024
"""A window ends before, when its rows hold so many characters and bytes: long texts and images fill the memory."""

READER = "stream-reader"
"""Name of the thread that reads ahead."""

T = TypeVar("T")


@dataclass(frozen=True)
class Bookmark:
    """Where a window begins: the epoch and the window, from 0; the file's number in the epoch, and the place in it."""

    epoch: int = 0
    window: int = 0
    shard: int = 0
    place: Place = field(default_factory=Place)


@dataclass(frozen=True)
class Window:
    """Some rows, in the order in which they are used, where they were read, and which share of the epoch they are."""

    bookmark: Bookmark
    items: list[Row | Problem]
    begin: float
    end: float

    def epoch(self, rows: int) -> float:
        """Epochs that lie behind after so many of these rows."""
        return self.bookmark.epoch + self.begin + (self.end - self.begin) * rows / len(self.items)


def windows(files: Sequence[SizedFile], columns: Columns, seed: int, start: Bookmark) -> Iterator[Window]:
    """All windows from a bookmark on; after the last one of an epoch comes the first one of the next, for ever."""
    while True:
        yield from _epoch(files, columns, seed, start)
        start = Bookmark(start.epoch + 1)


def shuffled(items: Sequence[T], *key: int) -> list[T]:
    """A permutation that depends on the numbers of the key alone."""
    found = list(items)
    # A string is hashed by SHA-512, not by what differs from process to process.
    random.Random(":".join(map(str, key))).shuffle(found)
    return found


def _epoch(files: Sequence[SizedFile], columns: Columns, seed: int, start: Bookmark) -> Iterator[Window]:
    shards = shuffled(files, seed, start.epoch)
    bookmark, items, size = start, [], 0
    for shard in range(start.shard, len(shards)):
        place = replace(start.place) if shard == start.shard else Place()
        for item in read_file(shards[shard], columns, place):
            items.append(item)
            size += _size(item.value) if isinstance(item, Row) else 0
            if len(items) >= WINDOW_ROWS or size >= WINDOW_BYTES:
                following = Bookmark(start.epoch, bookmark.window + 1, shard, replace(place))
                yield _window(shards, seed, bookmark, items, _share(shards, following))
                bookmark, items, size = following, [], 0
    if items:
        yield _window(shards, seed, bookmark, items, 1.0)


def _window(
    shards: Sequence[SizedFile], seed: int, bookmark: Bookmark, items: list[Row | Problem], end: float
) -> Window:
    mixed = shuffled(items, seed, bookmark.epoch, bookmark.window)
    return Window(bookmark, mixed, _share(shards, bookmark), end)


def _share(shards: Sequence[SizedFile], bookmark: Bookmark) -> float:
    """How much of an epoch lies before a bookmark, by bytes; of compressed files roughly."""
    sizes = [shard.size for shard in shards]
    behind = sum(sizes[: bookmark.shard]) + min(bookmark.place.offset, sizes[bookmark.shard])
    return behind / max(sum(sizes), 1)


def _size(value: Any) -> int:
    """Characters and bytes in a row; what is neither counts as a number."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items, of which a thread fetches the next one while this one is worked on. For endless iterators."""
    wanted: SimpleQueue[bool] = SimpleQueue()
    found: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
    # A daemon: when the trainer leaves, nobody waits for a store that does not answer.
    Thread(target=_fetch, args=(items, wanted, found), daemon=True, name=READER).start()
    wanted.put(True)
    try:
        while True:
            item, error = found.get()
            if error is not None:
                raise error
            wanted.put(True)
            yield item  # type: ignore[misc]
    finally:
        wanted.put(False)


def _fetch(items: Iterator[T], wanted: SimpleQueue[bool], found: SimpleQueue[Any]) -> None:
    while wanted.get():
        try:
            found.put((next(items), None))
        except BaseException as error:
            found.put((None, error))
            return
