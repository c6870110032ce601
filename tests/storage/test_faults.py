"""Faults of the network and of credentials, each really produced."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_trainer.errors import PermissionRefusedError, TrainerError, UnavailableError, UsageError
from finetune_trainer.storage import Store, TransferSettings
from tests.storage.conftest import MIB
from tests.storage.test_download import visible
from tests.support.s3 import Proxy, S3Server


@pytest.mark.parametrize("fault", ["down", "stall"])
def test_a_download_rides_out_an_endpoint_that_is_away(
    far_store: Store, store: Store, proxy: Proxy, bucket: str, big_file: Path, tmp_path: Path, fault: str
) -> None:
    store.upload({f"s3://{bucket}/big": big_file})
    before = proxy.passed_bytes

    def away() -> None:
        if fault == "down":
            proxy.down_for(1.0)
        else:
            proxy.stall_for(3.0)

    proxy.after(6 * MIB, away)
    (path,) = far_store.download(f"s3://{bucket}/big", tmp_path / "down")
    assert path.read_bytes() == big_file.read_bytes()
    # It goes on where it broke. What was in flight is sent twice: at most a socket's buffers for each of 8 threads.
    assert proxy.passed_bytes - before < big_file.stat().st_size + 8 * MIB


@pytest.mark.parametrize("fault", ["down", "stall"])
def test_an_upload_rides_out_an_endpoint_that_is_away(
    connect: Callable[..., Store], proxy: Proxy, store: Store, bucket: str, tmp_path: Path, fault: str
) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(40 * MIB))
    calm = TransferSettings(
        threads=2, part_bytes=5 * MIB, read_timeout_seconds=3, first_backoff_seconds=0.05, max_backoff_seconds=0.2
    )
    far_store = connect(calm, AWS_ENDPOINT_URL_S3=proxy.url)
    before: list[str] = []

    def away() -> None:
        before.extend(parts_sent(proxy))
        if fault == "down":
            proxy.down_for(1.0)
        else:
            proxy.stall_for(4.0)

    store.write_bytes(f"s3://{bucket}/first", b"")  # the first write to a bucket takes the server a second or more
    proxy.after(22 * MIB, away)
    (done,) = far_store.upload({f"s3://{bucket}/big": source})
    assert store.stat(f"s3://{bucket}/big").crc32 == done.crc32
    # Of what went before the fault only the parts in flight, at most one a thread, are sent again.
    sent = Counter(parts_sent(proxy))
    assert len(sent) == 8
    assert len(before) > 2
    assert 1 <= sum(sent[part] > 1 for part in before) <= 2


def parts_sent(proxy: Proxy) -> list[str]:
    return [request for request in proxy.requests if "partNumber=" in request]


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["download", "upload"])
def test_twenty_seconds_without_an_endpoint_do_not_end_a_job(
    connect: Callable[..., Store],
    proxy: Proxy,
    store: Store,
    bucket: str,
    big_file: Path,
    tmp_path: Path,
    direction: str,
) -> None:
    """With the settings that jobs really have, and in real time."""
    far_store = connect(TransferSettings(), AWS_ENDPOINT_URL_S3=proxy.url)
    uri = f"s3://{bucket}/big"
    proxy.after(4 * MIB, lambda: proxy.down_for(20.0))
    if direction == "download":
        store.upload({uri: big_file})
        started = time.monotonic()
        far_store.download(uri, tmp_path / "down")
        assert (tmp_path / "down" / "big").read_bytes() == big_file.read_bytes()
    else:
        started = time.monotonic()
        far_store.upload({uri: big_file})
        assert store.read_bytes(uri) == big_file.read_bytes()
    assert 20.0 <= time.monotonic() - started < 40.0


@pytest.mark.parametrize("fault", ["down", "stall"])
def test_an_endpoint_that_stays_away_ends_in_69_and_nothing_is_left(
    far_store: Store, store: Store, proxy: Proxy, bucket: str, big_file: Path, tmp_path: Path, fault: str
) -> None:
    store.upload({f"s3://{bucket}/big": big_file})
    proxy.after(6 * MIB, getattr(proxy, fault))
    with pytest.raises(UnavailableError, match="tried") as caught:
        far_store.download(f"s3://{bucket}/big", tmp_path / "down")
    assert caught.value.exit_code == 69
    assert str(proxy.port) in caught.value.message
    assert visible(tmp_path / "down") == []


def test_wrong_keys_are_told_from_missing_rights(
    s3_server: S3Server, connect: Callable[..., Store], store: Store, bucket: str
) -> None:
    store.write_bytes(f"s3://{bucket}/x", b"x")
    unknown = connect(AWS_ACCESS_KEY_ID="NOBODY")
    mismatched = connect(AWS_SECRET_ACCESS_KEY="not-the-secret")
    reader = connect(AWS_ACCESS_KEY_ID=s3_server.reader.access_key, AWS_SECRET_ACCESS_KEY=s3_server.reader.secret_key)
    assert reader.read_bytes(f"s3://{bucket}/x") == b"x"
    cases: list[tuple[Callable[[], object], str, str]] = [
        (lambda: unknown.list(f"s3://{bucket}/"), "InvalidAccessKeyId", "secretName"),
        (lambda: unknown.read_bytes(f"s3://{bucket}/x"), "InvalidAccessKeyId", "secretName"),
        (lambda: mismatched.stat(f"s3://{bucket}/x"), "SignatureDoesNotMatch", "secretName"),
        (lambda: mismatched.write_bytes(f"s3://{bucket}/x", b""), "SignatureDoesNotMatch", "secretName"),
        (lambda: reader.write_bytes(f"s3://{bucket}/x", b""), f"put_object on s3://{bucket}/x", "s3:PutObject"),
        (lambda: reader.probe_write(f"s3://{bucket}/out"), f"s3://{bucket}/out/", "s3:PutObject"),
        (lambda: reader.delete([f"s3://{bucket}/x"]), "delete", "s3:DeleteObject"),
    ]
    for call, words, way_out in cases:
        with pytest.raises(PermissionRefusedError) as caught:
            call()
        assert caught.value.exit_code == 77
        assert words in caught.value.message
        assert way_out in caught.value.advice
        assert bucket in caught.value.message + caught.value.advice


def test_no_credentials_at_all_are_said_so(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    store = Store.connect({"AWS_ENDPOINT_URL_S3": s3_server.endpoint})
    with store, pytest.raises(PermissionRefusedError, match="no complete credentials"):
        store.list(f"s3://{bucket}/")


def test_no_message_and_no_log_holds_a_credential(
    s3_server: S3Server, connect: Callable[..., Store], bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret = s3_server.secret_key
    quick = TransferSettings(patience_seconds=0.2)
    stores = [
        connect(AWS_ACCESS_KEY_ID="NOBODY"),
        connect(quick, AWS_ENDPOINT_URL_S3=f"http://me:{secret}@127.0.0.1:9"),
    ]
    said = [repr(store._s3_settings) for store in stores]
    for store in stores:
        with pytest.raises(TrainerError) as caught:
            store.write_bytes(f"s3://{bucket}/x", b"")
        said.append(f"{caught.value.message} {caught.value.advice}")
    assert secret not in " ".join(said) + caplog.text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AWS_ENDPOINT_URL_S3", "minio:9000", "storage.s3.endpoint"),
        ("FINETUNE_S3_PATH_STYLE", "yes", "pathStyle"),
        ("AWS_CA_BUNDLE", "/no/such/ca.crt", "CA bundle"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(name: str, value: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Store.connect({name: value})
    assert words in caught.value.message + caught.value.advice
