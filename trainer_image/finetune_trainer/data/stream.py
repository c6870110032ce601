"""Rows that are read, checked and encoded while training; nothing of them is on disk.

The samples of a stream are one endless sequence, the same whatever the number of ranks and processes: rows in the
order of order.py, each encoded into one sample or, a long text, several. Rank r of n takes those whose index leaves r
when divided by n. So the number of samples that were used says which ones, and the position that a checkpoint keeps is
one for all ranks: it stays right when their number changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import tee
from typing import Any, Protocol

from torch.utils.data import IterableDataset

from finetune_trainer.data.columns import Columns
from finetune_trainer.data.order import Bookmark, ahead, windows
from finetune_trainer.data.problems import Problem
from finetune_trainer.data.readers import Place, Row
from finetune_trainer.data.sources import SizedFile, read
from finetune_trainer.data.splits import TRAINING
from finetune_trainer.data.tally import Tally
from finetune_trainer.data.workers import here, in_processes

CHUNK_ROWS = 16
"""Rows that are encoded at a time: enough for a tokenizer, few enough that no step waits for rows of the next."""
FAIL_ADVICE = "repair or remove this row, or set dataset.onInvalidRow to Drop"
USELESS_ADVICE = "repair the dataset: not one of its rows can be used"
log = logging.getLogger(__name__)

Sample = dict[str, Any]


class RowEncoder(Protocol):
    """Turns rows into results, in order: a Problem, or what has `samples()`, a list of what the collator takes.

    Can be pickled. `splits` says whether a row may become several samples.
    """

    @property
    def splits(self) -> bool: ...

    def __call__(self, rows: Sequence[Row | Problem]) -> list[Any]: ...


@dataclass(frozen=True)
class Position:
    """The sample after the last one that was taken: window, number of its row there, number of the part of that row.

    `index` counts the samples before it, over all epochs and ranks.
    """

    bookmark: Bookmark = field(default_factory=Bookmark)
    row: int = 0
    part: int = 0
    index: int = 0

    @classmethod
    def of(cls, state: dict[str, Any]) -> Position:
        """From what `asdict` gives."""
        bookmark = state["bookmark"]
        return cls(**state | {"bookmark": Bookmark(**bookmark | {"place": Place(**bookmark["place"])})})


@dataclass(frozen=True)
class Ticket:
    """A row on its way: where it came from, the index of its first sample if that is known, and the epochs behind."""

    item: Row | Problem
    bookmark: Bookmark
    row: int
    index: int | None
    epoch: float


@dataclass(frozen=True, eq=False)
class Stream(IterableDataset[Sample]):
    """All samples of some files. Iterated over it gives them once, in the order of the files: for a look at the data.

    Args:
        encoder: how rows are read; the one that prepared data is made with.
        new_tally: makes the counters of a feed.
        trained: makes of an encoder's sample what the trainer's collator takes.
        limit: what longer rows are cut to, in words.
        drop: whether rows that cannot be used are left out and counted; else the first one ends the run.
        processes: that encode beside the training process; 0: it does so itself.
    """

    files: Sequence[SizedFile]
    columns: Columns
    encoder: RowEncoder
    new_tally: Callable[[], Tally]
    trained: Callable[[Sample], Sample]
    limit: str
    seed: int
    drop: bool
    processes: int = 0

    def __iter__(self) -> Iterator[Sample]:
        tally, found = self.new_tally(), False
        for _, result in here(self.encoder, read(self.files, self.columns), CHUNK_ROWS):
            self.count(result, tally)
            if not isinstance(result, Problem):
                found = True
                yield from map(self.trained, result.samples())
        if not found:
            raise tally.problems.error(USELESS_ADVICE)

    def count(self, result: Any, tally: Tally) -> None:
        """Count a result; raises DataError when it is a problem and rows may not be dropped."""
        tally.add(result)
        if isinstance(result, Problem) and not self.drop:
            raise tally.problems.error(FAIL_ADVICE)

    @property
    def listing(self) -> str:
        """A name for exactly these files, by which it is noticed that they have changed."""
        versions = json.dumps([(file.name, file.version) for file in self.files])
        return hashlib.sha256(versions.encode()).hexdigest()[:32]


class Feed(IterableDataset[Sample]):
    """What one rank trains on: its samples, from the position on, for ever."""

    def __init__(self, stream: Stream, rank: int, ranks: int) -> None:
        self.epoch = 0.0
        """Epochs that lie behind."""
        self.tally = stream.new_tally()
        self.notes: list[str] = []
        """What a user should know."""
        self._stream, self._rank, self._ranks = stream, rank, ranks
        self._position = Position()
        self._used_before, self._taken = 0, 0
        self._running: Generator[Sample, None, None] | None = None

    def __iter__(self) -> Iterator[Sample]:
        self.close()
        self._running = self._samples(self._position)
        return self._running

    def close(self) -> None:
        """End threads and processes."""
        if self._running is not None:
            self._running.close()

    def warnings(self) -> list[str]:
        """What a user should know of the rows until now, in sentences."""
        return [*self.notes, *(f"{TRAINING}: {text}" for text in self.tally.warnings(self._stream.limit))]

    def state(self) -> dict[str, Any]:
        """Where all ranks stand when each has taken as many samples as this one; JSON."""
        return {
            "listing": self._stream.listing,
            "used": self._used_before + self._taken * self._ranks,
            "position": asdict(self._position),
            "epoch": self.epoch,
            "tally": self.tally.state(),
            "notes": self.notes,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken; where the files have changed since, with the epoch after that one."""
        self._used_before, self._taken = state["used"], 0
        self.epoch, self.notes = state["epoch"], list(state["notes"])
        self.tally.restore(state["tally"])
        self._position = Position.of(state["position"])
        if state["listing"] != self._stream.listing:
            epoch = self._position.bookmark.epoch + 1
            note = f"the files of the dataset have changed since the last checkpoint; the stream begins epoch {epoch}"
            log.warning(note)
            self.notes.append(f"{note} of its files as they are now")
            self._position = Position(Bookmark(epoch), index=self._used_before)

    def _samples(self, start: Position) -> Generator[Sample, None, None]:
        index = start.index - start.part
        with closing(self._results(start)) as results:
            for ticket, result in results:
                # The row of which some parts were used is counted already.
                if not (start.part and (ticket.bookmark, ticket.row) == (start.bookmark, start.row)):
                    self._stream.count(result, self.tally)
                if isinstance(result, Problem):
                    self._must_be_of_use(ticket.bookmark.epoch)
                    continue
                index = index if ticket.index is None else ticket.index
                for part, sample in enumerate(result.samples(), 1):
                    if self._is_ours(index):
                        self._position = Position(ticket.bookmark, ticket.row, part, index + 1)
                        self._taken += 1
                        self.epoch = ticket.epoch
                        yield self._stream.trained(sample)
                    index += 1

    def _results(self, start: Position) -> Generator[tuple[Ticket, Any], None, None]:
        """Every row that is encoded, with what became of it, in order."""
        with closing(self._tickets(start)) as source:
            tickets, copies = tee(source)
            with closing(self._encoded(ticket.item for ticket in copies)) as results:
                for ticket, (_, result) in zip(tickets, results, strict=False):
                    yield ticket, result

    def _tickets(self, start: Position) -> Generator[Ticket, None, None]:
        """The rows that this rank has to encode: its own, if that can be told beforehand, else all."""
        stream = self._stream
        each_is_one = not stream.drop and not stream.encoder.splits
        index = start.index - start.part
        with closing(ahead(windows(stream.files, stream.columns, stream.seed, start.bookmark))) as found:
            for window in found:
                first = start.row if window.bookmark == start.bookmark else 0
                for row, item in enumerate(window.items[first:], first):
                    if not each_is_one or self._is_ours(index):
                        known = index if each_is_one else None
                        yield Ticket(item, window.bookmark, row, known, window.epoch(row + 1))
                    index += 1

    def _encoded(self, items: Iterator[Row | Problem]) -> Generator[tuple[Any, Any], None, None]:
        if self._stream.processes:
            return in_processes(self._stream.encoder, items, self._stream.processes, CHUNK_ROWS)
        return here(self._stream.encoder, items, CHUNK_ROWS)

    def _is_ours(self, index: int) -> bool:
        return index >= self._used_before and index % self._ranks == self._rank

    def _must_be_of_use(self, epoch: int) -> None:
        """Raise DataError after a whole epoch without a sample, lest the stream go round for ever."""
        if epoch > self._position.bookmark.epoch + 1:
            raise self.tally.problems.error(USELESS_ADVICE)
