from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3.s3.transfer
import pytest

from finetune_trainer.storage import ChangedError, CorruptError, MissingError, Store, TransferSettings
from finetune_trainer.storage.files import LOCK_FILE, RECORD_FILE
from finetune_trainer.storage.s3 import direct_response
from tests.support.s3 import Proxy, S3Server

MIB = 1024 * 1024


def visible(directory: Path) -> list[str]:
    """All files but the record of what is finished and its lock."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and path.name not in (RECORD_FILE, LOCK_FILE)
    )


def test_a_large_object_comes_by_ranges_and_is_equal(store: Store, bucket: str, big_file: Path, tmp_path: Path) -> None:
    store.upload({f"s3://{bucket}/big": big_file})
    (path,) = store.download(f"s3://{bucket}/big", tmp_path / "down")
    assert path == tmp_path / "down" / "big"
    assert path.read_bytes() == big_file.read_bytes()


def test_a_folder_keeps_its_shape(store: Store, bucket: str, tmp_path: Path) -> None:
    for name in ("model/config.json", "model/tokenizer/vocab.txt", "other/x"):
        store.write_bytes(f"s3://{bucket}/{name}", name.encode())
    paths = store.download(f"s3://{bucket}/model", tmp_path / "down")
    assert [str(path.relative_to(tmp_path / "down")) for path in paths] == ["config.json", "tokenizer/vocab.txt"]
    assert store.folder(f"s3://{bucket}/model", tmp_path / "down") == tmp_path / "down"


def test_files_of_a_volume_are_read_in_place(connect: Callable[..., Store], tmp_path: Path) -> None:
    (tmp_path / "claim" / "model").mkdir(parents=True)
    (tmp_path / "claim" / "model" / "config.json").write_text("{}")
    store = connect(FINETUNE_VOLUMES_DIR=str(tmp_path))
    assert store.download("pvc://claim/model", tmp_path / "down") == [tmp_path / "claim" / "model" / "config.json"]
    assert store.folder("pvc://claim/model", tmp_path / "down") == tmp_path / "claim" / "model"
    assert not (tmp_path / "down").exists()


@pytest.mark.parametrize("part_mib", [0, 5, 7])
def test_objects_of_other_tools_are_checked_by_their_etag(
    s3_server: S3Server, far_store: Store, proxy: Proxy, bucket: str, big_file: Path, tmp_path: Path, part_mib: int
) -> None:
    """Put without any checksum, plain or in parts: what is flipped on the way is still seen, and healed."""
    put_without_checksum(s3_server, bucket, big_file, part_mib * MIB)
    proxy.flip(1)
    (path,) = far_store.download(f"s3://{bucket}/big", tmp_path / "down")
    assert path.read_bytes() == big_file.read_bytes()


def put_without_checksum(server: S3Server, bucket: str, file: Path, part_bytes: int) -> None:
    client = server.client()
    client.meta.config.request_checksum_calculation = "when_required"
    data = file.read_bytes()
    if not part_bytes:
        client.put_object(Bucket=bucket, Key="big", Body=data)
        return
    upload = client.create_multipart_upload(Bucket=bucket, Key="big")["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(data), part_bytes), 1):
        body = data[start : start + part_bytes]
        answer = client.upload_part(Bucket=bucket, Key="big", UploadId=upload, PartNumber=number, Body=body)
        parts.append({"PartNumber": number, "ETag": answer["ETag"]})
    client.complete_multipart_upload(Bucket=bucket, Key="big", UploadId=upload, MultipartUpload={"Parts": parts})


def test_parts_of_unequal_size_are_no_corruption(
    s3_server: S3Server, store: Store, bucket: str, tmp_path: Path
) -> None:
    client = s3_server.client()
    bodies = [os.urandom(size * MIB) for size in (6, 5, 6, 1)]
    upload = client.create_multipart_upload(Bucket=bucket, Key="odd")["UploadId"]
    parts = []
    for number, body in enumerate(bodies, 1):
        answer = client.upload_part(Bucket=bucket, Key="odd", UploadId=upload, PartNumber=number, Body=body)
        parts.append({"PartNumber": number, "ETag": answer["ETag"]})
    client.complete_multipart_upload(Bucket=bucket, Key="odd", UploadId=upload, MultipartUpload={"Parts": parts})
    (path,) = store.download(f"s3://{bucket}/odd", tmp_path / "down")
    assert path.read_bytes() == b"".join(bodies)


def test_an_object_of_the_sdks_own_transfer_is_checked_by_the_crc_of_its_parts(
    s3_server: S3Server, far_store: Store, proxy: Proxy, bucket: str, big_file: Path, tmp_path: Path
) -> None:
    config = boto3.s3.transfer.TransferConfig(multipart_chunksize=5 * MIB)
    s3_server.client().upload_file(str(big_file), bucket, "big", Config=config)
    proxy.flip(1)
    (path,) = far_store.download(f"s3://{bucket}/big", tmp_path / "down")
    assert path.read_bytes() == big_file.read_bytes()


def test_a_byte_flipped_once_on_the_way_is_healed(
    far_store: Store,
    store: Store,
    proxy: Proxy,
    bucket: str,
    big_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.upload({f"s3://{bucket}/big": big_file})
    proxy.flip(1)
    (path,) = far_store.download(f"s3://{bucket}/big", tmp_path / "down")
    assert path.read_bytes() == big_file.read_bytes()
    assert "wrong checksum (attempt 1 of 3)" in caplog.text


def test_bytes_that_are_flipped_each_time_are_refused(
    far_store: Store, store: Store, proxy: Proxy, bucket: str, tmp_path: Path
) -> None:
    store.write_bytes(f"s3://{bucket}/data.bin", os.urandom(100_000))
    proxy.flip(1000)
    with pytest.raises(CorruptError, match=r"data\.bin arrived 3 times"):
        far_store.download(f"s3://{bucket}/data.bin", tmp_path / "down")
    assert visible(tmp_path / "down") == []


def test_an_object_replaced_while_it_is_read_is_not_mixed(
    connect: Callable[..., Store], store: Store, proxy: Proxy, bucket: str, big_file: Path, tmp_path: Path
) -> None:
    store.upload({f"s3://{bucket}/big": big_file})
    # One thread, so that ranges are still to be asked for when the object is replaced.
    far_store = connect(TransferSettings(range_bytes=MIB, threads=1), AWS_ENDPOINT_URL_S3=proxy.url)
    proxy.after(3 * MIB, lambda: store.write_bytes(f"s3://{bucket}/big", b"new"))
    with pytest.raises(ChangedError, match="was replaced"):
        far_store.download(f"s3://{bucket}/big", tmp_path / "down")
    assert visible(tmp_path / "down") == []


def test_progress_goes_from_nothing_to_all(store: Store, bucket: str, big_file: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int, int]] = []
    store.upload({f"s3://{bucket}/d/{n}": big_file for n in range(3)}, progress=lambda *now: seen.append(now))
    total = 3 * big_file.stat().st_size
    assert seen[-1] == (total, total, 3, 3)
    seen.clear()
    store.download(f"s3://{bucket}/d", tmp_path / "down", progress=lambda *now: seen.append(now))
    assert seen[-1] == (total, total, 3, 3)
    assert seen == sorted(seen)


def test_a_callback_that_raises_ends_the_transfer_and_tidies_up(
    store: Store, bucket: str, big_file: Path, tmp_path: Path
) -> None:
    store.upload({f"s3://{bucket}/big": big_file})

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.download(f"s3://{bucket}/big", tmp_path / "down", progress=stop)
    assert [name for name in visible(tmp_path / "down") if name.endswith(".part")] == []


def test_what_is_finished_is_not_fetched_again(
    far_store: Store, proxy: Proxy, store: Store, bucket: str, big_file: Path, tmp_path: Path
) -> None:
    store.upload({f"s3://{bucket}/d/{n}": big_file for n in range(3)})
    far_store.download(f"s3://{bucket}/d", tmp_path / "down")
    before = proxy.passed_bytes
    far_store.download(f"s3://{bucket}/d", tmp_path / "down")
    assert proxy.passed_bytes - before < 10_000


@pytest.mark.parametrize("how", ["removed", "shortened", "touched"])
def test_a_finished_file_that_was_changed_is_fetched_again(
    store: Store, bucket: str, big_file: Path, tmp_path: Path, how: str
) -> None:
    store.upload({f"s3://{bucket}/d/big": big_file})
    (path,) = store.download(f"s3://{bucket}/d", tmp_path / "down")
    if how == "removed":
        path.unlink()
    elif how == "shortened":
        path.write_bytes(b"short")
    else:
        path.write_bytes(b"x" * big_file.stat().st_size)
    store.download(f"s3://{bucket}/d", tmp_path / "down")
    assert path.read_bytes() == big_file.read_bytes()


def test_a_new_version_replaces_the_finished_file(store: Store, bucket: str, tmp_path: Path) -> None:
    store.write_bytes(f"s3://{bucket}/d/x", b"old")
    store.download(f"s3://{bucket}/d", tmp_path / "down")
    store.write_bytes(f"s3://{bucket}/d/x", b"new")
    (path,) = store.download(f"s3://{bucket}/d", tmp_path / "down")
    assert path.read_bytes() == b"new"


def test_nothing_to_download_is_an_error_that_names_the_uri(store: Store, bucket: str, tmp_path: Path) -> None:
    for uri in (f"s3://{bucket}/none/", f"s3://{bucket}/*.jsonl", f"s3://{bucket}/none"):
        with pytest.raises(MissingError) as caught:
            store.download(uri, tmp_path)
        assert uri in caught.value.message


def test_an_object_and_a_folder_of_one_name_are_told_apart_in_words(store: Store, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "down" / "x").mkdir(parents=True)
    store.write_bytes(f"s3://{bucket}/d/x", b"file")
    with pytest.raises(Exception, match="down/x: Is a directory"):
        store.download(f"s3://{bucket}/d/", tmp_path / "down")


def test_two_that_download_into_one_folder_fetch_once(
    far_store: Store, store: Store, proxy: Proxy, bucket: str, big_file: Path, tmp_path: Path
) -> None:
    store.upload({f"s3://{bucket}/big": big_file})
    with ThreadPoolExecutor() as ranks:
        done = list(ranks.map(lambda _: far_store.download(f"s3://{bucket}/big", tmp_path / "down"), range(3)))
    assert done == [[tmp_path / "down" / "big"]] * 3
    assert done[0][0].read_bytes() == big_file.read_bytes()
    assert proxy.passed_bytes < big_file.stat().st_size + MIB


def test_the_sdk_still_has_the_response_that_is_read_directly(s3_server: S3Server, store: Store, bucket: str) -> None:
    """Were it gone, downloads would go on by the SDK's own stream, at twice the cost."""
    store.write_bytes(f"s3://{bucket}/x", b"x")
    assert direct_response(s3_server.client().get_object(Bucket=bucket, Key="x")["Body"]) is not None
    assert direct_response(io.BytesIO()) is None


def test_connections_are_used_again(
    connect: Callable[..., Store], proxy: Proxy, store: Store, bucket: str, big_file: Path, tmp_path: Path
) -> None:
    store.upload({f"s3://{bucket}/big": big_file})
    far_store = connect(TransferSettings(range_bytes=MIB, threads=2), AWS_ENDPOINT_URL_S3=proxy.url)
    far_store.download(f"s3://{bucket}/big", tmp_path / "down")
    assert len(proxy.requests) > 12
    assert proxy.connections <= 3
