from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_trainer.errors import UnavailableError
from finetune_trainer.storage import MissingError, Store, TransferSettings, file_crc32
from finetune_trainer.storage.upload import MAX_PARTS, part_size
from tests.support.s3 import Proxy, S3Server

MIB = 1024 * 1024


def test_files_become_objects_of_the_given_names(store: Store, bucket: str, big_file: Path, tmp_path: Path) -> None:
    small, empty = tmp_path / "small", tmp_path / "empty"
    small.write_bytes(b"small")
    empty.touch()
    files = {f"s3://{bucket}/{name}": path for name, path in (("z/big", big_file), ("a", small), ("ü/empty", empty))}
    done = store.upload(files)
    assert [item.uri for item in done] == list(files)
    assert [item.crc32 for item in done] == [file_crc32(path) for path in files.values()]
    for uri, path in files.items():
        assert store.read_bytes(uri) == path.read_bytes()


def test_one_upload_may_go_to_a_bucket_and_to_a_folder(
    store: Store, bucket: str, big_file: Path, tmp_path: Path
) -> None:
    uris = [f"s3://{bucket}/big", f"file://{tmp_path}/copy"]
    done = store.upload(dict.fromkeys(uris, big_file))
    assert [(item.uri, item.crc32) for item in done] == [(uri, file_crc32(big_file)) for uri in uris]
    assert (tmp_path / "copy").read_bytes() == big_file.read_bytes()


def test_a_folder_goes_up_with_its_shape(store: Store, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "a").write_text("a")
    (tmp_path / "out" / "sub" / "b").write_text("b")
    done = store.upload_folder(tmp_path / "out", f"s3://{bucket}/model/")
    assert [item.uri for item in done] == [f"s3://{bucket}/model/a", f"s3://{bucket}/model/sub/b"]


def test_a_file_that_is_not_there_is_named_before_anything_is_sent(store: Store, bucket: str, big_file: Path) -> None:
    with pytest.raises(MissingError, match="gone"):
        store.upload({f"s3://{bucket}/a": big_file, f"s3://{bucket}/b": big_file.with_name("gone")})
    assert store.list(f"s3://{bucket}/") == []


def test_an_upload_that_fails_leaves_no_parts_that_are_paid_for(
    s3_server: S3Server, far_store: Store, proxy: Proxy, bucket: str, big_file: Path
) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        far_store.upload({f"s3://{bucket}/big": big_file}, progress=stop)
    assert s3_server.client().list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
    assert far_store.list(f"s3://{bucket}/") == []


def test_a_lost_answer_to_the_completion_is_no_failure(
    far_store: Store, proxy: Proxy, bucket: str, big_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection breaks after the server has completed the object and before we hear of it."""
    proxy.lose_answer_to(rb"POST \S*uploadId=")
    (done,) = far_store.upload({f"s3://{bucket}/big": big_file})
    assert "complete_multipart_upload" in caplog.text
    assert far_store.stat(f"s3://{bucket}/big").crc32 == done.crc32 == file_crc32(big_file)


def test_parts_grow_where_there_would_be_too_many() -> None:
    settings = TransferSettings()
    assert part_size(100 * MIB, settings) == settings.part_bytes
    for size in (80_000 * MIB, 80_001 * MIB, 5_000_000 * MIB):
        parts = part_size(size, settings)
        assert parts % MIB == 0
        assert -(-size // parts) <= MAX_PARTS


def test_uploads_hold_no_more_memory_than_was_allowed(
    connect: Callable[..., Store], bucket: str, tmp_path: Path
) -> None:
    """More threads than parts that fit: all still goes up, a part larger than the bound too."""
    tight = TransferSettings(threads=8, part_bytes=5 * MIB, upload_memory_bytes=6 * MIB)
    for name, size in (("a", 11), ("b", 4), ("c", 4)):
        (tmp_path / name).write_bytes(os.urandom(size * MIB))
    store = connect(tight)
    store.upload({f"s3://{bucket}/{name}": tmp_path / name for name in "abc"})
    one = connect(TransferSettings(part_bytes=12 * MIB, upload_memory_bytes=6 * MIB))
    one.upload({f"s3://{bucket}/d": tmp_path / "a"})
    assert store.stat(f"s3://{bucket}/d").crc32 == file_crc32(tmp_path / "a")


def test_an_endpoint_that_never_was_there_is_unavailable_and_named(connect: Callable[..., Store]) -> None:
    store = connect(TransferSettings(patience_seconds=0.3), AWS_ENDPOINT_URL_S3="http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9") as caught:
        store.write_bytes("s3://bucket/x", b"")
    assert caught.value.exit_code == 69
