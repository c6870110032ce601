"""Bytes become the pixels that transformers' own pipelines would see, or an error in words."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from finetune_trainer.data.images.decoding import MAX_PIXELS, check, decoded
from finetune_trainer.data.problems import RowError
from tests.support.images import picture

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def encode(image: Image.Image, form: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def turned() -> bytes:
    """A photo taken with the camera on its side: orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(picture((200, 50, 40), (48, 32)), "JPEG", exif=exif)


def transparent() -> Image.Image:
    image = Image.new("RGBA", (8, 8), (10, 200, 30, 0))
    image.putpixel((0, 0), (250, 0, 0, 255))
    return image


SOURCES = {
    **{form: encode(picture((200, 50, 40), (40, 30)), form) for form in FORMATS},
    "turned": turned(),
    "gray": encode(picture((90, 90, 90)).convert("L")),
    "gray with alpha": encode(picture((90, 90, 90)).convert("LA")),
    "black and white": encode(picture((90, 90, 90)).convert("1")),
    "palette": encode(picture((200, 50, 40)).convert("P")),
    "palette with a transparent colour": encode(picture((200, 50, 40)).convert("P"), transparency=0),
    "transparent": encode(transparent()),
    "CMYK": encode(picture((200, 50, 40)).convert("CMYK"), "JPEG"),
    "progressive": encode(picture((200, 50, 40)), "JPEG", progressive=True),
}


@pytest.mark.parametrize("name", SOURCES)
def test_pixels_are_those_that_transformers_sees(tmp_path, name):
    file = tmp_path / "image"
    file.write_bytes(SOURCES[name])
    expected = np.array(load_image(str(file)))
    for source in (file, SOURCES[name]):
        image = decoded(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.array(image), expected)


def test_a_photo_taken_sideways_stands_upright():
    assert check(turned()) == (48, 32)
    assert decoded(turned()).size == (32, 48)


def test_of_an_animation_the_first_picture_is_taken():
    frames = [picture(color, (16, 16)) for color in ((250, 0, 0), (0, 0, 250))]
    red, _, blue = np.array(decoded(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))).mean((0, 1))
    assert red > blue + 100


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_an_image_that_is_cut_off_is_found_without_computing_it(form, share):
    data = encode(picture((200, 50, 40), (200, 150)), form)
    assert check(data) == (200, 150)
    for look in (check, decoded):
        with pytest.raises(RowError, match=r"damaged or cut off|cannot be opened"):
            look(data[: int(len(data) * share)])


def test_a_damaged_image_is_no_crash():
    data = bytearray(encode(picture((200, 50, 40), (64, 64))))
    for place in range(60, len(data) - 12, 97):
        data[place] ^= 0xFF
    with pytest.raises(RowError, match=r"damaged"):
        check(bytes(data))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the image is empty"),
        (b"cat,dog\n1,2\n", "the content is no image; images are JPEG, PNG, WEBP, BMP, GIF"),
        (encode(picture((200, 50, 40)), "TIFF"), "the content is no image"),
    ],
    ids=["empty", "text", "another format"],
)
def test_what_is_no_image_is_told_apart_from_what_is_broken(tmp_path, data, words):
    (tmp_path / "image.png").write_bytes(data)
    for source in (data, tmp_path / "image.png"):
        with pytest.raises(RowError, match=words):
            check(source)


def claiming(width: int, height: int) -> bytes:
    """A PNG of some bytes that says it has so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width", [MAX_PIXELS // 1000 + 1, 10 * MAX_PIXELS // 1000])
@pytest.mark.filterwarnings("ignore:Image size")
def test_a_decompression_bomb_is_refused_by_its_header(width):
    with pytest.raises(RowError, match=r"too large|more than 89,478,485 in all"):
        check(claiming(width, 1000))


def test_sixteen_bits_a_channel_are_refused_since_nobody_would_see_them_later():
    deep = Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16))
    with pytest.raises(RowError, match=r"more than 8 bits a channel .* convert it to 8 bits"):
        check(encode(deep))
