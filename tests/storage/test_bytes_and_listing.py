from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_trainer.errors import UsageError
from finetune_trainer.storage import ChangedError, CorruptError, MissingContainerError, MissingError, Store, file_crc32
from tests.support.s3 import Proxy

MIB = 1024 * 1024
Place = tuple[Store, str]


@pytest.fixture(params=["s3", "pvc", "file"])
def place(request: pytest.FixtureRequest, bucket: str, connect: Callable[..., Store], tmp_path: Path) -> Place:
    """A store and an empty place in it, for each scheme: what a user sees must not depend on it."""
    (tmp_path / "volumes" / "claim").mkdir(parents=True)
    roots = {"s3": f"s3://{bucket}/root", "pvc": "pvc://claim/root", "file": f"file://{tmp_path}/root"}
    return connect(FINETUNE_VOLUMES_DIR=str(tmp_path / "volumes")), roots[request.param]


def names(store: Store, uri: str, root: str) -> list[str]:
    return [info.uri.removeprefix(root + "/") for info in store.list(uri)]


def test_what_is_written_is_read_back(place: Place) -> None:
    store, root = place
    store.write_bytes(f"{root}/a", b"hello")
    store.write_bytes(f"{root}/a", b"hello again")
    assert store.read_bytes(f"{root}/a") == b"hello again"
    assert store.read_range(f"{root}/a", 6, 3) == b"aga"
    assert store.read_range(f"{root}/a", 9, 99) == b"in"
    assert store.stat(f"{root}/a").size == 11
    assert store.exists(f"{root}/a")
    assert not store.exists(f"{root}/b")


def test_an_empty_object_is_an_object(place: Place, tmp_path: Path) -> None:
    store, root = place
    store.write_bytes(f"{root}/empty", b"")
    assert store.read_bytes(f"{root}/empty") == b""
    (path,) = store.download(f"{root}/empty", tmp_path / "down")
    assert path.read_bytes() == b""


def test_a_uri_means_one_object_a_folder_or_a_glob(place: Place) -> None:
    store, root = place
    for name in ("b.jsonl", "a.jsonl", "a.txt", "sub/c.jsonl", "subway"):
        store.write_bytes(f"{root}/{name}", b"x")
    assert names(store, f"{root}/a.txt", root) == ["a.txt"]
    assert names(store, f"{root}/", root) == ["a.jsonl", "a.txt", "b.jsonl", "sub/c.jsonl", "subway"]
    assert names(store, f"{root}/sub", root) == ["sub/c.jsonl"]
    assert names(store, f"{root}/*.jsonl", root) == ["a.jsonl", "b.jsonl"]
    assert names(store, f"{root}/**/*.jsonl", root) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert names(store, f"{root}/[ab].*", root) == ["a.jsonl", "a.txt", "b.jsonl"]
    assert names(store, f"{root}/nothing/", root) == []
    assert names(store, f"{root}/*.csv", root) == []


def test_keys_may_hold_any_characters(place: Place, tmp_path: Path) -> None:
    store, root = place
    odd = ["a b.txt", "c+d%20.txt", "ключ/日本語.txt", "what[1]?*.txt", "é&=#.txt", "🙂.txt"]
    for name in odd:
        store.write_bytes(f"{root}/{name}", name.encode())
    assert names(store, f"{root}/", root) == sorted(odd, key=str.encode)
    assert names(store, f"{root}/what[1]?*.txt", root) == ["what[1]?*.txt"]
    paths = store.download(f"{root}/", tmp_path / "down")
    assert [path.read_text() for path in paths] == sorted(odd, key=str.encode)


def test_deleting_what_is_not_there_is_no_error(place: Place) -> None:
    store, root = place
    store.write_bytes(f"{root}/a", b"x")
    store.delete([f"{root}/a", f"{root}/never"])
    assert store.list(f"{root}/") == []


def test_a_missing_object_is_named(place: Place, tmp_path: Path) -> None:
    store, root = place
    for call in (
        lambda: store.read_bytes(f"{root}/gone.bin"),
        lambda: store.stat(f"{root}/gone.bin"),
        lambda: store.download(f"{root}/gone.bin", tmp_path),
    ):
        with pytest.raises(MissingError, match=r"gone\.bin"):
            call()


def test_a_probe_leaves_nothing_behind(place: Place) -> None:
    store, root = place
    store.probe_write(root)
    assert store.list(f"{root}/") == []


def test_an_object_is_read_as_a_file_by_those_who_know_files(place: Place) -> None:
    store, root = place
    store.write_bytes(f"{root}/rows.gz", gzip.compress(b"first\nsecond\n" * 100_000))
    with store.open(f"{root}/rows.gz") as raw, gzip.open(raw, "rt") as lines:
        assert sum(1 for line in lines if line == "second\n") == 100_000


