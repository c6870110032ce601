"""A JSON array read value by value, so that a file of any size needs the memory of one row."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from json.decoder import JSONDecodeError
from typing import Any

from finetune_trainer.errors import DataError

CHUNK_BYTES = 1024 * 1024
ADVICE = "repair the file, or write one JSON object a line (.jsonl)"


class Window:
    """A stretch of decoded text that moves over a stream, with the place in it and the line that place is on."""

    def __init__(self, file: str, stream: io.BufferedReader, limit: int) -> None:
        self.file = file
        self.line = 1
        self.text = ""
        self.place = 0
        self._stream = stream
        self._limit = limit
        # -sig: a byte order mark is no part of the text.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def grow(self) -> bool:
        """Drop what was read and read as much again as is held; False at the end of the file."""
        self.text, self.place = self.text[self.place :], 0
        if len(self.text) > self._limit:
            raise self.broken(f"a row longer than {self._limit >> 20} MiB")
        raw = self._stream.read(max(CHUNK_BYTES, len(self.text)))
        try:
            self.text += self._decoder.decode(raw, not raw)
        except UnicodeDecodeError as error:
            raise self.broken("not UTF-8 text") from error
        return bool(raw)

    def move(self, to: int) -> None:
        self.line += self.text.count("\n", self.place, to)
        self.place = to

    def mark(self) -> str:
        """Pass over space; the character that follows, or '' at the end of the file."""
        while True:
            while self.place < len(self.text):
                if not self.text[self.place].isspace():
                    return self.text[self.place]
                self.move(self.place + 1)
            if not self.grow():
                return ""

    def broken(self, reason: str, at: int | None = None) -> DataError:
        line = self.line + (self.text.count("\n", self.place, at) if at else 0)
        return DataError(f"{self.file}:{line}: not a JSON array of objects: {reason}", ADVICE)


def values(window: Window) -> Iterator[tuple[int, Any]]:
    """(line, value) of every element. A syntax error ends the file: where the next value begins is not known after it.

    Raises:
        DataError: the array is broken, cut off or not UTF-8; names file and line.
    """
    window.mark()
    window.move(window.place + 1)
    mark = window.mark()
    while mark != "]":
        yield window.line, _value(window)
        mark = window.mark()
        if mark == ",":
            window.move(window.place + 1)
            mark = window.mark()
        elif mark != "]":
            raise window.broken("expected ',' or ']' after a row" if mark else "the array is cut off")


def _value(window: Window) -> Any:
    decoder = json.JSONDecoder()
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.place)
        except JSONDecodeError as error:
            if not _may_go_on(error, window.text):
                raise window.broken(error.msg, error.pos) from error
            if not window.grow():
                raise window.broken("the array is cut off") from error
        except RecursionError as error:
            raise window.broken("nested too deeply") from error
        else:
            window.move(end)
            return value


def _may_go_on(error: JSONDecodeError, text: str) -> bool:
    """Whether more text could heal it: a string that does not end, or an error near the end."""
    return error.msg.startswith("Unterminated") or error.pos >= len(text) - len("-Infinity")
