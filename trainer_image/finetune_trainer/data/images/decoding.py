"""Bytes of an image -> pixels, in the way in which transformers' pipelines will read what the model is given later."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_trainer.data.problems import RowError

if TYPE_CHECKING:
    from PIL.Image import Image

Encoded = Path | bytes
"""A file, or what one would hold."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""Pillow knows fifty; each that is not needed is one more parser of bytes that come from anywhere."""
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
MAX_PIXELS = 89_478_485
"""A quarter of a gigabyte as RGB, where Pillow begins to warn of decompression bombs: a file of some kilobytes may ask
for any amount of memory."""


def decoded(source: Encoded) -> Image:
    """The image upright, in RGB, without its alpha channel; of an animation the first picture.

    As transformers.image_utils.load_image does it: turned by the EXIF orientation, then converted. What a model sees
    while it learns must be what it sees when it is used.

    Raises:
        RowError: it is no image of a known format, damaged, cut off, too large, or holds more than 8 bits a channel.
    """
    from PIL import ImageOps

    image = _opened(source)
    with image:
        _load(image)
        return ImageOps.exif_transpose(image).convert("RGB")


def check(source: Encoded) -> tuple[int, int]:
    """(width, height) in pixels of an image that can be decoded to its end; raises RowError as `decoded`."""
    image = _opened(source)
    with image:
        size = image.size
        # JPEG is read to its end, but computed at an eighth of its size only; other formats do not mind.
        image.draft(image.mode, (1, 1))
        _load(image)
    return size


def _opened(source: Encoded) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise RowError(f"the image is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise RowError(_what(source)) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise RowError(f"the image cannot be opened: {error}") from error
    _refuse(image)
    return image


def _what(source: Encoded) -> str:
    empty = source.stat().st_size == 0 if isinstance(source, Path) else not source
    return "the image is empty" if empty else f"the content is no image; images are {', '.join(FORMATS)}"


def _refuse(image: Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise RowError(f"the image has {width} x {height} pixels, and more than {MAX_PIXELS:,} in all are not decoded")
    if image.mode.startswith(("I", "F")):
        image.close()
        raise RowError(
            f"the image has more than 8 bits a channel (mode {image.mode}), which whoever uses the model with "
            "transformers would see cut off to white; convert it to 8 bits"
        )


def _load(image: Image) -> None:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged bytes raise whatever they stumble over
        raise RowError(f"the image is damaged or cut off: {error}") from error
