"""Every image is decoded once before training: one that is broken is named now, not after hours."""

from __future__ import annotations

import base64
import io
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from finetune_trainer.data.images.decoding import Encoded, check, decoded
from finetune_trainer.data.images.found import Picture
from finetune_trainer.data.images.index import row_of
from finetune_trainer.data.labels import ClassLabel
from finetune_trainer.data.problems import Problem, RowError

IN_FLIGHT = 4
"""Images for each thread that are read and wait, so that memory stays bounded."""
THUMBNAIL_PIXELS = 72


@dataclass(frozen=True)
class Looked:
    """An image that can be decoded, with the name of its class for a label, and its width and height."""

    picture: Picture
    size: tuple[int, int]

    def samples(self) -> list[dict[str, Any]]:
        """The one row that becomes of it."""
        return [row_of(self.picture)]


def look_at_all(
    pictures: Iterable[Picture | Problem], labels: ClassLabel, threads: int
) -> Generator[Looked | Problem, None, None]:
    """Every item in order, with the size of the image or with what is wrong with it.

    In threads, not processes: Pillow's decoders let go of the interpreter's lock.
    """
    waiting: deque[Future[Looked | Problem]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="images") as pool:
        for picture in pictures:
            waiting.append(pool.submit(look, picture, labels))
            if len(waiting) >= threads * IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def look(picture: Picture | Problem, labels: ClassLabel) -> Looked | Problem:
    """An image with its size, or what is wrong with it or with its label."""
    if isinstance(picture, Problem):
        return picture
    try:
        return Looked(replace(picture, label=labels.read(picture.label)), check(picture.source))
    except RowError as error:
        return Problem(picture.file, picture.line, str(error))


def thumbnail(source: Encoded) -> str:
    """A small JPEG as a data URI, about 2 KB, for the report."""
    image = decoded(source)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
