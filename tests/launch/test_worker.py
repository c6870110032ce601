"""What a rank does for its log."""

from __future__ import annotations

import io

from finetune_trainer.worker import RankedStream


class Recorded(io.StringIO):
    """Remembers each write, as a pipe that several ranks share would see it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


def test_whole_lines_are_written_at_once_with_the_rank_before_each() -> None:
    shared = Recorded()
    print("one", "line\nand another", file=RankedStream(shared, 3))
    assert shared.writes == ["[rank 3] one line\n", "[rank 3] and another\n"]


def test_a_line_without_an_end_comes_out_when_flushed() -> None:
    shared = Recorded()
    stream = RankedStream(shared, 3)
    stream.write("half")
    assert shared.writes == []
    stream.flush()
    stream.flush()
    assert shared.getvalue() == "[rank 3] half"
