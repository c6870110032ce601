"""Models of a hub, pinned; and a cache that jobs share: filled once, verified, never in the way."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from finetune_api.contract import ENV_HUB_ENDPOINT, ENV_MODEL_CACHE
from finetune_trainer.errors import StoppedError, UsageError
from finetune_trainer.inputs import fetch_model
from finetune_trainer.model_cache import MANIFEST
from finetune_trainer.result import Output
from finetune_trainer.storage import Store
from tests.support.hub import serve_hub
from tests.support.jobs import a_context, a_job, run
from tests.support.models import save_tiny_llama

REPO = "org/tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve_hub() as hub:
        hub.push(REPO, save_tiny_llama(tmp_path / "pushed"))
        monkeypatch.setenv(ENV_HUB_ENDPOINT, hub.endpoint)
        yield hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(ENV_MODEL_CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fetch(hub, tmp_path):
    """Bring the model for another pod; its context and where the model is."""

    def fetch(name, before=None):
        job = a_job(tmp_path / "job", model={"uri": f"hf://{REPO}"})
        context = a_context(job, tmp_path / name)
        if before:
            before(context)
        with Store.connect({ENV_HUB_ENDPOINT: hub.endpoint}) as store:
            return context, fetch_model(context, store, job.spec.model.uri, lambda names: None).folder

    return fetch


def entries(cache):
    return [path for path in cache.iterdir() if not path.name.startswith(".")]


def test_a_model_of_the_hub_is_trained_and_stays_the_commit_that_the_first_attempt_found(hub, tmp_path):
    job = a_job(tmp_path, model={"uri": f"hf://{REPO}@main"})
    first = hub.commit(REPO, "main")

    def stop(context):
        context.stop.request()

    context = a_context(job, tmp_path / "first")
    stop(context)
    with pytest.raises(StoppedError):
        run(job, context.scratch, 1, context)
    other = save_tiny_llama(tmp_path / "newer")
    (other / "config.json").write_text("{}")
    hub.push(REPO, other)
    assert run(job, tmp_path / "second", 2).steps == 6
    with Store.connect({}) as store:
        assert Output(store, job).pinned() == f"hf://{REPO}@{first}"


def test_a_job_that_shares_an_output_by_mistake_moves_no_other_job_to_another_commit(hub, tmp_path):
    job, first = a_job(tmp_path, model={"uri": f"hf://{REPO}@main"}), hub.commit(REPO, "main")
    other = job.model_copy(deep=True)
    other.metadata.uid = "uid-2"
    stopped = a_context(job, tmp_path / "first")
    stopped.stop.request()
    with pytest.raises(StoppedError):
        run(job, stopped.scratch, 1, stopped)
    hub.push(REPO, save_tiny_llama(tmp_path / "newer", hidden_size=24))
    stopped = a_context(other, tmp_path / "other")
    stopped.stop.request()
    with pytest.raises(StoppedError):
        run(other, stopped.scratch, 1, stopped)
    assert run(job, tmp_path / "second", 2).steps == 6
    (tmp_path / "out/result.json").unlink()
    asked = len(hub.seen)
    third = job.model_copy(deep=True)
    third.metadata.uid = "uid-3"
    with pytest.raises(UsageError, match="holds checkpoints of another job"):
        run(third, tmp_path / "third")
    assert len(hub.seen) == asked
    with Store.connect({}) as store:
        pins = [Output(store, it).pinned() for it in (job, other, third)]
    assert pins == [f"hf://{REPO}@{first}", f"hf://{REPO}@{hub.commit(REPO, 'main')}", None]


def test_the_second_job_fetches_nothing(hub, cache, fetch, tmp_path):
    _, folder = fetch("one")
    sent = hub.downloads()
    assert {"config.json", "model.safetensors"} <= set(sent)
    assert folder.parent == cache
    assert not (tmp_path / "one" / "model").exists()
    context, again = fetch("two")
    assert (again, hub.downloads(), context.reporter.snapshot().warnings) == (folder, sent, [])


def test_many_who_come_at_once_fetch_it_once(hub, cache, fetch):
    with ThreadPoolExecutor(4) as pool:
        folders = {folder for _, folder in pool.map(fetch, ["a", "b", "c", "d"])}
    assert len(folders) == 1
    sent = hub.downloads()
    assert sent.count("config.json") == 1


def test_a_file_that_rots_is_named_and_fetched_again(hub, cache, fetch):
    _, folder = fetch("one")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    good = bytes(data)
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    context, again = fetch("two")
    assert "model.safetensors in the model cache is not what was written" in context.reporter.snapshot().warnings[0]
    assert (again / "model.safetensors").read_bytes() == good
    assert entries(cache) == [folder]


def test_an_entry_that_cannot_be_emptied_is_in_nobodys_way(hub, cache, fetch, monkeypatch):
    _, folder = fetch("one")
    (folder / "config.json").write_text("")

    def remove_as_nfs_does(path, **_):
        # What somebody has open stays, under another name, until it is closed.
        (path / "config.json").rename(path / ".nfs0001")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_as_nfs_does)
        _, again = fetch("two")
    assert json.loads((again / "config.json").read_text())["model_type"] == "llama"
    assert (again / MANIFEST).is_file()
    assert len(list(cache.glob(".*.old"))) == 1
    (again / "config.json").write_text("")
    fetch("three")
    assert list(cache.glob(".*.old")) == []


def test_a_fill_that_was_broken_off_is_gone_on_with_and_is_no_model_meanwhile(hub, cache, fetch, monkeypatch):
    download, brought = Store.download, []

    def once(store, uri, *rest):
        if brought:
            raise StoppedError("stopped on request")
        brought.append(uri)
        return download(store, uri, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "download", once)
        with pytest.raises(StoppedError):
            fetch("one")
    assert entries(cache) == []
    _, folder = fetch("two")
    assert (folder / MANIFEST).is_file()
    assert hub.downloads().count(brought[0].rsplit("/", 1)[-1]) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EROFS, errno.ENOSPC])
def test_a_cache_that_cannot_serve_is_told_and_done_without(hub, cache, fetch, tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "it cannot")

    # Those of the downloads themselves work.
    monkeypatch.setattr("finetune_trainer.model_cache._try_lock", refuse)
    context, folder = fetch("one")
    assert folder == tmp_path / "one" / "model"
    assert "model.cache cannot be used" in context.reporter.snapshot().warnings[0]


def test_who_waits_for_another_filler_stops_on_request(hub, cache, fetch):
    _, folder = fetch("one")
    shutil.rmtree(folder)
    with (cache / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoppedError):
            fetch("two", before=lambda context: context.stop.request())