@pytest.mark.parametrize("scattered", [False, True])
def test_an_open_object_is_sought_in_as_a_file_is(place: Place, big_file: Path, scattered: bool) -> None:
    store, root = place
    store.upload({f"{root}/big": big_file})
    whole = big_file.read_bytes()
    with store.open(f"{root}/big", scattered=scattered) as file:
        assert file.seekable()
        assert file.seek(-1000, os.SEEK_END) == len(whole) - 1000
        assert file.read() == whole[-1000:]
        for position, length in ((5 * MIB, 10), (5 * MIB + 7, 3 * MIB), (1, 2 * MIB), (0, len(whole))):
            file.seek(position)
            assert file.read(length) == whole[position : position + length]
            assert file.tell() == position + length


def test_an_object_that_was_replaced_after_it_was_listed_is_refused(place: Place) -> None:
    store, root = place
    store.write_bytes(f"{root}/rows.jsonl", b"old")
    (listed,) = store.list(f"{root}/rows.jsonl")
    store.write_bytes(f"{root}/rows.jsonl", b"newer")
    with pytest.raises(ChangedError, match=r"rows\.jsonl was replaced"):
        store.open(f"{root}/rows.jsonl", info=listed).read()


def test_of_an_object_that_is_read_here_and_there_no_more_is_fetched(
    far_store: Store, proxy: Proxy, bucket: str, big_file: Path
) -> None:
    far_store.upload({f"s3://{bucket}/big": big_file})
    before, requests = proxy.passed_bytes, len(proxy.requests)
    with far_store.open(f"s3://{bucket}/big", scattered=True) as file:
        for position in (11 * MIB, 3 * MIB, 7 * MIB):
            file.seek(position)
            file.read(100)
    assert proxy.passed_bytes - before < 3 * MIB + 64 * 1024
    assert len(proxy.requests) - requests == 4, "a HEAD and three ranges"


def test_a_missing_bucket_and_a_missing_volume_are_named(store: Store) -> None:
    for call in (store.list, store.read_bytes, store.exists):
        with pytest.raises(MissingContainerError, match="no bucket `no-such-bucket`"):
            call("s3://no-such-bucket/x")
    with pytest.raises(MissingContainerError, match="no bucket `no-such-bucket`"):
        store.write_bytes("s3://no-such-bucket/x", b"")
    with pytest.raises(MissingContainerError, match="/volumes/no-claim"):
        store.list("pvc://no-claim/x/")


def test_a_bucket_name_that_cannot_be_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="Bad_Bücket"):
        store.list("s3://Bad_Bücket/x/")


def test_more_objects_than_one_page_are_listed_and_deleted(store: Store, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for number in range(1100):
        (tmp_path / "many" / f"{number:05}").write_bytes(b"%d" % number)
    store.upload_folder(tmp_path / "many", f"s3://{bucket}/many")
    listed = store.list(f"s3://{bucket}/many/")
    assert [info.uri[-5:] for info in listed] == [f"{number:05}" for number in range(1100)]
    paths = store.download(f"s3://{bucket}/many/", tmp_path / "down")
    assert [path.read_bytes() for path in paths] == [b"%d" % number for number in range(1100)]
    store.delete(info.uri for info in listed)
    assert store.list(f"s3://{bucket}/") == []


def test_an_open_object_survives_broken_connections(
    far_store: Store, proxy: Proxy, bucket: str, big_file: Path
) -> None:
    far_store.upload({f"s3://{bucket}/big": big_file})
    proxy.after(5 * MIB, lambda: proxy.down_for(0.5))
    with far_store.open(f"s3://{bucket}/big") as file:
        assert file.read() == big_file.read_bytes()


def test_an_open_object_that_is_replaced_is_not_mixed_with_the_new_one(
    far_store: Store, store: Store, proxy: Proxy, bucket: str, big_file: Path
) -> None:
    store.upload({f"s3://{bucket}/big": big_file})
    with far_store.open(f"s3://{bucket}/big") as file:
        file.read(MIB)
        store.write_bytes(f"s3://{bucket}/big", os.urandom(12 * MIB))
        proxy.down()
        proxy.up()
        with pytest.raises(ChangedError, match="was replaced"):
            file.read()


def test_a_written_file_has_the_checksum_that_the_server_keeps(store: Store, bucket: str, big_file: Path) -> None:
    (done,) = store.upload({f"s3://{bucket}/big": big_file})
    found = store.stat(f"s3://{bucket}/big")
    assert (done.size, done.crc32) == (found.size, found.crc32) == (big_file.stat().st_size, file_crc32(big_file))


def test_bytes_flipped_on_the_way_are_not_read(far_store: Store, store: Store, proxy: Proxy, bucket: str) -> None:
    store.write_bytes(f"s3://{bucket}/manifest.json", os.urandom(100_000))
    proxy.flip(1)
    with pytest.raises(CorruptError, match=r"manifest\.json arrived with a wrong checksum"):
        far_store.read_bytes(f"s3://{bucket}/manifest.json")
    assert far_store.read_bytes(f"s3://{bucket}/manifest.json") == store.read_bytes(f"s3://{bucket}/manifest.json")


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(
    store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    store.write_bytes(f"s3://{bucket}/x", b"x")
