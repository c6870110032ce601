"""An endpoint behind TLS whose certificate only a CA of the user's own vouches for."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune_trainer.errors import UsageError
from finetune_trainer.storage import Store, file_crc32
from tests.support.s3 import Proxy, S3Server

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl program to make certificates with")


@pytest.fixture
def ca_bundle(tmp_path: Path) -> Path:
    """A CA; beside it lie the certificate and the key of a server at 127.0.0.1."""
    openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN=test-ca", tmp_path)
    openssl("req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=127.0.0.1", tmp_path)
    (tmp_path / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile san -out server.crt",
        tmp_path,
    )
    return tmp_path / "ca.crt"


def openssl(arguments: str, folder: Path) -> None:
    subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def tls_proxy(s3_server: S3Server, ca_bundle: Path) -> Iterator[Proxy]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(ca_bundle.with_name("server.crt"), ca_bundle.with_name("server.key"))
    with Proxy(s3_server.endpoint, tls=context) as proxy:
        yield proxy


def test_a_ca_of_ones_own_is_trusted_when_it_is_given(
    connect: Callable[..., Store], tls_proxy: Proxy, ca_bundle: Path, bucket: str, big_file: Path, tmp_path: Path
) -> None:
    store = connect(AWS_ENDPOINT_URL_S3=tls_proxy.url, AWS_CA_BUNDLE=str(ca_bundle))
    (done,) = store.upload({f"s3://{bucket}/big": big_file})
    (path,) = store.download(f"s3://{bucket}/big", tmp_path / "down")
    assert file_crc32(path) == done.crc32 == file_crc32(big_file)


def test_an_untrusted_certificate_is_refused_at_once_with_the_way_out(
    connect: Callable[..., Store], tls_proxy: Proxy, bucket: str
) -> None:
    store = connect(AWS_ENDPOINT_URL_S3=tls_proxy.url)
    with pytest.raises(UsageError, match="is not trusted") as caught:
        store.list(f"s3://{bucket}/")
    assert "caBundleConfigMap" in caught.value.advice
