"""Checksums of objects, computed block by block in any order and put together afterwards.

CRC32 is ours: of what Python computes without the interpreter lock it is the fastest by far (ISA-L folds it nine times
as fast as zlib; SHA-256 and MD5 are slower than that), S3 stores it for whole objects, and the CRCs of parts combine to
the CRC of the whole, so parallel parts need no second pass. It guards against accidents, not against forgers: TLS and
the bucket's permissions do that. MD5 is computed only where it is all that the server offers.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

READ_BYTES = 1024 * 1024
MD5_ETAG = re.compile(r"[0-9a-f]{32}")
COMPOSITE_ETAG = re.compile(r"[0-9a-f]{32}-[0-9]+")
POLYNOMIAL = 0xEDB88320
"""CRC-32 of IEEE 802.3, bits reversed: bit 31 is the coefficient of x^0."""


def file_crc32(path: Path) -> str:
    """The CRC32 of a file as eight hexadecimal digits, as Uploaded and ObjectInfo carry it."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(READ_BYTES):
            crc = crc32(data, crc)
    return crc_hex(crc)


def crc_hex(crc: int) -> str:
    return f"{crc:08x}"


def crc_base64(crc: int) -> str:
    """As S3 writes it in headers."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode("ascii")


def combine_crc32(first: int, second: int, second_length: int) -> int:
    """The CRC32 of two blocks in a row from theirs: the first is moved by x^(8 * length) modulo the polynomial."""
    return _multiply(_power_of_x(8 * second_length), first) ^ second


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials over GF(2) modulo POLYNOMIAL."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product


def _power_of_x(exponent: int) -> int:
    result, square = 1 << 31, 1 << 30  # x^0 and x^1
    while exponent:
        if exponent & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        exponent >>= 1
    return result


class Kind(Enum):
    """How the checksum that a server gives was made."""

    CRC32 = auto()
    """Of the whole object."""
    CRC32_OF_PARTS = auto()
    """Of the CRCs of its parts."""
    MD5 = auto()
    """Of the whole object: the ETag of a plain PUT."""
    MD5_OF_PARTS = auto()
    """Of the MD5s of its parts: the ETag of a multipart PUT."""
    NONE = auto()
    """The server offers none that can be checked; size and ETag must do."""


@dataclass(frozen=True)
class Expectation:
    """What the blocks of an object must add up to. `part_bytes` is the size of all parts but the last, or 0."""

    kind: Kind
    value: bytes = b""
    part_bytes: int = 0

    @property
    def algorithm(self) -> str | None:
        if self.kind in (Kind.CRC32, Kind.CRC32_OF_PARTS):
            return "crc32"
        return None if self.kind is Kind.NONE else "md5"

    def is_met_by(self, blocks: Sequence[Block]) -> bool:
        """Whether the digests of all blocks, in order, give the expected value."""
        if self.kind is Kind.NONE:
            return True
        return self._of(blocks) == self.value

    def _of(self, blocks: Sequence[Block]) -> bytes:
        digests = b"".join(block.digest for block in blocks)
        if self.kind is Kind.CRC32:
            return whole_crc32(blocks).to_bytes(4, "big")
        if self.kind is Kind.CRC32_OF_PARTS:
            return crc32(digests).to_bytes(4, "big")
        if self.kind is Kind.MD5_OF_PARTS:
            return hashlib.md5(digests, usedforsecurity=False).digest()
        return digests  # MD5: one block


@dataclass(frozen=True)
class Block:
    """The digest of a run of bytes and how many they are."""

    digest: bytes
    length: int


def whole_crc32(blocks: Sequence[Block]) -> int:
    crc = 0
    for block in blocks:
        crc = combine_crc32(crc, int.from_bytes(block.digest, "big"), block.length)
    return crc


class BlockHasher:
    """Digests of consecutive blocks of a stream; the last may be shorter. `block_bytes` 0 means one block."""

    def __init__(self, algorithm: str | None, block_bytes: int = 0) -> None:
        self._algorithm = algorithm
        self._block_bytes = block_bytes
        self._blocks: list[Block] = []
        self._begin()

    def update(self, data: bytes | memoryview) -> None:
        if self._algorithm is None:
            return
        view = memoryview(data)
        while self._block_bytes and self._length + len(view) >= self._block_bytes:
            rest = self._block_bytes - self._length
            self._add(view[:rest])
            self._end()
            view = view[rest:]
        self._add(view)

    def blocks(self) -> list[Block]:
        """All blocks; nothing may be added afterwards."""
        if self._length:
            self._end()
        return self._blocks

    def _begin(self) -> None:
        self._crc, self._length = 0, 0
        self._md5 = hashlib.md5(usedforsecurity=False) if self._algorithm == "md5" else None

    def _add(self, view: memoryview) -> None:
        self._length += len(view)
        if self._md5 is not None:
            self._md5.update(view)
        else:
            self._crc = crc32(view, self._crc)

    def _end(self) -> None:
        digest = self._crc.to_bytes(4, "big") if self._md5 is None else self._md5.digest()
        self._blocks.append(Block(digest, self._length))
        self._begin()


def expectation(headers: dict[str, Any], part_bytes: int = 0) -> Expectation:
    """The best checksum in the parsed answer to a GET or HEAD; `part_bytes` is needed for those made of parts."""
    crc, kind = headers.get("ChecksumCRC32"), headers.get("ChecksumType")
    etag = str(headers.get("ETag", "")).strip('"')
    if crc and "-" not in crc and kind != "COMPOSITE":
        return Expectation(Kind.CRC32, base64.b64decode(crc))
    if crc and part_bytes:
        return Expectation(Kind.CRC32_OF_PARTS, base64.b64decode(crc.partition("-")[0]), part_bytes)
    if is_encrypted_by_key(headers):  # then the ETag is no MD5 of what we get
        return Expectation(Kind.NONE)
    if MD5_ETAG.fullmatch(etag):
        return Expectation(Kind.MD5, bytes.fromhex(etag))
    if part_bytes and COMPOSITE_ETAG.fullmatch(etag):
        return Expectation(Kind.MD5_OF_PARTS, bytes.fromhex(etag.partition("-")[0]), part_bytes)
    return Expectation(Kind.NONE)


def is_encrypted_by_key(headers: dict[str, Any]) -> bool:
    return str(headers.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in headers
