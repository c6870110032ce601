from __future__ import annotations

import base64
import hashlib
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.storage.checksums import BlockHasher, Kind, combine_crc32, expectation


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_crcs_of_two_blocks_combine_to_the_crc_of_both(first: bytes, second: bytes) -> None:
    assert combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@given(st.binary(min_size=1, max_size=500), st.integers(1, 60), st.integers(1, 90))
def test_blocks_do_not_depend_on_how_the_stream_was_cut(data: bytes, block: int, cut: int) -> None:
    for algorithm in ("crc32", "md5"):
        whole, pieces = BlockHasher(algorithm, block), BlockHasher(algorithm, block)
        whole.update(data)
        for start in range(0, len(data), cut):
            pieces.update(data[start : start + cut])
        assert pieces.blocks() == whole.blocks()


def _b64(data: bytes) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


DATA = bytes(range(256)) * 10
PARTS = [DATA[start : start + 1000] for start in range(0, len(DATA), 1000)]
MD5 = hashlib.md5(DATA).hexdigest()
MD5_OF_PARTS = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in PARTS)).hexdigest()
CRC_OF_PARTS = _b64(b"".join(zlib.crc32(part).to_bytes(4, "big") for part in PARTS))


@pytest.mark.parametrize(
    ("headers", "part_bytes", "kind"),
    [
        ({"ETag": f'"{MD5}"'}, 0, Kind.MD5),
        ({"ETag": f'"{MD5}"', "ChecksumCRC32": _b64(DATA)}, 0, Kind.CRC32),
        ({"ETag": f'"{MD5_OF_PARTS}-3"', "ChecksumCRC32": _b64(DATA), "ChecksumType": "FULL_OBJECT"}, 0, Kind.CRC32),
        ({"ETag": f'"{MD5_OF_PARTS}-3"'}, 0, Kind.NONE),
        ({"ETag": f'"{MD5_OF_PARTS}-3"'}, 1000, Kind.MD5_OF_PARTS),
        ({"ETag": f'"{MD5_OF_PARTS}-3"', "ChecksumCRC32": f"{CRC_OF_PARTS}-3"}, 1000, Kind.CRC32_OF_PARTS),
        ({"ETag": f'"{MD5}"', "ServerSideEncryption": "aws:kms"}, 0, Kind.NONE),
        ({"ETag": '"opaque"'}, 0, Kind.NONE),
    ],
)
def test_an_offered_checksum_is_checked_by_its_own_rule(headers: dict[str, str], part_bytes: int, kind: Kind) -> None:
    expected = expectation(headers, part_bytes)
    assert expected.kind is kind

    right, wrong = (BlockHasher(expected.algorithm, expected.part_bytes) for _ in range(2))
    right.update(DATA)
    wrong.update(DATA[:-1] + b"?")
    assert expected.is_met_by(right.blocks())
    assert expected.is_met_by(wrong.blocks()) is (kind is Kind.NONE)
