"""Reading from a hub, against a small one on loopback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request

import pytest
from huggingface_hub import HfApi, constants

from finetune_api.contract import ENV_HUB_ENDPOINT, ENV_HUB_TOKEN
from finetune_trainer.errors import PermissionRefusedError, StoppedError, UnavailableError, UsageError
from finetune_trainer.storage import MissingError, Store
from finetune_trainer.storage.errors import CorruptError
from finetune_trainer.storage.hub import CarefulRedirects
from tests.storage.conftest import QUICK
from tests.support.hub import Hub, serve_hub

REPO = "org/tiny"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "pushed"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(os.urandom(3_000_000))
    (folder / "empty.txt").touch()
    with serve_hub() as hub:
        hub.push(REPO, folder)
        yield hub


@pytest.fixture
def store(hub: Hub) -> Iterator[Store]:
    with Store.connect({ENV_HUB_ENDPOINT: hub.endpoint}, QUICK) as store:
        yield store


def content(hub: Hub, name: str, revision: str = "main") -> bytes:
    return hub.repositories[REPO][hub.commit(REPO, revision) or ""][name]


def test_a_model_is_listed_and_brought_whole(store: Store, hub: Hub, tmp_path: Path) -> None:
    infos = store.list(f"hf://{REPO}@main/")
    assert [(info.uri, info.size) for info in infos] == [
        ("hf://org/tiny@main/config.json", 23),
        ("hf://org/tiny@main/empty.txt", 0),
        ("hf://org/tiny@main/model.safetensors", 3_000_000),
    ]
    reports: list[tuple[int, ...]] = []
    paths = store.download(f"hf://{REPO}@main/", tmp_path / "here", lambda *report: reports.append(report))
    assert [path.read_bytes() for path in paths] == [content(hub, path.name) for path in paths]
    assert reports[-1] == (3_000_023, 3_000_023, 3, 3)
    assert store.folder(f"hf://{REPO}@main/", tmp_path / "here") == tmp_path / "here"
    sent = len(hub.downloads())
    store.download(f"hf://{REPO}@main/", tmp_path / "here")
    assert len(hub.downloads()) == sent


def test_without_a_revision_it_is_main(store: Store, hub: Hub) -> None:
    assert store.read_bytes(f"hf://{REPO}/config.json") == content(hub, "config.json")
    assert store.pin(f"hf://{REPO}") == f"hf://{REPO}@{hub.commit(REPO, 'main')}"
    assert store.pin("s3://models/x") == "s3://models/x"


def test_all_files_are_of_one_commit_though_the_branch_goes_on(store: Store, hub: Hub, tmp_path: Path) -> None:
    before = content(hub, "config.json")
    store.list(f"hf://{REPO}@main/")
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "config.json").write_text("{}")
    commit = hub.push(REPO, newer)
    (path,) = store.download(f"hf://{REPO}@main/config.json", tmp_path / "here")
    assert path.read_bytes() == before
    assert store.read_bytes(f"hf://{REPO}@{commit}/config.json") == b"{}"


def test_a_token_is_shown_to_the_hub_and_not_to_where_it_redirects(hub: Hub, tmp_path: Path) -> None:
    hub.private.add(REPO)
    with Store.connect({ENV_HUB_ENDPOINT: hub.endpoint, ENV_HUB_TOKEN: hub.token}, QUICK) as store:
        store.download(f"hf://{REPO}@main/model.safetensors", tmp_path)
    shown = [(path, token) for _, path, token in hub.seen if path.endswith("model.safetensors")]
    assert [token for _, token in shown] == ["Bearer hf_secret", None]
    assert "hf_secret" not in repr(store.__dict__)


@pytest.mark.parametrize(
    ("target", "token"),
    [
        ("https://hub.example/there", "Bearer hf_secret"),
        ("http://hub.example/there", None),
        ("https://hub.example:8443/there", None),
        ("https://other.example/there", None),
    ],
)
def test_a_redirect_that_leaves_the_host_or_the_encryption_loses_the_token(target: str, token: str | None) -> None:
    request = Request("https://hub.example/here", headers={"Authorization": "Bearer hf_secret"})
    redirected = CarefulRedirects().redirect_request(request, None, 302, "Found", {}, target)
    assert redirected.get_header("Authorization") == token


def test_an_endpoint_with_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(UsageError, match="has a user or a password in it") as caught:
        Store.connect({ENV_HUB_ENDPOINT: "https://somebody:hunter2@hub.example"}, QUICK)
    assert "hunter2" not in f"{caught.value.message} {caught.value.advice}"
    assert "HF_TOKEN" in caught.value.advice


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_refusal_names_the_secret(hub: Hub, token: str | None) -> None:
    hub.private.add(REPO)
    with (
        Store.connect({ENV_HUB_ENDPOINT: hub.endpoint, **({ENV_HUB_TOKEN: token} if token else {})}, QUICK) as store,
        pytest.raises(PermissionRefusedError, match=r"refuses org/tiny \(401\)") as caught,
    ):
        store.list(f"hf://{REPO}/")
    assert "model.hub.secretName" in caught.value.advice


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("hf://org/other/", "has no repository org/other"),
        ("hf://org/tiny@v9/", "has no revision v9 of org/tiny"),
    ],
)
def test_what_the_hub_does_not_have_is_named(store: Store, uri: str, words: str) -> None:
    with pytest.raises(MissingError, match=words):
        store.list(uri)


def test_a_file_that_is_not_there_does_not_exist(store: Store) -> None:
    assert not store.exists(f"hf://{REPO}@main/other.json")
    with pytest.raises(MissingError, match=r"there is no hf://org/tiny@main/other\.json"):
        store.stat(f"hf://{REPO}@main/other.json")


def test_a_busy_hub_is_asked_again_and_broken_connections_go_on(store: Store, hub: Hub, tmp_path: Path) -> None:
    hub.fail = 2
    store.list(f"hf://{REPO}@main/")
    hub.break_after = [1_000_000, 500_000]
    (path,) = store.download(f"hf://{REPO}@main/model.safetensors", tmp_path)
    assert path.read_bytes() == content(hub, "model.safetensors")
    assert len(hub.downloads()) == 6


def test_a_hub_that_stays_away_is_unavailable(tmp_path: Path) -> None:
    with (
        Store.connect({ENV_HUB_ENDPOINT: "http://127.0.0.1:9"}, QUICK) as store,
        pytest.raises(UnavailableError, match=r"the hub 127\.0\.0\.1:9 cannot be reached"),
    ):
        store.list(f"hf://{REPO}/")


def test_a_host_that_is_no_hub_is_a_wrong_setting(hub: Hub) -> None:
    hub.repositories["org/tiny"] = {}
    hub.branches["org/tiny"] = {"main": "c"}
    hub.repositories["org/tiny"]["c"] = {}
    with Store.connect({ENV_HUB_ENDPOINT: hub.endpoint}, QUICK) as store:
        assert store.list("hf://org/tiny/") == []
    with pytest.raises(UsageError, match="is no URL"):
        Store.connect({ENV_HUB_ENDPOINT: "hub.example.com"}, QUICK)


def test_wrong_bytes_are_fetched_again_and_never_kept(store: Store, hub: Hub, tmp_path: Path) -> None:
    hub.corrupt = 1
    (path,) = store.download(f"hf://{REPO}@main/model.safetensors", tmp_path / "one")
    assert path.read_bytes() == content(hub, "model.safetensors")
    hub.corrupt = 9
    with pytest.raises(CorruptError, match="arrived 3 times with a checksum other than the hub's"):
        store.download(f"hf://{REPO}@main/config.json", tmp_path / "two")
    assert not [path for path in (tmp_path / "two").iterdir() if "config" in path.name]


def test_a_download_can_be_broken_off(store: Store, tmp_path: Path) -> None:
    def stop(*_: int) -> None:
        raise StoppedError("asked to stop")

    with pytest.raises(StoppedError):
        store.download(f"hf://{REPO}@main/", tmp_path / "here", stop)


def test_nothing_is_written_to_a_hub(store: Store, tmp_path: Path) -> None:
    for call in (
        lambda: store.write_bytes(f"hf://{REPO}/x", b""),
        lambda: store.delete([f"hf://{REPO}/x"]),
        lambda: store.upload({f"hf://{REPO}/x": tmp_path}),
    ):
        with pytest.raises(UsageError, match="nothing is written to a hub"):
            call()


def test_the_hub_of_these_tests_is_like_the_real_one_to_the_hubs_own_client(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    api = HfApi(endpoint=hub.endpoint, token=False)
    info = api.model_info(REPO, revision="main", files_metadata=True)
    assert info.sha == hub.commit(REPO, "main")
    large = next(item for item in info.siblings or [] if item.rfilename == "model.safetensors")
    assert large.lfs is not None
    for name in ("config.json", "model.safetensors"):
        path = api.hf_hub_download(REPO, name, revision="main", local_dir=tmp_path / "client")
        assert Path(path).read_bytes() == content(hub, name)
