"""A full disk, by a real file system that is too small."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune_trainer.storage import DiskFullError, Store, TransferSettings
from tests.storage.conftest import MIB
from tests.storage.test_download import visible
from tests.support.disks import small_file_system
from tests.support.s3 import Proxy


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "small", 8) as folder:
        yield folder


def test_what_cannot_fit_is_refused_before_the_first_byte(
    store: Store, bucket: str, big_file: Path, small_disk: Path
) -> None:
    store.upload({f"s3://{bucket}/big": big_file})
    with pytest.raises(DiskFullError) as caught:
        store.download(f"s3://{bucket}/big", small_disk)
    assert str(small_disk) in caught.value.message
    assert f"{big_file.stat().st_size:,} bytes are needed" in caught.value.message
    assert visible(small_disk) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_half_written(
    connect: Callable[..., Store], store: Store, proxy: Proxy, bucket: str, tmp_path: Path, small_disk: Path
) -> None:
    """The room is there when it is asked for, and taken by another while the first of two files comes."""
    source = tmp_path / "three"
    source.write_bytes(os.urandom(3 * MIB))
    store.upload({f"s3://{bucket}/d/{name}": source for name in ("first", "second")})
    one_by_one = connect(TransferSettings(threads=1), AWS_ENDPOINT_URL_S3=proxy.url)
    proxy.after(2 * MIB, lambda: (small_disk / "hog").write_bytes(bytes(4 * MIB)))
    with pytest.raises(DiskFullError, match="is full") as caught:
        one_by_one.download(f"s3://{bucket}/d", small_disk)
    assert str(small_disk) in caught.value.message
    assert visible(small_disk) == ["first", "hog"]
    assert (small_disk / "first").read_bytes() == source.read_bytes()


def test_a_full_volume_refuses_a_write_and_keeps_the_old_object(store: Store, small_disk: Path, big_file: Path) -> None:
    store.write_bytes(f"file://{small_disk}/x", b"old")
    for write in (
        lambda: store.write_bytes(f"file://{small_disk}/x", bytes(9 * MIB)),
        lambda: store.upload({f"file://{small_disk}/x": big_file}),
    ):
        with pytest.raises(DiskFullError, match="is full"):
            write()
    assert visible(small_disk) == ["x"]
    assert store.read_bytes(f"file://{small_disk}/x") == b"old"
